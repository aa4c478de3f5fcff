"""From the config to all that is decided before the first step; and a run's own record of it, opened again.

Everything that can be refused is refused here, before the base model is loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from charkha.backends.base import AdapterSpec, BaseModelSpec, StepPlan
from charkha.backends.torch.base_config import read_base_config
from charkha.backends.trackers import require_trackers
from charkha.config import Config
from charkha.config_file import LoadedConfig, load_config
from charkha.data.hub_names import parse_hub_name
from charkha.errors import CharkhaError
from charkha.hardware.machine import Machine
from charkha.plan.architecture import Architecture, read_architecture
from charkha.plan.memory_settings import MemorySettings
from charkha.plan.rows import Rows
from charkha.store.runs import RunFolder
from charkha.training.base_model import find_base
from charkha.training.choices import (
    Choice,
    Chooser,
    adapter_spec,
    step_plan,
    steps_of_an_epoch,
    unused_adapter_keys,
)
from charkha.training.dataset import PreparedData, open_prepared
from charkha.training.fallback import apply_fallbacks, fallbacks_note
from charkha.training.fitting import fit_note, require_memory
from charkha.training.machine import training_machine
from charkha.training.packing_choice import choose_packing, packing_note
from charkha.training.placing import streaming_of, unplanned_streaming, written_streaming
from charkha.training.planned_settings import choose_model, chosen_step, fixed_values_note, planned_settings
from charkha.training.preparing import prepare_data
from charkha.training.preview import Preview, preview, without_figures
from charkha.training.provenance import base_facts
from charkha.training.row_facts import rows_of

Observer = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Planned:
    """What the plan's closed form is asked about."""

    architecture: Architecture
    settings: MemorySettings
    machine: Machine
    rows: Rows


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
    device_name: str
    processes: int
    packing_leak: str | None = None  # what the loaded model showed when `auto` had packed its rows
    planned: Planned | None = None  # None where the planner does not know the base's shapes


def open_session(
    loaded: LoadedConfig,
    run: RunFolder,
    observe: Observer,
    *,
    proved_leak: str | None = None,
    ignore_plan: bool = False,
) -> Session:
    """Prepares data and decides every `auto`; writes only below `run`. The caller holds the run's lock.

    Raises DoesNotFit for a new run that its plan says does not fit, unless `ignore_plan`.
    """
    from charkha.backends.torch.skeleton import attention_kernels, build_skeleton, require_fit
    from charkha.backends.torch.streamed_model import why_refused

    config = loaded.config
    require_trackers(config.report_to)
    base_folder = find_base(config.model, loaded.folder)
    base_config, about_base = read_base_config(base_folder), base_facts(base_folder)
    here = training_machine(loaded.folder)
    chooser = Chooser(config, here.facts)
    architecture, unknown = _architecture(base_config)
    skeleton = build_skeleton(base_folder)
    parameters = architecture.parameters if architecture else about_base.parameters
    model = choose_model(config, chooser, here.machine, base_config, parameters, attention_kernels(skeleton))
    machine = here.machine.used_by(model.processes)
    base = BaseModelSpec(base_folder, model.dtype, model.attention, model.quantization, here.facts.device)
    adapter = adapter_spec(config)
    refusal = why_refused(skeleton, base, adapter, model.processes)
    if refusal is not None and config.model.placement == "streamed":
        raise refusal
    model = replace(model, cannot_stream=None if refusal is None else refusal.message)
    require_fit(skeleton, base, adapter)
    max_length = chooser.max_length(architecture.max_positions if architecture else about_base.positions)
    manifest = run.read_manifest() if run.exists else {}
    data = prepare_data(
        loaded,
        base_folder,
        run.data,
        max_length,
        manifest.get("data"),
        lambda text: observe({"event": "note", "text": text}),
    )
    proved_leak = proved_leak or manifest.get("packing_leak")
    packing = choose_packing(config, chooser, data.train.lengths, max_length, model, here.facts.device, proved_leak)
    reasons: tuple[str, ...] = ()
    rows = rows_of(data, packing, config, model)
    about: Planned | None = None
    if architecture is None:
        chooser.simple_defaults()
        step = chosen_step(config, chooser, model, rows, parameters, about_base.vocabulary)
        base = replace(base, streaming=unplanned_streaming(config, chooser))
        memory, reasons = without_figures(step, unknown), (fixed_values_note(unknown),)
    else:
        planned = planned_settings(config, chooser, model, architecture, machine, rows)
        step, short = planned.step, fit_note(architecture, planned, machine)
        base = replace(base, streaming=streaming_of(architecture, planned.settings, machine))
        reasons = (*planned.reasons, *([short] if short else []))
        memory = preview(config, chooser, architecture, machine, rows, planned, base_config)
        if not run.exists and not ignore_plan:
            require_memory(config, architecture, machine, rows, planned)
        about = Planned(architecture, planned.settings, machine, rows)
    eval_steps = chooser.eval_steps(steps_of_an_epoch(config, rows.count or 0), data.eval is not None)
    plan = step_plan(config, step, rows=rows.count or 0, eval_steps=eval_steps, packing=packing)
    plan = apply_fallbacks(plan, run) if run.exists else plan
    for text in (
        *unused_adapter_keys(config, loaded.keys_set),
        *data.notes,
        *(f"chose {choice}" for choice in chooser.choices),
        *reasons,
        *([packing_note(packing, plan.batch_size)] if packing else ()),
        memory.sentence(),
        *fallbacks_note(run),
    ):
        observe({"event": "note", "text": text})
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
        here.device_name,
        model.processes,
        proved_leak,
        about,
    )


