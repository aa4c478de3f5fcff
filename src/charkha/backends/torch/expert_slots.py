"""Experts of a streamed base pass through buffers of their own, each expert apart, and only those that tokens go to.

Which experts a micro batch needs is known when the router has chosen. Whoever computes them says which one, and which
come after it (`use`); any expert may lie in any slot, and the one that was used longest ago makes room. A layer's
experts are used in ascending order forward and again in the layer's second run, and then in descending order backward:
with as many slots as a layer has experts, the backward pass brings none.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from charkha.backends.torch.slabs import Piece, Slab
from charkha.backends.torch.tensor_files import torch_dtype_of
from charkha.backends.torch.transfers import Slot, Traffic, Transfer
from charkha.errors import TrainingFailed

POISON = 0xFF  # NaN in every float type; in packed weights numbers that nothing was trained beside
_USUAL_BYTES = 1 << 30  # of all slots together, where their number is not asked for


class WeightsOverwritten(TrainingFailed):
    """A slot was given another layer or expert while its own was in use: a bug. The newest checkpoint is good."""

    kind = "weights_overwritten"


def overwritten(what: str, wanted: int, slot: Slot) -> WeightsOverwritten:
    """The error for a slot that should hold `wanted`."""
    return WeightsOverwritten(
        f"{what} {slot.layer} was brought into the slot of {what} {wanted} while that was in use",
        where="the streaming engine",
        remedy="run the same command again: it goes on from the newest checkpoint, which is good; please report this",
    )


class ExpertSlots:
    """Brings experts in time. Everything is called by the thread that computes, forward or backward."""

    def __init__(
        self,
        slab: Slab,
        transfer: Transfer,
        traffic: Traffic,
        *,
        slots: int,
        hot: Sequence[int],
        device: torch.device,
        poison: bool,
    ) -> None:
        """`hot` are layers whose experts stay on the device; `slots` 0 is as many as `_USUAL_BYTES` hold."""
        self._slab, self._transfer, self._traffic, self._poison = slab, transfer, traffic, poison
        held = [unit for layer in hot for unit in slab.expert_units(layer)]
        self._hot = {unit: torch.empty(slab.units[unit].byte_count, dtype=torch.uint8, device=device) for unit in held}
        for unit, buffer in self._hot.items():
            transfer.fill(unit, buffer)
        cold = [layer for layer in range(len(slab.layers)) if layer not in set(hot)]
        sizes = [slab.units[unit].byte_count for layer in cold for unit in slab.expert_units(layer)]
        most = max((len(slab.expert_units(layer)) for layer in cold), default=0)
        count = min(most, max(2, slots or _USUAL_BYTES // max(sizes, default=1)))
        self._slots = [Slot(torch.empty(max(sizes), dtype=torch.uint8, device=device)) for _ in range(count)]
        self._turn = 0
        self._last_use = [0] * count
        self._current: Slot | None = None
        self._entered = (-1, 0)  # unit and generation of the slot in use

    @property
    def buffers(self) -> list[torch.Tensor]:
        """The slots, and the experts of layers that stay."""
        return [*self._hot.values(), *(slot.buffer for slot in self._slots)]

    @property
    def slot_count(self) -> int:
        return len(self._slots)

    def use(self, unit: int, upcoming: Sequence[int]) -> torch.Tensor:
        """The bytes of an expert, which what is computed next may read; `upcoming` are sent for as slots are free."""
        if unit in self._hot:
            return self._hot[unit]
        self.require_intact()
        slot = self._slot_of(unit)
        if self._current is not None and self._current is not slot:
            self._transfer.release(self._current)
            self._current = None
        ahead = [other for other in upcoming if other not in self._hot][: len(self._slots) - 1]
        if slot is None:
            slot = self._send_for(unit, {unit, *ahead})
        self._transfer.wait(slot)
        self._turn += 1
        self._last_use[self._slots.index(slot)] = self._turn
        self._current, self._entered = slot, (unit, slot.generation)
        for other in ahead:
            if self._slot_of(other) is None:
                self._send_for(other, {unit, *ahead})
        return slot.buffer

    def require_intact(self) -> None:
        """Raises WeightsOverwritten when the expert in use no longer lies in its slot."""
        slot = self._current
        if slot is not None and (slot.layer, slot.generation) != self._entered:
            raise overwritten("expert", self._entered[0], slot)

    def _slot_of(self, unit: int) -> Slot | None:
        return next((slot for slot in self._slots if slot.layer == unit), None)

    def _send_for(self, unit: int, kept: set[int]) -> Slot:
        free = [number for number, slot in enumerate(self._slots) if slot.layer not in kept]
        number = min(free, key=lambda number: self._last_use[number])
        slot = self._slots[number]
        if slot.filling is not None:  # sent for and never used: its thread must not write after the new one's
            self._transfer.wait(slot)
        slot.layer, slot.generation = unit, slot.generation + 1
        if self._poison:
            slot.buffer.fill_(POISON)
            self._transfer.release(slot)
        self._transfer.start(unit, slot)
        self._last_use[number] = self._turn  # or the next to be sent for would take the same slot
        self._traffic.loads += 1
        self._traffic.bytes += self._slab.units[unit].byte_count
        return slot


def tensor_in(buffer: torch.Tensor, piece: Piece) -> torch.Tensor:
    """The piece as a tensor in a buffer that holds its unit."""
    flat = buffer[piece.offset : piece.offset + piece.byte_count]
    return flat.view(torch_dtype_of(piece.dtype)).view(piece.shape)
