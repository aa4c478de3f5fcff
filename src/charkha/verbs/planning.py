"""`charkha plan`: what a run will need and take, on this machine or another, before anything is loaded.

The closed form answers at once and for any number of devices. A trace of the real step, where a backend has one, is the
authority for a single device: `traced_peak` is the one place where it is asked.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any, Literal

from charkha.config import Config
from charkha.config_file import LoadedConfig, load_config
from charkha.errors import DataError, EnvironmentProblem, UsageError
from charkha.hardware.machine import Machine, machine_of, machine_record, this_machine
from charkha.plan.architecture import Architecture, read_architecture
from charkha.plan.base_checks import check_base_config
from charkha.plan.cost import BuyOrRent, buy_or_rent, run_cost
from charkha.plan.device_memory import DeviceMemory, disk_bytes, host_memory_bytes
from charkha.plan.memory_settings import MemorySettings
from charkha.plan.popular_models import popular_config
from charkha.plan.rows import Rows
from charkha.plan.search import Candidate, evaluate, fallbacks, machines_that_fit, propose
from charkha.store.durable import write_durably
from charkha.training.base_model import find_base
from charkha.training.choices import Chooser, steps_of_an_epoch
from charkha.training.planned_settings import ModelChoices, choose_model, device_facts, planned_settings
from charkha.training.sources import sources_of
from charkha.units import format_bytes
from charkha.verbs.planned_time import corrected_by_history, planned_time, scaled, with_time
from charkha.verbs.planned_trace import Traced, traced_peak

_NO_CONFIG = "put the model's config.json there"
PlanMethod = Literal["trace", "closed_form"]


@dataclass(frozen=True)
class PlanWish:
    """What the command line asks beside the config."""

    config: Path
    overrides: tuple[str, ...] = ()
    gpus: tuple[str, ...] = ()
    method: PlanMethod = "trace"
    buy_or_rent: bool = False
    hours_per_day: float = 8.0
    write_machine: Path | None = None
    probe: bool = False


@dataclass(frozen=True)
class _Base:
    config: dict[str, Any]
    folder: Path | None  # None where only the shape is known
    where: str


def make_plan(wish: PlanWish) -> dict[str, Any]:
    """The JSON contract of `charkha plan`; `exit_code` 3 is in it where the run does not fit.

    Raises ConfigError, UsageError (an unknown GPU, a base that cannot be planned for) and DataError.
    """
    loaded = load_config(wish.config, list(wish.overrides), to_plan=True)
    if wish.probe:
        from charkha.verbs.planned_probe import require_probe  # which imports NumPy, as no other plan needs

        require_probe(loaded, wish.gpus)
    machine = machine_of(wish.gpus) if wish.gpus else this_machine(loaded.folder)
    if wish.write_machine is not None:
        write_durably(wish.write_machine, json.dumps(machine_record(machine), indent=1).encode())
    base = _find_shape(loaded)
    architecture = _architecture(base)
    chooser = Chooser(loaded.config, device_facts(machine))
    model = choose_model(loaded.config, chooser, machine, base.config, architecture.parameters)
    max_length = chooser.max_length(architecture.max_positions)
    rows, has_eval, notes = _rows(loaded, base, max_length, chooser, model, machine)
    planned = planned_settings(loaded.config, chooser, model, architecture, machine, rows)
    if rows.count is not None:
        chooser.eval_steps(steps_of_an_epoch(loaded.config, rows.count), has_eval)
    found = evaluate(architecture, planned.settings, machine)
    traced = Traced("the closed form was asked for")
    if wish.method == "trace":
        traced = traced_peak(planned.settings, loaded.config, base.config, machine)
    record = _record(loaded.config, architecture, machine, rows, found, None if traced.why_not else traced)
    record["choices"] = [asdict(choice) for choice in chooser.choices]
    record["reasons"] = [*(str(choice) for choice in chooser.choices), *planned.reasons, *notes]
    record["reasons"] += [f"method: closed_form ({traced.why_not})", *found.preview.notes] if traced.why_not else []
    ratio = corrected_by_history(record, loaded.config, architecture, planned.settings, machine)
    if wish.probe:
        ratio *= _probe(record, wish, loaded.config, architecture, planned.settings, machine)
    record["reasons"] += _verdicts(record, found, machine)
    alternatives = _alternatives(loaded.config, architecture, machine, rows, found, record["fits"])
    record["alternatives"] = scaled(alternatives, ratio)
    if wish.buy_or_rent:
        answer = _buy_or_rent(loaded.config, machine, wish.hours_per_day)
        record["buy_or_rent"] = None if answer is None else asdict(answer)
        record["reasons"] += [] if answer is None else _price_words(answer)
    if wish.write_machine is not None and machine.here and machine.disk_read_bytes_per_s is None:
        record["reasons"].append(
            "machine file: `charkha doctor` measures the speed of its disk and links; not known yet"
        )
    if not record["fits"]:
        record["exit_code"] = 3
    return record


def _probe(
    record: dict[str, Any],
    wish: PlanWish,
    config: Config,
    architecture: Architecture,
    settings: MemorySettings,
    machine: Machine,
) -> float:
    """Has what real steps on this device show take the place of what was predicted; by how much time changed."""
    from charkha.verbs.planned_probe import PROBE_P90, with_probe

    before = record["tokens_per_second"]
    measured = with_probe(record, wish.config, wish.overrides, architecture, settings, machine)
    if measured is None:
        return 1.0
    with_time(record, config, machine, measured.seconds, measured.seconds * PROBE_P90, measured.tokens_per_second)
    corrected = ("seconds", "seconds_p90", "tokens_per_second", "peak_allocated_bytes", "peak_reserved_bytes")
    record["probe"]["corrected"] = {name: record[name] for name in corrected}
    return float(before) / measured.tokens_per_second


def _find_shape(loaded: LoadedConfig) -> _Base:
    """config.json of the base: in its folder, in the hub's cache, or from the table of popular models."""
    try:
        folder = find_base(loaded.config.model, loaded.folder)
    except EnvironmentProblem as problem:
        known = popular_config(loaded.config.model.base)
        if known is None:
            raise UsageError(
                f"the base model {loaded.config.model.base} is not here and not in the table of popular models",
                where=problem.where or "model.base",
                remedy=f"{problem.remedy}; a folder with nothing but its config.json is enough for a plan",
            ) from None
        return _Base(known, None, f"{loaded.config.model.base} (table of popular models)")
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"cannot be read: {error}", where=str(path), remedy="put the model's config.json there"
        ) from None
    if not isinstance(config, dict):
        raise UsageError("is not a JSON object", where=str(path), remedy=_NO_CONFIG)
    return _Base(config, folder, str(path))