def with_frozen_choices(loaded: LoadedConfig, run: RunFolder, *, only: frozenset[str] | None = None) -> LoadedConfig:
    """The config with every `auto` as it was decided when the run began: a newer library, or a machine with less free
    memory, may decide otherwise. `only` these keys, where it is given.

    Not the strategy, which follows from the number of processes.
    """
    wish = loaded.config.model_dump(mode="json")
    frozen = load_config(run.config_path).config.model_dump(mode="json")
    for section, keys in wish.items():
        for key in keys if isinstance(keys, dict) else ():
            wanted = key != "strategy" and (only is None or f"{section}.{key}" in only)
            if keys[key] == "auto" and isinstance(frozen.get(section), dict) and wanted:
                keys[key] = frozen[section].get(key, "auto")
    return replace(loaded, config=Config.model_validate(wish))


def _architecture(base_config: dict[str, Any]) -> tuple[Architecture | None, str]:
    """The base's shapes; None with the reason where the planner does not know them, which stops no training."""
    try:
        return read_architecture(base_config), ""
    except CharkhaError as error:
        return None, error.message
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        return None, f"config.json cannot be understood: {type(error).__name__} {error}"


def _resolved(loaded: LoadedConfig, base_folder: Path, choices: tuple[Choice, ...]) -> Config:
    """The config with absolute paths and every `auto` replaced, as it is frozen into the run folder."""
    config = loaded.config.model_dump(mode="json")
    if config["model"]["base"] != "starter":
        config["model"]["base"] = str(base_folder)
    config["data"]["train"] = [_absolute_source(source, loaded.folder) for source in config["data"]["train"]]
    held_out = config["data"]["eval"]
    if isinstance(held_out, str) and not held_out.rstrip().endswith("%"):
        config["data"]["eval"] = _absolute(held_out, loaded.folder)
    template = config["data"]["template"]
    if (loaded.folder / Path(template).expanduser()).is_file():
        config["data"]["template"] = _absolute(template, loaded.folder)
    config["output"] = str((loaded.folder / config["output"]).resolve())
    for choice in choices:
        section, key = choice.key.split(".")
        config[section][key] = choice.value
    return Config.model_validate(config)


def _absolute_source(source: Any, folder: Path) -> Any:
    if isinstance(source, dict):
        return {**source, "path": _absolute(source["path"], folder)}
    return _absolute(source, folder)


def _absolute(path: str, folder: Path) -> str:
    if parse_hub_name(path) is not None:
        return path
    return str((folder / Path(path).expanduser()).resolve())


def reopen(run: RunFolder) -> tuple[Config, BaseModelSpec, PreparedData]:
    """Config, base and data of a run as they were frozen: what evaluation, chat and merge work on.

    Raises RunFolderError when the folder holds no run.
    """
    config = load_config(run.require().config_path).config
    base_folder = find_base(config.model, run.path)
    from charkha.backends.torch.device import find_device

    device = find_device()[0]
    dtype: Any = config.model.dtype
    attention = config.model.attention
    if device != "cuda":
        dtype = "fp32" if dtype == "fp16" else dtype
        attention = "sdpa" if attention == "flash_attention_2" else attention
    base = BaseModelSpec(base_folder, dtype, attention, config.model.quantization, device, written_streaming(config))
    return config, base, open_prepared(run.read_manifest()["data"], run.data, base_folder)
