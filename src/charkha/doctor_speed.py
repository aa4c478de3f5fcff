"""How fast bytes reach the GPUs and come from the disk: measured by `charkha doctor`, remembered for the next plan."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from charkha.caches import SLABS, own_cache
from charkha.doctor_checks import Check
from charkha.doctor_children import TRANSFERS, ChildFailed, ask_child, unanswered
from charkha.hardware.sensors import PcieLink
from charkha.hardware.speeds import Speeds, disk_read_bytes_per_s, speeds_file, speeds_record
from charkha.store import durable
from charkha.units import format_bytes

_CHILD_LIMIT_S = 60.0
_SMALLEST_FILE_BYTES = 64 << 20  # below it a disk's own memory is measured
_SLOW_READ_BYTES_PER_S = 500 << 20
_SHARE_OF_LINK = 0.5  # a copy from pinned memory reaches 0.8 of what the link's lanes carry


@dataclass
class Learned:
    """What the checks measured on their way."""

    host_to_device_bytes_per_s: float | None = None
    device_to_host_bytes_per_s: float | None = None
    disks: dict[Path, float] = field(default_factory=dict)  # a folder on the disk -> bytes per second read

    def remember(self, cards: Sequence[str]) -> None:
        """Writes what was measured where plans look for it. Raises OSError; nothing where nothing is remembered."""
        path = speeds_file()
        if path is None or not (self.disks or self.host_to_device_bytes_per_s):
            return
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            record = None  # none yet, or damaged: what was measured now is all that is known
        link = Speeds(self.host_to_device_bytes_per_s, self.device_to_host_bytes_per_s)
        record = speeds_record(record, cards, Path("/"), link)
        for folder, rate in self.disks.items():
            record = speeds_record(record, cards, folder, Speeds(disk_read_bytes_per_s=rate))
        durable.make_folder(path.parent)
        durable.write_durably(path, json.dumps(record, indent=1).encode())


def check_transfers(
    links: Sequence[PcieLink], learned: Learned, program: Sequence[str] = TRANSFERS, limit_s: float = _CHILD_LIMIT_S
) -> list[Check]:
    """Copies between pinned memory and every card, and from card to card; `links` are those the driver tells."""
    if not links:
        return [Check("gpu transfer", "no NVIDIA GPU: nothing is copied to one", "ok")]
    try:
        told = ask_child(program, limit_s)
    except ChildFailed as failure:
        return [unanswered("gpu transfer", "torch", failure, "see the line `cuda`; a streamed base needs these copies")]
    if not told["cards"]:
        return [Check("gpu transfer", "torch sees no GPU to copy to", "unknown", "see the line `cuda`")]
    return [_transfer_check(links, told["cards"], learned), *_pair_checks(told["pairs"])]


def _transfer_check(links: Sequence[PcieLink], cards: Sequence[dict[str, float]], learned: Learned) -> Check:
    slowest = min(card["to_device"] for card in cards)
    learned.host_to_device_bytes_per_s = slowest
    learned.device_to_host_bytes_per_s = min(card["to_host"] for card in cards)
    each = (f"{_rate(card['to_device'])} to the card, {_rate(card['to_host'])} back" for card in cards)
    fact = "; ".join(each) + " (pinned memory)"
    possible = min((link.most_bytes_per_s for link in links if link.most_bytes_per_s), default=None)
    if possible is not None and slowest < _SHARE_OF_LINK * possible:
        fact += f", of {_rate(possible)} that the slowest link could carry"
        remedy = "close what else uses the link, try another slot or riser, and the host's memory channels: all filled?"
        return Check("gpu transfer", fact, "warn", remedy)
    return Check("gpu transfer", fact, "ok")


def _pair_checks(pairs: Sequence[dict[str, float]]) -> list[Check]:
    """One line for all pairs of cards; none for one card."""
    if not pairs:
        return []
    direct = sum(bool(pair["direct"]) for pair in pairs)
    slowest = min(pair["bytes_per_s"] for pair in pairs)
    fact = f"{direct} of {len(pairs)} pairs copy directly; the slowest copies {_rate(slowest)}"
    if direct == len(pairs):
        return [Check("gpu to gpu", fact, "ok")]
    remedy = "usual for GeForce cards without NVLink: copies pass through host memory; DDP suits them, shards less"
    return [Check("gpu to gpu", fact, "ok" if slowest > 8e9 else "warn", None if slowest > 8e9 else remedy)]


def check_base_disk(base: Path | None, learned: Learned) -> Check:
    """How fast the disk gives weights: of a slab, else of the base's own files, read past the page cache."""
    path = _weights(base)
    if path is None:
        return Check("weights disk", "no slab and no base model of 64 MiB here to be read", "ok")
    rate = disk_read_bytes_per_s(path)
    if rate is None:
        return Check("weights disk", f"{path} cannot be measured", "unknown")
    learned.disks[path.parent] = rate
    fact = f"{path.parent}: {_rate(rate)} read in sequence"
    if rate < _SLOW_READ_BYTES_PER_S:
        remedy = "a base streamed from here would wait for it: keep it on an NVMe disk (CHARKHA_CACHE), or in RAM"
        return Check("weights disk", fact, "warn", remedy)
    return Check("weights disk", fact, "ok")


def _weights(base: Path | None) -> Path | None:
    slabs = own_cache().glob(SLABS)
    for paths in (slabs, base.glob("*.safetensors") if base else ()):
        largest = max(paths, key=lambda path: path.stat().st_size, default=None)
        if largest is not None and largest.stat().st_size >= _SMALLEST_FILE_BYTES:
            return largest
    return None


def _rate(bytes_per_s: float) -> str:
    return f"{format_bytes(bytes_per_s)}/s"
