"""One run from config to trained adapter: the composition root of `charkha train`.

Order of work: read the config, find the base, prepare the data, decide every `auto`, open the run folder, go on from
the newest verified checkpoint, train, keep what came out. Everything that can be refused is refused before the base
model is loaded.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from charkha.backends.base import AdapterSpec, BaseModelSpec, StepPlan, TrainOutcome
from charkha.backends.trackers import open_trackers, require_trackers
from charkha.config import Config
from charkha.config_file import LoadedConfig, dump_config, load_config
from charkha.errors import DoesNotFit, RunDamaged, RunOfAnotherConfig, TrainingFailed
from charkha.hardware.probe import peak_rss_bytes, probe_host
from charkha.plan.packing_support import PackingLeaks
from charkha.store import durable
from charkha.store.checkpoints import Checkpoint, CheckpointStore
from charkha.store.runs import RunFolder
from charkha.training.base_model import find_base
from charkha.training.choices import Choice, Chooser, DeviceFacts, adapter_spec, step_plan, unused_adapter_keys
from charkha.training.dataset import PreparedData, open_prepared, prepare_data
from charkha.training.packing_choice import choose_packing, packing_note
from charkha.training.preview import Preview, preview
from charkha.training.provenance import base_facts, package_versions
from charkha.training.results import TrainResult, result_of
from charkha.training.signals import StopFlag, stop_on_signals

FINAL = "final"  # under staging/
Observer = Callable[[dict[str, Any]], None]

# Changing these does not change which weights come out, so a run may go on with other values.
_FREE_KEYS = ("checkpoint", "guard", "cost", "report_to", "output")


@dataclass(frozen=True)
class Session:
    """All that is decided before the first step."""

    loaded: LoadedConfig
    run: RunFolder
    base: BaseModelSpec
    adapter: AdapterSpec
    plan: StepPlan
    data: PreparedData
    choices: tuple[Choice, ...]
    resolved: Config
    parameters: int
    memory: Preview
    packing_leak: str | None = None  # what the loaded model showed when `auto` had packed its rows


def train(config_path: Path, overrides: list[str], observe: Observer) -> TrainResult:
    """Trains, or goes on with, the run that the config describes. `observe` gets every event as it is recorded.

    Raises the errors of errors.py; a stop asked for by a signal is a result with status `paused`, not an error.
    """
    loaded = load_config(config_path, overrides)
    run = RunFolder((loaded.folder / loaded.config.output).resolve())
    with run.lock():
        session = open_session(loaded, run, observe)
        try:
            return _train_locked(session, observe)
        except PackingLeaks as leak:
            if loaded.config.data.packing != "auto" or any((run.path / "checkpoints").glob("step-*")):
                raise
            run.config_path.unlink()  # nothing was trained: the folder holds no run until it is planned again
            session = open_session(loaded, run, observe, proved_leak=leak.message)
            return _train_locked(session, observe)


def open_session(loaded: LoadedConfig, run: RunFolder, observe: Observer, *, proved_leak: str | None = None) -> Session:
    """Prepares data and decides every `auto`; writes only below `run`. The caller holds the run's lock."""
    from charkha.backends.torch.model import read_base_config
    from charkha.backends.torch.skeleton import attention_kernels, build_skeleton, require_fit

    config = loaded.config
    require_trackers(config.report_to)
    base_folder = find_base(config.model, loaded.folder)
    about_base = base_facts(base_folder)
    facts = _device_facts()
    chooser = Chooser(config, facts)
    dtype = chooser.dtype()
    skeleton = build_skeleton(base_folder)
    attention = chooser.attention(dtype, attention_kernels(skeleton))
    quantization = chooser.quantization(about_base.stored_quantization)
    base = BaseModelSpec(base_folder, dtype, attention, quantization, facts.device)
    adapter = adapter_spec(config)
    require_fit(skeleton, base, adapter)
    max_length = chooser.max_length(about_base.positions)
    manifest = run.read_manifest() if run.exists else {}
    data = prepare_data(loaded, base_folder, run.data, max_length, manifest.get("data"))
    lengths = data.train.lengths
    proved_leak = proved_leak or manifest.get("packing_leak")
    packing = choose_packing(
        config,
        chooser,
        lengths,
        row_tokens=max_length,
        model_type=str(read_base_config(base_folder).get("model_type")),
        device=facts.device,
        attention=attention,
        proved_leak=proved_leak,
    )
    plan = step_plan(
        config,
        chooser,
        rows=packing.rows if packing else len(lengths),
        longest_row=max_length if packing else int(lengths.max()),
        parameters=about_base.parameters,
        vocabulary=about_base.vocabulary,
        has_eval=data.eval is not None,
        packing=packing,
    )
    for text in (
        *unused_adapter_keys(config, loaded.keys_set),
        *data.notes,
        *(f"chose {choice}" for choice in chooser.choices),
        *([packing_note(packing, plan.batch_size)] if packing else ()),
    ):
        observe({"event": "note", "text": text})
    memory = preview(
        read_base_config(base_folder), base, adapter, plan, data.train, max_length if packing else int(lengths.max())
    )
    observe({"event": "note", "text": memory.sentence()})
    resolved = _resolved(loaded, base_folder, tuple(chooser.choices))
    return Session(
        loaded,
        run,
        base,
        adapter,
        plan,
        data,
        tuple(chooser.choices),
        resolved,
        about_base.parameters,
        memory,
        proved_leak,
    )


