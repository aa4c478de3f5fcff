"""One run from config to trained adapter: the composition root of `charkha train`.

Order of work: read the config, find the base, prepare the data, decide every `auto`, open the run folder, go on from
the newest verified checkpoint, train, keep what came out. Everything that can be refused is refused before the base
model is loaded.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from charkha.backends.base import TrainOutcome
from charkha.backends.trackers import open_trackers, require_trackers
from charkha.config_file import dump_config, load_config
from charkha.errors import DoesNotFit, EnvironmentProblem, RunOfAnotherConfig, TrainingFailed
from charkha.hardware.probe import peak_rss_bytes
from charkha.hardware.sensors import DeviceSensors, Nvml
from charkha.plan.packing_support import PackingLeaks
from charkha.store import durable
from charkha.store.checkpoints import Checkpoint, CheckpointStore
from charkha.store.control import Control
from charkha.store.runs import RunFolder
from charkha.training.continuing import (
    accepted_record,
    base_fingerprint_of,
    newest_checkpoint,
    require_same_run,
    surroundings,
)
from charkha.training.guarding import RunGuard
from charkha.training.launch import RankWork, other_ranks
from charkha.training.opening import Observer, Session, open_session, with_frozen_choices
from charkha.training.remembering import remember_run
from charkha.training.results import TrainResult, energy_kwh_of, result_of
from charkha.training.signals import StopFlag, stop_on_signals
from charkha.training.steering import RunSteering

PLAN = "plan.json"
FINAL = "final"  # under staging/
PERSONAL_REPORT = "personal_data.md"  # in the run's data folder, where anything was found
_TELL_S = 5.0
_STATE_KEYS = frozenset({"training.optimizer"})  # another one could not use the state that was saved


def train(
    config_path: Path,
    overrides: list[str],
    observe: Observer,
    *,
    accept_changes: bool = False,
    keep_wish: bool = False,
    ignore_plan: bool = False,
) -> TrainResult:
    """Trains, or goes on with, the run that the config describes. `observe` gets every event as it is recorded.

    `accept_changes` goes on under other library versions, another machine, or settings that the saved state fits.
    `keep_wish` leaves a pause or stop standing that was asked for while nothing trained: a restart must not forget it.
    `ignore_plan` begins a run that its plan says does not fit.
    Raises the errors of errors.py; a stop asked for by a signal is a result with status `paused`, not an error.
    """
    loaded, observe = load_config(config_path, overrides), _told_if_anyone_listens(observe)
    run = RunFolder((loaded.folder / loaded.config.output).resolve())
    with run.lock():
        if not keep_wish:
            Control(run.path).set_wish("run")  # whoever starts the run wants it to go on
        if run.exists:
            loaded = with_frozen_choices(loaded, run, only=_STATE_KEYS if accept_changes else None)
        there = _data_files(run) if run.exists else None
        session = open_session(loaded, run, observe, ignore_plan=ignore_plan)
        try:
            return _train_locked(session, observe, accept_changes)
        except RunOfAnotherConfig:
            for path in _data_files(run) - there if there is not None else ():
                path.unlink(missing_ok=True)  # of data that this run does not train, and may have been told to mask
            raise
        except PackingLeaks as error:
            if loaded.config.data.packing != "auto" or any((run.path / "checkpoints").glob("step-*")):
                raise
            leak = error.message  # the text alone: the error holds the loaded model
        run.config_path.unlink()  # nothing was trained: the folder holds no run until it is planned again
        session = open_session(loaded, run, observe, proved_leak=leak, ignore_plan=ignore_plan)
        return _train_locked(session, observe, accept_changes)


def _data_files(run: RunFolder) -> frozenset[Path]:
    return frozenset(path for path in run.data.glob("*") if path.is_file())


def _told_if_anyone_listens(observe: Observer) -> Observer:
    """A terminal that was closed, or a pipe whose reader left, is no reason to lose a step."""

    def tell(event: dict[str, Any]) -> None:
        with suppress(OSError):
            observe(event)

    return tell


def _train_locked(session: Session, observe: Observer, accept_changes: bool) -> TrainResult:
    run = session.run
    store = CheckpointStore(run.path, anchor=run.config_path)
    started_before = run.exists
    store.clear()  # before any checkpoint is chosen: a save that was cut short may have to be put back
    accepted = require_same_run(session, accept_changes=accept_changes) if started_before else []
    checkpoint = newest_checkpoint(store, session, observe) if started_before else None
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
    elif accepted:
        step = checkpoint.step if checkpoint else 0
        run.write_json(run.manifest_path, accepted_record(run.read_manifest(), accepted, step, session))
        run.write_json(run.path / PLAN, session.memory.record)
        durable.write_durably(run.config_path, dump_config(session.resolved).encode())

    trackers = open_trackers(require_trackers(session.resolved.report_to), run.path, session.resolved)

    sensors = _sensors(session.base.device, session.processes)
    one_at_a_time = threading.Lock()  # the guard records from a thread of its own

    def record(name: str, **fields: Any) -> None:
        if name == "step":
            fields |= asdict(sensors.feel())
            guard.saw_step(fields["tokens_per_second"])
        if name == "checkpoint":
            guard.saw_save(fields["seconds"])
        with one_at_a_time:
            event = run.append(name, **fields)
            if name in ("checkpoint", "status", "resume", "guard"):
                run.sync_events()
            trackers(event)
            observe(event)

    guard = RunGuard(
        session.resolved,
        record,
        gpu_indices=lambda nvml: _gpu_indices(nvml, session.processes),
        run_folder=run.path,
        energy_kwh_before=energy_kwh_of(run.events()) or 0,
    )

    if started_before:
        record(
            "resume", from_step=checkpoint.step if checkpoint else 0, path=str(checkpoint.path) if checkpoint else None
        )
    for change in accepted:
        record("note", text=f"accepted: {change}")
    record("status", status="running")
    steering = RunSteering(StopFlag(), Control(run.path), guard.order)
    try:
        guard.start()
        outcome = _run_backend(session, store, checkpoint, steering, record)
    finally:
        guard.close()
        trackers.close()
    if outcome.status == "done":
        _finish(session, store.staging / FINAL, outcome)
        problem = remember_run(session, run.events(), outcome.peak_memory_bytes)
        if problem:
            record("note", text=problem)
    reason = {"reason": steering.stop_reason} if outcome.status == "paused" and steering.stop_reason else {}
    record("status", status=outcome.status, step=outcome.step, **reason)
    return result_of(
        run,
        session.plan,
        status=outcome.status,
        peak_memory_bytes=outcome.peak_memory_bytes,
        peak_rss_bytes=peak_rss_bytes(),
    )


def _run_backend(
    session: Session,
    store: CheckpointStore,
    checkpoint: Checkpoint | None,
    steering: RunSteering,
    record: Callable[..., None],
) -> TrainOutcome:
    from charkha.backends.torch.quiet import quiet_libraries

    quiet_libraries()  # before the libraries are imported: some of them speak while they load
    from charkha.backends.torch.trainer import train as train_with_torch

    def give_up(loss: TrainingFailed) -> None:
        """This process waits for one that is gone, in a library that nothing interrupts."""
        telling = threading.Thread(
            target=record, args=("status",), kwargs={"status": "failed", "reason": loss.message, "kind": loss.kind}
        )
        telling.start()
        telling.join(_TELL_S)  # a tracker may not answer either
        os._exit(loss.exit_code)

    work = _rank_work(session, checkpoint)
    try:
        with stop_on_signals(steering.flag), other_ranks(work, session.processes, give_up) as place:
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
                steering=steering,
                record=record,
                final_folder=store.staging / FINAL,
                place=place,
            )
    except KeyboardInterrupt:
        newest, _ = store.newest_verified()
        step = newest.step if newest else 0
        record("note", text=f"stopped at once; the run goes on from step {step}")
        return TrainOutcome("paused", step, 0, 0.0, None, 0, 0, ())
    except (TrainingFailed, DoesNotFit, EnvironmentProblem) as failure:
        record("status", status="failed", reason=failure.message, kind=failure.kind)
        raise


def _rank_work(session: Session, checkpoint: Checkpoint | None) -> RankWork:
    return RankWork(
        base=session.base,
        adapter=session.adapter,
        plan=session.plan,
        train_shard=session.data.train.path,
        eval_shard=None if session.data.eval is None else session.data.eval.path,
        fingerprint=session.data.fingerprint,
        pad_id=session.data.pad_id,
        run=session.run.path,
        resume_from=None if checkpoint is None else checkpoint.path,
    )


def _gpu_indices(nvml: Nvml, processes: int) -> list[int]:
    from charkha.backends.torch.device import gpu_uuids

    found = [nvml.index_of(uuid) for uuid in gpu_uuids()[:processes]]
    return [index for index in found if index is not None]


def _sensors(device: str, processes: int) -> DeviceSensors:
    from charkha.backends.torch.device import gpu_uuids

    return DeviceSensors(device, gpu_uuids()[:processes] if device == "cuda" else [])


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
            **surroundings(session),
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
    run.write_json(run.path / PLAN, session.memory.record)
    if data.personal_report is not None:
        report = data.personal_report.encode("utf-8", "backslashreplace")
        durable.write_durably(run.data / PERSONAL_REPORT, report)
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
