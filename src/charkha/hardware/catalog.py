"""Facts of GPUs that this machine may not have: memory, arithmetic, bandwidth and watts, from a dated table.

The table is gpus.csv beside this file. A file of the same form named in CHARKHA_GPUS adds cards or replaces rows.
"""

from __future__ import annotations

import csv
import difflib
import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from charkha.errors import UsageError

TABLE = Path(__file__).with_name("gpus.csv")
AS_OF = "2026-11"
_GIB = 2**30
KINDS = ("desktop", "workstation", "datacenter", "laptop", "amd", "apple")
_MAKERS = re.compile(
    r"nvidia|geforce|quadro(?!rtx)|tesla|amd|instinct|radeon|apple|corporation|gpu|graphics|generation|(server|workstation)edition"
)
# Metal lets one process use about three quarters of unified memory (recommendedMaxWorkingSetSize on 64 GB and more).
APPLE_SHARE = 0.75


class UnknownGpu(UsageError):
    """A name that is in no table."""

    kind = "unknown_gpu"


@dataclass(frozen=True)
class Gpu:
    """One card. `memory_bytes` is what a training process can have; rates are peaks, not what is reached."""

    name: str
    memory_bytes: int
    bandwidth_bytes_per_s: float
    flops: float  # dense 16-bit matrix products with 32-bit sums, per second
    power_w: float
    capability: tuple[int, int] | None  # CUDA compute capability
    link_bytes_per_s: float  # to a neighbour card, one direction
    pcie_bytes_per_s: float  # to the host's memory, one direction
    kind: str  # one of KINDS
    aliases: tuple[str, ...] = ()

    @property
    def backend(self) -> str:
        """The device name of torch: cuda (AMD's too) or mps."""
        return "mps" if self.kind == "apple" else "cuda"

    @property
    def has_bf16(self) -> bool:
        """Whether it has units for bf16; Ampere (8.0) is the first of NVIDIA's."""
        return self.capability is None or self.capability >= (8, 0)


def find_gpu(name: str) -> Gpu:
    """The card of that name; case, spaces, hyphens and the maker's name do not matter.

    Raises UnknownGpu naming the nearest ones.
    """
    by_key = _by_key(catalog())
    memory = re.search(r"\b(\d+) ?gi?b\b", name, re.IGNORECASE)
    plain = name.replace(memory[0], "") if memory else name
    for wanted in (name, f"rtx {name}"):
        if _key(wanted) in by_key:
            return by_key[_key(wanted)]
    for wanted in (plain, f"rtx {plain}"):  # a name with its memory, which must then be right
        found = by_key.get(_key(wanted))
        if found and memory and is_about(found.memory_bytes, int(memory[1]) * _GIB):
            return found
    raise UnknownGpu(
        f"{name!r} is not a GPU in the table",
        where="--gpu",
        remedy=f"nearest: {', '.join(nearest_names(name))}; or add a row to a CSV file named in CHARKHA_GPUS",
    )


@cache
def _by_key(cards: tuple[Gpu, ...]) -> dict[str, Gpu]:
    """Cards by every name of theirs, the first of a name before later ones."""
    return {_key(alias): gpu for gpu in reversed(cards) for alias in (gpu.name, *gpu.aliases)}


def nearest_names(name: str, count: int = 4) -> list[str]:
    """Names of the table that look most like `name`."""
    keys = {_key(alias): gpu.name for gpu in catalog() for alias in (gpu.name, *gpu.aliases)}
    close = difflib.get_close_matches(_key(name), keys, n=3 * count, cutoff=0.3)
    return list(dict.fromkeys(keys[key] for key in close))[:count] or [gpu.name for gpu in catalog()][:count]


@cache
def catalog() -> tuple[Gpu, ...]:
    """Every card: the user's rows first, then those of the table that they do not replace."""
    own = os.environ.get("CHARKHA_GPUS")
    ours = _read(TABLE)
    if not own:
        return ours
    theirs = _read(Path(own).expanduser())
    replaced = {_key(gpu.name) for gpu in theirs}
    return (*theirs, *(gpu for gpu in ours if _key(gpu.name) not in replaced))


def _key(name: str) -> str:
    plain = re.sub(r"[\s_\-()/.]+", "", name.lower())
    return _MAKERS.sub("", plain) or plain


def is_about(memory_bytes: int, nominal_bytes: int) -> bool:
    """Whether a card of so much usable memory can be one that is sold, or reported, as having `nominal_bytes`."""
    return 0.9 < memory_bytes / nominal_bytes <= 1.02


def _read(path: Path) -> tuple[Gpu, ...]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(
            f"the table of GPUs cannot be read: {error.strerror}", where=str(path), remedy="correct CHARKHA_GPUS"
        ) from None
    except UnicodeDecodeError as error:
        raise UsageError(
            f"the table of GPUs is not UTF-8 at byte {error.start}", where=str(path), remedy="correct CHARKHA_GPUS"
        ) from None
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return tuple(_gpus(csv.DictReader(lines), path))


def _gpus(rows: Iterable[dict[str, str]], path: Path) -> Iterable[Gpu]:
    for row in rows:
        try:
            yield _gpu(row)
        except (KeyError, ValueError, TypeError) as error:
            raise UsageError(
                f"row {row.get('name')!r} is not of the form of the table: {error}",
                where=str(path),
                remedy=f"columns and units are described at the head of {TABLE}",
            ) from None


def _gpu(row: dict[str, str]) -> Gpu:
    kind = row["kind"]
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}, none of {', '.join(KINDS)}")
    share = APPLE_SHARE if kind == "apple" else 1.0
    return Gpu(
        name=row["name"],
        memory_bytes=int(_above_zero(row, "memory_gib") * share * _GIB),
        bandwidth_bytes_per_s=_above_zero(row, "gb_s") * 1e9,
        flops=_above_zero(row, "tflops") * 1e12,
        power_w=_above_zero(row, "power_w"),
        capability=_capability(row["capability"]),
        link_bytes_per_s=_above_zero(row, "link_gb_s") * 1e9,
        pcie_bytes_per_s=_above_zero(row, "pcie_gb_s") * 1e9,
        kind=kind,
        aliases=tuple(alias.strip() for alias in (row["aliases"] or "").split(";") if alias.strip()),
    )


def _above_zero(row: dict[str, str], column: str) -> float:
    value = float(row[column])
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{column} is {row[column]!r}, not a number above 0")
    return value


def _capability(text: str | None) -> tuple[int, int] | None:
    """`8.9` as two numbers; `0` is a card without CUDA."""
    if text == "0":
        return None
    found = re.fullmatch(r"(\d+)\.(\d+)", text or "")
    if found is None:
        raise ValueError(f"capability is {text!r}, not of the form 8.9")
    return int(found[1]), int(found[2])