def _architecture(base: _Base) -> Architecture:
    """Refusals name the key or the reason, with exit code 2: nothing is wrong with this machine."""
    text_model = {key: value for key, value in base.config.items() if key != "vision_config"}
    try:
        if (
            base.config.get("model_type") != "gpt_oss"
        ):  # its published files are in MXFP4; a plan counts them in 16 bits
            check_base_config(text_model, base.where)
        return read_architecture(base.config)
    except EnvironmentProblem as problem:
        raise UsageError(problem.message, where=base.where, remedy=problem.remedy) from None
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UsageError(
            f"cannot be understood: {type(error).__name__} {error}",
            where=base.where,
            remedy="compare it with the config.json that the model's authors publish",
        ) from None


def _rows(
    loaded: LoadedConfig, base: _Base, max_length: int, chooser: Chooser, model: ModelChoices, machine: Machine
) -> tuple[Rows, bool, list[str]]:
    """(rows, whether any are held out, notes): lengths as they will be trained where the tokenizer is here.

    Else every row is taken as long as max_length.
    """
    from charkha.data.formats import read_rows

    files, missing = _files(loaded)
    if missing is None and base.folder is not None and (base.folder / "tokenizer.json").exists():
        return _tokenized(loaded, base.folder, max_length, chooser, model, machine)
    if missing is None:
        notes = [f"no tokenizer beside the base model: every row is counted as max_length, {max_length} tokens"]
        mapping = dict(loaded.config.data.map)
        count: int | None = sum(len(read_rows(path, mapping=mapping).rows) for path in files)
    else:
        count, notes = None, [f"{missing}, so the number of rows is not known: no hours, energy and money"]
    packed = loaded.config.data.packing is True
    return Rows(max_length, float(max_length), count, packed=packed), bool(loaded.config.data.eval), notes


