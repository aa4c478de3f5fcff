"""A machine by the names of its cards, or described in a file that another computer may have written."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from charkha.errors import UsageError
from charkha.hardware.catalog import KINDS, Gpu, UnknownGpu, find_gpu
from charkha.hardware.machine import Machine

_FORM = 'write {"gpus": ["RTX 4090"], "ram_bytes": 68719476736}; `charkha plan --write-machine FILE` makes one'
_COUNTED = re.compile(
    r"(?P<before>\d{1,2}) ?[x×*] ?(?P<name>.+)|(?P<first>.+?) ?[x×*] ?(?P<after>\d{1,2})", re.IGNORECASE
)
_SMALLEST_MEMORY = 64 << 20  # below it somebody wrote gigabytes for bytes
_SIZES = ("memory_bytes", "ram_bytes")
_RATES = ("bandwidth_bytes_per_s", "flops", "power_w", "link_bytes_per_s", "pcie_bytes_per_s")
_CARD_KEYS = frozenset({"name", "memory_bytes", "capability", "kind", *_RATES})
_NUMBERS = (
    "ram_bytes", "disk_free_bytes", "cpu_flops", "host_to_device_bytes_per_s", "disk_read_bytes_per_s",
)  # fmt: skip
_KEYS = frozenset({"name", "gpus", "cpu_bf16", *_NUMBERS})


def machine_of(names: Sequence[str]) -> Machine:
    """The machine that `--gpu` describes: one card for each time it is given (or `2 x NAME`), or one machine file.

    Raises UnknownGpu for a name in no table and UsageError for a file that is not of the form, or cards that stand in
    no machine together.
    """
    paths = [Path(name).expanduser() for name in names if name.lower().endswith(".json")]
    if paths and len(names) > 1:
        raise UsageError(
            "a machine file describes a whole machine; it cannot stand beside other cards",
            where="--gpu",
            remedy="give the file alone, or the names of the cards",
        )
    if paths:
        return read_machine(paths[0])
    gpus = tuple(gpu for name in names for gpu in _cards(name))
    _require_one_make(gpus, "--gpu")
    counted = {gpu.name: sum(other.name == gpu.name for other in gpus) for gpu in gpus}
    return Machine(
        " + ".join(f"{count} x {name}" if count > 1 else name for name, count in counted.items()), gpus, None
    )


def _cards(name: str) -> list[Gpu]:
    """One card, or as many as a count before or behind the name says."""
    try:
        return [find_gpu(name)]
    except UnknownGpu:
        counted = _COUNTED.fullmatch(name.strip())
        count = int(counted["before"] or counted["after"]) if counted else 0
        if counted is None or not count:
            raise
        return [find_gpu(counted["name"] or counted["first"])] * count


def _require_one_make(gpus: Sequence[Gpu], where: str) -> None:
    """Raises UsageError for cards that one torch cannot use together."""
    makes = {gpu.kind if gpu.kind in ("apple", "amd") else "NVIDIA" for gpu in gpus}
    if len(makes) > 1 or (makes == {"apple"} and len(gpus) > 1):
        names = " and ".join(dict.fromkeys(gpu.name for gpu in gpus))
        what = (
            "an Apple computer has one GPU" if "apple" in makes else "NVIDIA's and AMD's cards need different torches"
        )
        raise UsageError(
            f"no run trains on {len(gpus)} of {names} together: {what}", where=where, remedy="plan for each by itself"
        )


def read_machine(path: Path) -> Machine:
    """The machine in a JSON file: `{"gpus": ["RTX 4090", {"name": ..., "memory_bytes": ...}], "ram_bytes": ...}`."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"the machine file cannot be read: {error}", where=str(path), remedy=_FORM) from None
    if not isinstance(record, dict) or not isinstance(record.get("gpus"), list):
        raise UsageError("the machine file has no list `gpus`", where=str(path), remedy=_FORM)
    _require_known(record, _KEYS, path)
    gpus = tuple(_gpu_of(entry, path) for entry in record["gpus"])
    _require_one_make(gpus, str(path))
    if not isinstance(record.get("cpu_bf16", False), bool):
        raise UsageError(f"cpu_bf16 is {record['cpu_bf16']!r}, not true or false", where=str(path), remedy=_FORM)
    numbers = {key: _number(record, key, path) for key in _NUMBERS}
    known = {key: value for key, value in numbers.items() if value is not None}
    return Machine(
        name=str(record.get("name") or path.stem),
        gpus=gpus,
        **{"ram_bytes": None, **known},
        cpu_bf16=record.get("cpu_bf16", False),
    )


