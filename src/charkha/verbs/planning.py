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

from charkha.carried_out import CARRIED_OUT
from charkha.config import Config
from charkha.config_file import LoadedConfig, load_config
from charkha.errors import DataError, EnvironmentProblem, UsageError
from charkha.hardware.machine import Machine, this_machine
from charkha.hardware.machine_file import machine_of, machine_record
from charkha.plan.adapter_names import require_names
from charkha.plan.architecture import Architecture
from charkha.plan.cost import BuyOrRent, buy_or_rent, run_cost
from charkha.plan.device_memory import DeviceMemory
from charkha.plan.held_out_memory import full_batch
from charkha.plan.memory_settings import MemorySettings
from charkha.plan.rows import Rows
from charkha.plan.search import Candidate, evaluate, machines_that_fit, propose
from charkha.store.durable import write_durably
from charkha.training.choices import Chooser, steps_of_an_epoch
from charkha.training.plan_history import corrected_by_history, scaled
from charkha.training.plan_record import plan_record, run_seconds, tokens_per_second, verdicts, with_time
from charkha.training.planned_settings import (
    ModelChoices,
    PlannedSettings,
    choose_model,
    device_facts,
    planned_settings,
)
from charkha.training.planned_trace import Traced, traced_peak
from charkha.training.sources import Source, sources_of
from charkha.verbs.planned_base import BaseShape, architecture_of, find_shape

_STEP_KEYS = tuple(
    f"training.{name}" for name in ("micro_batch_size", "gradient_checkpointing", "loss_head", "optimizer")
)
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


def make_plan(wish: PlanWish) -> dict[str, Any]:
    """The JSON contract of `charkha plan`; `exit_code` 3 is in it where the run does not fit.

    Raises ConfigError, UsageError (an unknown GPU, a base that cannot be planned for) and DataError.
    """
    loaded = load_config(wish.config, list(wish.overrides), to_plan=True)
    if wish.probe:
        from charkha.verbs.planned_probe import require_probe  # which imports NumPy, as no other plan needs

        require_probe(loaded, wish.gpus)
    machine = machine_of(wish.gpus) if wish.gpus else this_machine(loaded.folder / loaded.config.output)
    if wish.write_machine is not None:
        _write_machine(machine, wish.write_machine)
    base = find_shape(loaded)
    architecture = architecture_of(base)
    require_names(loaded.config.adapter, architecture)
    chooser = Chooser(loaded.config, device_facts(machine))
    model = choose_model(loaded.config, chooser, machine, base.config, architecture.parameters)
    max_length = chooser.max_length(architecture.max_positions)
    data = _data(loaded, base, max_length, chooser, model, machine)
    rows = data.rows
    used = machine.used_by(model.processes)
    planned = planned_settings(loaded.config, chooser, model, architecture, used, rows)
    if rows.count is not None:
        chooser.eval_steps(steps_of_an_epoch(loaded.config, rows.count), data.has_eval)
    found = evaluate(architecture, planned.settings, used)
    traced = Traced("the closed form was asked for")
    if wish.method == "trace":
        traced = traced_peak(found, loaded.config, base.config, machine)
    record = plan_record(loaded.config, architecture, used, rows, found, traced)
    record["choices"] = [asdict(choice) for choice in chooser.choices]
    said = [*(str(choice) for choice in chooser.choices), *planned.reasons, *data.notes]
    record["reasons"] = [*said, *record["reasons"]]
    ratio = corrected_by_history(record, loaded.config, architecture, planned.settings, used)
    if wish.probe:
        ratio *= _probe(record, wish, loaded.config, architecture, planned.settings, used)
    record["reasons"] += [*verdicts(record, found, used), *_tariff_note(loaded)]
    alternatives = _alternatives(loaded.config, architecture, machine, rows, found, planned, fits=record["fits"])
    alternatives += _packing(loaded.config, model, architecture, used, data)
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


def _tariff_note(loaded: LoadedConfig) -> list[str]:
    """Said where a default that is meant in rupees was taken as other money."""
    cost = loaded.config.cost
    if "cost.electricity_per_kwh" in loaded.keys_set or cost.currency in ("INR", "USD"):
        return []
    return [
        f"cost.electricity_per_kwh: {cost.electricity_per_kwh:g} is a tariff in rupees: give yours in {cost.currency}"
    ]


def _write_machine(machine: Machine, path: Path) -> None:
    try:
        write_durably(path, json.dumps(machine_record(machine), indent=1).encode())
    except OSError as error:
        raise UsageError(
            f"the machine file cannot be written: {error.strerror or error}",
            where=str(path),
            remedy="name a file in a folder that exists and that you may write to",
        ) from None


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
    # Free memory may be another when the child looks at it, and what is tried is what was planned.
    chosen = [f"{one['key']}={json.dumps(one['value'])}" for one in record["choices"] if one["key"] in _STEP_KEYS]
    measured = with_probe(record, wish.config, (*wish.overrides, *chosen), architecture, settings, machine)
    if measured is None:
        return 1.0
    with_time(record, config, machine, measured.seconds, measured.seconds * PROBE_P90, measured.tokens_per_second)
    corrected = ("seconds", "seconds_p90", "tokens_per_second", "peak_allocated_bytes", "peak_reserved_bytes")
    record["probe"]["corrected"] = {name: record[name] for name in corrected}
    return float(before) / measured.tokens_per_second


@dataclass(frozen=True)
class _Data:
    """What is known of the rows; `other` are the same packed, or the same unpacked, where that could be chosen too."""

    rows: Rows
    has_eval: bool
    notes: tuple[str, ...] = ()
    other: Rows | None = None


