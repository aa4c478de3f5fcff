"""Facts of GPUs that this machine may not have: memory, arithmetic, bandwidth and watts, from a dated table.

The table is gpus.csv beside this file. A file of the same form named in CHARKHA_GPUS adds cards or replaces rows.
"""

from __future__ import annotations

import csv
import difflib
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
    kind: str  # desktop | workstation | datacenter | laptop | amd | apple
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
    by_key = {_key(alias): gpu for gpu in reversed(catalog()) for alias in (gpu.name, *gpu.aliases)}
    memory = re.search(r"\b(\d+) ?gi?b\b", name, re.IGNORECASE)
    plain = name.replace(memory[0], "") if memory else name
    for wanted in (name, f"rtx {name}"):
        if _key(wanted) in by_key:
            return by_key[_key(wanted)]
    for wanted in (plain, f"rtx {plain}"):  # a name with its memory, which must then be right
        found = by_key.get(_key(wanted))
        if found and memory and _is_about(found.memory_bytes, int(memory[1]) * _GIB):
            return found
    raise UnknownGpu(
        f"{name!r} is not a GPU in the table",
        where="--gpu",
        remedy=f"nearest: {', '.join(nearest_names(name))}; or add a row to a CSV file named in CHARKHA_GPUS",
    )


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


def _is_about(memory_bytes: int, nominal_bytes: int) -> bool:
    return 0.9 < memory_bytes / nominal_bytes <= 1.02


def _read(path: Path) -> tuple[Gpu, ...]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(
            f"the table of GPUs cannot be read: {error.strerror}", where=str(path), remedy="correct CHARKHA_GPUS"
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
    capability = tuple(int(part) for part in row["capability"].split(".")) if row["capability"] != "0" else None
    share = APPLE_SHARE if row["kind"] == "apple" else 1.0
    return Gpu(
        name=row["name"],
        memory_bytes=int(float(row["memory_gib"]) * share * _GIB),
        bandwidth_bytes_per_s=float(row["gb_s"]) * 1e9,
        flops=float(row["tflops"]) * 1e12,
        power_w=float(row["power_w"]),
        capability=(capability[0], capability[1]) if capability else None,
        link_bytes_per_s=float(row["link_gb_s"]) * 1e9,
        pcie_bytes_per_s=float(row["pcie_gb_s"]) * 1e9,
        kind=row["kind"],
        aliases=tuple(alias.strip() for alias in (row["aliases"] or "").split(";") if alias.strip()),
    )