def _train_locked(session: Session, observe: Observer) -> TrainResult:
    run = session.run
    store = CheckpointStore(run.path)
    started_before = run.exists
    if started_before:
        _require_same_run(session)
    checkpoint = _newest_checkpoint(store, session, observe) if started_before else None
    if (
        started_before
        and checkpoint
        and checkpoint.step >= session.plan.total_steps
        and _final_folder(session).is_dir()
    ):
        observe({"event": "note", "text": f"this run is done ({checkpoint.step} steps); nothing to train"})
        return result_of(run, session.plan, status="done", peak_memory_bytes=None, peak_rss_bytes=peak_rss_bytes())
    if not started_before:
        _write_records(session)

    trackers = open_trackers(require_trackers(session.resolved.report_to), run.path, session.resolved)

    def record(name: str, **fields: Any) -> None:
        event = run.append(name, **fields)
        if name in ("checkpoint", "status", "resume"):
            run.sync_events()
        trackers(event)
        observe(event)

    if started_before:
        record(
            "resume", from_step=checkpoint.step if checkpoint else 0, path=str(checkpoint.path) if checkpoint else None
        )
    record("status", status="running")
    try:
        outcome = _run_backend(session, store, checkpoint, record)
    finally:
        trackers.close()
    if outcome.status == "done":
        _finish(session, store.staging / FINAL, outcome)
    record("status", status=outcome.status, step=outcome.step)
    return result_of(
        run,
        session.plan,
        status=outcome.status,
        peak_memory_bytes=outcome.peak_memory_bytes,
        peak_rss_bytes=peak_rss_bytes(),
    )


def _run_backend(
    session: Session, store: CheckpointStore, checkpoint: Checkpoint | None, record: Callable[..., None]
) -> TrainOutcome:
    from charkha.backends.torch.quiet import quiet_libraries

    quiet_libraries()  # before the libraries are imported: some of them speak while they load
    from charkha.backends.torch.trainer import train as train_with_torch

    flag = StopFlag()
    try:
        with stop_on_signals(flag):
            return train_with_torch(
                session.base,
                session.adapter,
                session.plan,
                train_shard=session.data.train,
                eval_shard=session.data.eval,
                fingerprint=session.data.fingerprint,
                pad_id=session.data.pad_id,
                store=store,
                resume_from=checkpoint,
                stop_wanted=flag.is_set,
                record=record,
                final_folder=store.staging / FINAL,
            )
    except KeyboardInterrupt:
        newest, _ = store.newest_verified()
        step = newest.step if newest else 0
        record("note", text=f"stopped at once; the run goes on from step {step}")
        return TrainOutcome("paused", step, 0, 0.0, None, 0, 0, ())
    except (TrainingFailed, DoesNotFit) as failure:
        with suppress(OSError):  # a full disk may not take this line either
            record("status", status="failed", reason=failure.message)
        raise


def _device_facts() -> DeviceFacts:
    from charkha.backends.torch.device import find_device

    device, name, bf16, capability = find_device()
    return DeviceFacts(device, name, bf16, capability)


def _resolved(loaded: LoadedConfig, base_folder: Path, choices: tuple[Choice, ...]) -> Config:
    """The config with absolute paths and every `auto` replaced, as it is frozen into the run folder."""
    config = loaded.config.model_dump(mode="json")
    if config["model"]["base"] != "starter":
        config["model"]["base"] = str(base_folder)
    config["data"]["train"] = [_absolute_source(source, loaded.folder) for source in config["data"]["train"]]
    held_out = config["data"]["eval"]
    if isinstance(held_out, str) and not held_out.rstrip().endswith("%"):
        config["data"]["eval"] = str((loaded.folder / held_out).resolve())
    config["output"] = str((loaded.folder / config["output"]).resolve())
    for choice in choices:
        section, key = choice.key.split(".")
        config[section][key] = choice.value
    return Config.model_validate(config)


def _absolute_source(source: Any, folder: Path) -> Any:
    if isinstance(source, dict):
        return {**source, "path": str((folder / source["path"]).resolve())}
    return str((folder / source).resolve())