def _data(
    loaded: LoadedConfig, base: BaseShape, max_length: int, chooser: Chooser, model: ModelChoices, machine: Machine
) -> _Data:
    """Lengths as they will be trained where the tokenizer is here; else every row is taken as long as max_length."""
    sources, missing = _sources(loaded)
    packed, wished = loaded.config.data.packing is True, bool(loaded.config.data.eval)
    if missing is not None:
        note = f"{missing}, so the number of rows is not known: no hours, energy and money"
        return _Data(Rows(max_length, float(max_length), None, packed=packed), wished, (note,))
    if base.folder is not None and (base.folder / "tokenizer.json").exists():
        return _tokenized(loaded, base.folder, max_length, chooser, model, machine)
    from charkha.training.counted_rows import count_rows

    counted = count_rows(loaded.config, sources)
    note = f"no tokenizer beside the base model: every row is counted as max_length, {max_length} tokens"
    notes = [note]
    if counted.leaves_none:
        notes.append(
            f"data.eval {loaded.config.data.eval} leaves no row to train on, which training refuses: all are counted"
        )
    held_out = (full_batch(max_length),) if counted.held_out > 0 else ()
    rows = Rows(max_length, float(max_length), counted.train, packed=packed, held_out=held_out)
    return _Data(rows, counted.held_out > 0, tuple(notes))


def _sources(loaded: LoadedConfig) -> tuple[list[Source], str | None]:
    """The training files, and which of them cannot be read, and why; None where all are here."""
    try:
        sources = sources_of(loaded.config, loaded.folder)
    except (DataError, EnvironmentProblem) as problem:
        return [], f"{problem.where or loaded.folder}: {problem.message}"
    return sources, next((f"{source.path} is not here" for source in sources if not source.path.is_file()), None)


def _tokenized(
    loaded: LoadedConfig, folder: Path, max_length: int, chooser: Chooser, model: ModelChoices, machine: Machine
) -> _Data:
    from charkha.training.packing_choice import choose_packing, packing_option
    from charkha.training.preparing import prepare_data
    from charkha.training.row_facts import rows_of

    config = loaded.config
    if config.data.personal == "block":  # for training to refuse; what would be trained is counted all the same
        data = config.data.model_copy(update={"personal": "report"})
        loaded = replace(loaded, config=config.model_copy(update={"data": data}))
    with tempfile.TemporaryDirectory(prefix="charkha-plan-") as scratch:
        prepared = prepare_data(loaded, folder, Path(scratch), max_length, None)
        lengths = prepared.train.lengths
        packing = choose_packing(config, chooser, lengths, max_length, model, machine.device)
        option = None if packing else packing_option(config, lengths, max_length, model)
        other = rows_of(prepared, option, config, model) if packing or option else None
        return _Data(rows_of(prepared, packing, config, model), prepared.eval is not None, other=other)


def _alternatives(
    config: Config,
    architecture: Architecture,
    machine: Machine,
    rows: Rows,
    found: Candidate,
    planned: PlannedSettings,
    *,
    fits: bool,
) -> list[dict[str, Any]]:
    stored = planned.is_stored_quantized
    made = [
        {
            "name": proposal.name,
            "changes": proposal.changes,
            "reason": proposal.reason + _if_shards(proposal.candidate.settings.strategy),
            "fits": True,
            **_short(config, architecture, machine, rows, proposal.candidate),
        }
        for proposal in propose(architecture, found.settings, machine, rows, is_stored_quantized=stored)
    ]
    if not fits:
        machines = machines_that_fit(architecture, found.settings)
        several = "the smallest cards that would hold it; several hold shards, one row at a time"
        made.append(
            {
                "name": "other_machines",
                "machines": [{"count": count, "gpu": gpu} for count, gpu in machines],
                "fits": bool(machines),
                "reason": several + _if_shards("fsdp"),
            }
        )
    return made


def _if_shards(strategy: str) -> str:
    """Said of a way to share out the work that training refuses."""
    works = strategy in CARRIED_OUT["devices.strategy"]
    return "" if works else f"; `charkha train` of this version does not carry out {strategy}"


def _packing(
    config: Config, model: ModelChoices, architecture: Architecture, machine: Machine, data: _Data
) -> list[dict[str, Any]]:
    """The same epochs with rows packed, or not: what padding costs. Nothing where steps are counted, not epochs."""
    other = data.other
    if other is None or other.count is None or config.training.max_steps is not None:
        return []
    chooser = Chooser(config, device_facts(machine))
    planned = planned_settings(config, chooser, model, architecture, machine, other)
    candidate = evaluate(architecture, planned.settings, machine)
    steps = [rows.steps(config.training.batch_size) for rows in (data.rows, other)]
    how = f"{other.count} rows of up to {other.longest} tokens"
    return [
        {
            "name": "packing" if other.packed else "no_packing",
            "changes": {"data.packing": other.packed},
            "reason": f"{how}: {steps[1]} optimizer steps an epoch in the place of {steps[0]}",
            "fits": candidate.fits,
            **_short(config, architecture, machine, other, candidate),
        }
    ]


def _short(
    config: Config, architecture: Architecture, machine: Machine, rows: Rows, candidate: Candidate
) -> dict[str, Any]:
    seconds = (
        run_seconds(config, architecture, machine, rows, candidate)
        if candidate.settings.tokens == rows.longest
        else None
    )
    cost = run_cost(
        machine,
        seconds or 0.0,
        currency=config.cost.currency,
        electricity_per_kwh=config.cost.electricity_per_kwh,
        machines=1 + len(config.devices.hosts),
    )
    memory: DeviceMemory = candidate.memory
    return {
        "peak_allocated_bytes": memory.allocated,
        "peak_reserved_bytes": memory.reserved,
        "tokens_per_second": round(tokens_per_second(config, architecture, machine, rows, candidate), 1),
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
