"""The GPU power limit that the guard found, kept in the run folder while a lower one is set.

A card keeps its limit until the machine restarts. A process that is killed puts nothing back; the next one that opens
the run does, and does not take the lowered limit for the owner's wish.
"""

from __future__ import annotations

import json
from pathlib import Path

from charkha.store import durable

FILE = "power-limit-{gpu}.json"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class FoundLimit:
    """The limit of one GPU as it was before the guard of this run lowered it."""

    def __init__(self, run_folder: Path, gpu_uuid: str | None) -> None:
        self._path = run_folder / FILE.format(gpu=gpu_uuid or "unknown")
        self._gpu = gpu_uuid

    def keep(self, watts: float) -> None:
        """Writes it down; called before the first lower limit is set. Raises OSError where the folder takes nothing."""
        record = {"gpu": self._gpu, "boot": _boot(), "power_limit_w": watts}
        durable.write_durably(self._path, json.dumps(record).encode())

    def left(self) -> float | None:
        """What a process that was killed did not put back, in watts; None where there is nothing."""
        try:
            record = json.loads(self._path.read_bytes())
            watts = float(record["power_limit_w"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        # After a restart the card has its default again, and whatever stands there now is the owner's.
        return watts if record.get("gpu") == self._gpu and record.get("boot") == _boot() else None

    def forget(self) -> None:
        """The card has its limit back."""
        durable.remove_file(self._path)


def _boot() -> str | None:
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return None