def _require_same_run(session: Session) -> None:
    """Raises RunOfAnotherConfig naming every key (or the data) that differs from the run in the folder."""
    run = session.run
    before = load_config(run.config_path).config.model_dump(mode="json")
    now = session.resolved.model_dump(mode="json")
    differences = [
        f"{name}: {old!r} in the run, {new!r} now"
        for name, old, new in _differences(before, now)
        if name.partition(".")[0] not in _FREE_KEYS
    ]
    manifest = run.read_manifest()
    if manifest["data"]["fingerprint"] != session.data.fingerprint:
        differences.append("the training data, tokenizer or template changed")
    if manifest["base"]["fingerprint"] != base_fingerprint_of(session):
        differences.append("the base model's files changed")
    if differences:
        raise RunOfAnotherConfig(
            "this folder holds a run with other settings:\n  " + "\n  ".join(differences),
            where=str(run.path),
            remedy="put the old values back to go on with that run, or choose another `output`",
        )


def base_fingerprint_of(session: Session) -> str:
    """The identity of the base model's files, as recorded in manifest.json."""
    from charkha.training.provenance import base_fingerprint

    return base_fingerprint(session.base.path)


def _differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    found: list[tuple[str, Any, Any]] = []
    for key in sorted({*before, *now}):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append((prefix + key, old, new))
    return found


def _newest_checkpoint(store: CheckpointStore, session: Session, observe: Observer) -> Checkpoint | None:
    checkpoint, skipped = store.newest_verified()
    for bad in skipped:
        observe({"event": "note", "text": f"passed over {bad.path}: {bad.reason}"})
    if checkpoint is None and skipped:
        raise RunDamaged(
            "no checkpoint of this run can be used:\n  "
            + "\n  ".join(f"{bad.path.name}: {bad.reason}" for bad in skipped),
            where=str(session.run.path),
            remedy="copy the checkpoints back from a backup, or move the folder away to begin anew",
        )
    if checkpoint:
        observe({"event": "note", "text": f"goes on from step {checkpoint.step} of {session.plan.total_steps}"})
    else:
        observe({"event": "note", "text": "no checkpoint was reached before; begins at step 0"})
    return checkpoint


def _final_folder(session: Session) -> Path:
    """Where the trained weights are when the run is done; complete or absent."""
    return session.run.adapter if session.adapter.method != "full" else session.run.path / "model"


def _write_records(session: Session) -> None:
    """manifest.json first: a folder with charkha.yaml is a run, so that file comes last."""
    run, data = session.run, session.data
    run.write_json(
        run.manifest_path,
        {
            "created_unix_s": round(time.time()),
            "versions": package_versions(),
            "host": asdict(probe_host()),
            "device": session.base.device,
            "base": {
                "name": session.loaded.config.model.base,
                "path": str(session.base.path),
                "fingerprint": base_fingerprint_of(session),
                "parameters": session.parameters,
            },
            "data": data.record(),
            "choices": [asdict(choice) for choice in session.choices],
            "plan": asdict(session.plan),
            "packing_leak": session.packing_leak,
        },
    )
    run.write_json(run.path / "plan.json", session.memory.record())
    durable.write_durably(run.config_path, dump_config(session.resolved).encode())


def _finish(session: Session, staged: Path, outcome: TrainOutcome) -> None:
    """Tokenizer, template and model card beside the staged weights, what was counted into the manifest, then the name.

    Until the last line the run counts as unfinished, so a cut anywhere before only repeats this.
    """
    from charkha.training.outputs import write_companions

    run = session.run
    write_companions(staged, session.base.path, session.data, session.loaded.config)
    manifest = run.read_manifest()
    manifest["trained"] = {
        "trainable_parameters": outcome.trainable_parameters,
        "total_parameters": outcome.total_parameters,
        "quantized_modules": list(outcome.quantized_modules),
    }
    run.write_json(run.manifest_path, manifest)
    durable.sync_tree(staged)
    final = _final_folder(session)
    if final.exists():
        durable.remove_folder(final)
    durable.rename_durably(staged, final)


def reopen(run: RunFolder) -> tuple[Config, BaseModelSpec, PreparedData]:
    """Config, base and data of a run as they were frozen: what evaluation, chat and merge work on.

    Raises RunFolderError when the folder holds no run.
    """
    config = load_config(run.require().config_path).config
    base_folder = find_base(config.model, run.path)
    facts = _device_facts()
    dtype: Any = config.model.dtype
    attention = config.model.attention
    if facts.device != "cuda":
        dtype = "fp32" if dtype == "fp16" else dtype
        attention = "sdpa" if attention == "flash_attention_2" else attention
    base = BaseModelSpec(base_folder, dtype, attention, config.model.quantization, facts.device)
    return config, replace(base), open_prepared(run.read_manifest()["data"], run.data, base_folder)