def _files(loaded: LoadedConfig) -> tuple[list[Path], str | None]:
    """The training files, or why they cannot be read."""
    try:
        files = [source.path for source in sources_of(loaded.config, loaded.folder)]
    except (DataError, EnvironmentProblem) as problem:
        return [], f"{problem.where or loaded.folder}: {problem.message}"
    return files, next((f"{path} is not here" for path in files if not path.is_file()), None)


def _tokenized(
    loaded: LoadedConfig, folder: Path, max_length: int, chooser: Chooser, model: ModelChoices, machine: Machine
) -> tuple[Rows, bool, list[str]]:
    from charkha.training.packing_choice import choose_packing
    from charkha.training.preparing import prepare_data
    from charkha.training.row_facts import rows_of

    config = loaded.config
    if config.data.personal == "block":  # for training to refuse; what would be trained is counted all the same
        data = config.data.model_copy(update={"personal": "report"})
        loaded = replace(loaded, config=config.model_copy(update={"data": data}))
    with tempfile.TemporaryDirectory(prefix="charkha-plan-") as scratch:
        prepared = prepare_data(loaded, folder, Path(scratch), max_length, None)
        packing = choose_packing(config, chooser, prepared.train.lengths, max_length, model, machine.device)
        size = config.training.micro_batch_size
        rows = rows_of(prepared.train, packing, config.training.batch_size, None if size == "auto" else size)
        rows = replace(rows, lengths=prepared.train.lengths.copy(), fingerprint=prepared.fingerprint)
    return rows, prepared.eval is not None, []


def _record(
    config: Config,
    architecture: Architecture,
    machine: Machine,
    rows: Rows,
    found: Candidate,
    traced: Traced | None,
) -> dict[str, Any]:
    settings, memory = found.settings, found.memory
    allocated = traced.allocated_bytes if traced else memory.allocated
    reserved = memory.reserved
    if traced:  # of rows of one length; what varying ones leave behind is the closed form's to say
        outgrown = memory.fragmentation if settings.lengths_vary and settings.device == "cuda" else 0
        reserved = max(traced.reserved_bytes, allocated + outgrown)
    tokens = int(rows.mean * (rows.count or 0))
    host = host_memory_bytes(architecture, settings, tokens) + (allocated if settings.device == "cpu" else 0)
    disk = disk_bytes(architecture, settings, dataset_tokens=tokens, checkpoints_kept=config.checkpoint.keep)
    seconds, rate = planned_time(config, architecture, machine, rows, found)
    record = {
        "fits": _fits(found, machine, allocated, host, disk),
        "method": "trace" if traced else "closed_form",
        "machine": machine.name,
        "devices": settings.processes,
        "peak_allocated_bytes": allocated,
        "peak_reserved_bytes": reserved,
        "peak_device_bytes": reserved + memory.context,
        "least_device_bytes": _least(found, allocated),
        "device_limit_bytes": found.limit_bytes or None,
        "breakdown": dict(traced.breakdown or {}) if traced else found.preview.breakdown,
        "peak_moment": traced.peak_moment if traced else found.preview.peak_moment,
        "moments": found.preview.moments,
        "trainable_parameters": found.preview.trainable_parameters,
        "total_parameters": architecture.parameters,
        "active_parameters": architecture.active_parameters,
        "host_ram_bytes": host,
        "disk_bytes": disk,
        "settings": _settings_record(settings),
        "fallbacks": list(fallbacks(settings)),
    }
    with_time(record, config, machine, seconds, None, rate)
    return record


def _least(found: Candidate, allocated: int) -> int:
    """The smallest card that would do: the closed form's, by as much more or less as the trace finds alive."""
    return found.memory.least + allocated - found.memory.allocated