def machine_record(machine: Machine) -> dict[str, Any]:
    """What `read_machine` reads back: all that a plan asks of a machine, but for what other programs hold just now."""
    cards = [{key: value for key, value in asdict(gpu).items() if key in _CARD_KEYS} for gpu in machine.gpus]
    numbers = {key: getattr(machine, key) for key in _NUMBERS}
    return {"name": machine.name, "gpus": cards, "cpu_bf16": machine.cpu_bf16, **numbers}


def _gpu_of(entry: Any, path: Path) -> Gpu:
    """A card by its name alone, with figures of its own, or, where no table has it, by all of its figures."""
    if isinstance(entry, str):
        return find_gpu(entry)
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise UsageError(f"{entry!r} is not a card", where=str(path), remedy=_FORM)
    _require_known(entry, _CARD_KEYS, path)
    told: dict[str, Any] = {
        key: value for key in ("memory_bytes", *_RATES) if (value := _number(entry, key, path)) is not None
    }
    if "capability" in entry:
        told["capability"] = _capability(entry["capability"], path)
    if "kind" in entry:
        told["kind"] = _kind(entry["kind"], path)
    if told.keys() >= _CARD_KEYS - {"name"}:
        return Gpu(entry["name"], **told)
    return replace(find_gpu(entry["name"]), **told)


def _require_known(record: Mapping[str, Any], keys: frozenset[str], path: Path) -> None:
    """A misspelt key would leave a figure out without a word."""
    unknown = [key for key in record if key not in keys]
    if unknown:
        raise UsageError(
            f"{unknown[0]!r} is no key of a machine file",
            where=str(path),
            remedy=f"known are {', '.join(sorted(keys))}",
        )


def _capability(value: Any, path: Path) -> tuple[int, int] | None:
    if value is None:
        return None
    if isinstance(value, list) and len(value) == 2 and all(type(part) is int and part >= 0 for part in value):
        return value[0], value[1]
    raise UsageError(f"capability is {value!r}, not of the form [8, 9]", where=str(path), remedy=_FORM)


def _kind(value: Any, path: Path) -> str:
    if value in KINDS:
        return str(value)
    raise UsageError(f"kind is {value!r}, none of {', '.join(KINDS)}", where=str(path), remedy=_FORM)


def _number(record: Mapping[str, Any], key: str, path: Path) -> Any:
    """The positive number under `key`, whole where it counts bytes; None where it is absent or null."""
    value = record.get(key)
    if value is None:
        return None
    whole = key in (*_SIZES, "disk_free_bytes")
    kinds = (int,) if whole else (int, float)
    least = -1 if key == "disk_free_bytes" else 0  # a disk may be full
    if isinstance(value, bool) or not isinstance(value, kinds) or not least < value < math.inf:
        form = "a positive whole number" if whole else "a number above 0"
        raise UsageError(f"{key} is {value!r}, not {form}", where=str(path), remedy=_FORM)
    if key in _SIZES and value < _SMALLEST_MEMORY:
        remedy = f"it counts bytes: {value} GiB are {int(value) << 30}"
        raise UsageError(f"{key} is {value}, less than any computer has", where=str(path), remedy=remedy)
    return value