def _fits(found: Candidate, machine: Machine, allocated: int, host: int, disk: int) -> bool:
    least = _least(found, allocated)
    device = least <= found.limit_bytes if machine.gpu or found.limit_bytes else True
    ram = machine.ram_bytes is None or host <= machine.ram_bytes
    return device and ram and (machine.disk_free_bytes is None or disk <= machine.disk_free_bytes)


def _settings_record(settings: MemorySettings) -> dict[str, Any]:
    return asdict(settings) | {"offload": sorted(settings.offload)}


def _verdicts(record: dict[str, Any], found: Candidate, machine: Machine) -> list[str]:
    """What does not fit, by how much; and host memory beside the usual rule where it is known."""
    said = []
    if found.settings.lengths_vary and machine.device == "cuda":
        outgrown = format_bytes(found.memory.fragmentation)
        said.append(f"reserved counts {outgrown} of blocks that longer rows outgrow; they are given back when needed")
    least, limit = record["least_device_bytes"], found.limit_bytes
    if limit and least > limit:
        said.append(f"does not fit: {format_bytes(least)} is the least, {machine.name} has {format_bytes(limit)} each")
    if machine.ram_bytes is not None and record["host_ram_bytes"] > machine.ram_bytes:
        said.append(f"host memory: {format_bytes(record['host_ram_bytes'])} of {format_bytes(machine.ram_bytes)}")
    if machine.disk_free_bytes is not None and record["disk_bytes"] > machine.disk_free_bytes:
        said.append(f"disk: {format_bytes(record['disk_bytes'])} of {format_bytes(machine.disk_free_bytes)} free")
    return said


def _alternatives(
    config: Config, architecture: Architecture, machine: Machine, rows: Rows, found: Candidate, fits: bool
) -> list[dict[str, Any]]:
    made = [
        {
            "name": proposal.name,
            "changes": proposal.changes,
            "reason": proposal.reason,
            "fits": True,
            **_short(config, architecture, machine, rows, proposal.candidate),
        }
        for proposal in propose(architecture, found.settings, machine)
    ]
    if not fits:
        machines = machines_that_fit(architecture, found.settings)
        made.append(
            {
                "name": "other_machines",
                "machines": [{"count": count, "gpu": gpu} for count, gpu in machines],
                "fits": bool(machines),
                "reason": "the smallest cards that would hold it; several hold shards, one row at a time",
            }
        )
    return made


def _short(
    config: Config, architecture: Architecture, machine: Machine, rows: Rows, candidate: Candidate
) -> dict[str, Any]:
    seconds, rate = planned_time(config, architecture, machine, rows, candidate)
    seconds = seconds if candidate.settings.tokens == rows.longest else None
    cost = run_cost(
        machine,
        seconds or 0.0,
        currency=config.cost.currency,
        electricity_per_kwh=config.cost.electricity_per_kwh,
    )
    memory: DeviceMemory = candidate.memory
    return {
        "peak_allocated_bytes": memory.allocated,
        "peak_reserved_bytes": memory.reserved,
        "tokens_per_second": round(rate, 1),
        "seconds": None if seconds is None else round(seconds, 1),
        "energy_kwh": None if seconds is None else round(cost.energy_kwh, 3),
        "electricity": None if seconds is None else round(cost.electricity, 2),
    }


def _buy_or_rent(config: Config, machine: Machine, hours_per_day: float) -> BuyOrRent | None:
    return buy_or_rent(
        machine,
        currency=config.cost.currency,
        electricity_per_kwh=config.cost.electricity_per_kwh,
        hours_per_day=hours_per_day,
    )


def _price_words(answer: BuyOrRent) -> list[str]:
    """How old the two prices are, where they are from, and whether anybody checked them."""
    today = date.today()
    return [
        f"price of {answer.gpu}: {answer.price_origin.words(today)} (your own: CHARKHA_CARD_PRICES)",
        f"offer of {answer.rental_provider}: {answer.rental_origin.words(today)} (your own: CHARKHA_RENTALS)",
    ]
