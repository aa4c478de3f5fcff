"""The streaming engine: a frozen base passes through a few fixed buffers of the device, one layer at a time.

Every layer but the hot ones has one slot that it always comes into, so weights are views that are set once. Whoever
reads a weight says so first (`require`): the layer's arrival is awaited, the layer before is released, and the next
ones in the direction of travel are sent for. In a training step layers are needed 0, 1, ... n, and backward n, ... 1,
0: what lies in the slots at a turn is used again, so a step moves (2 x cold - 2 x slots) layers.

    slots      2: one computes, one fills; more ride out a disk that stutters
    position   number of a layer among the cold ones; its slot is position modulo slots

A slot's `generation` changes when it is given another layer. Each use compares it with what it was when the layer was
entered: a layer sent for too early would otherwise train on with the wrong weights, with no error at all.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence

import torch

from charkha.backends.torch.expert_slots import POISON, ExpertSlots, overwritten, tensor_in
from charkha.backends.torch.slabs import Piece, Slab
from charkha.backends.torch.transfers import DiskToDevice, DiskToMemory, RamToDevice, Slot, Traffic, Transfer
from charkha.errors import EnvironmentProblem
from charkha.hardware.free_memory import free_host_bytes
from charkha.plan.streamed import RAM_LEFT_BYTES, hot_layers_of
from charkha.units import format_bytes

logger = logging.getLogger(__name__)
_ORDER_KEPT = 4096  # loads whose order is remembered, for people who look


class Engine:
    """Brings layers in time. Everything is called by the thread that computes, forward or backward."""

    def __init__(
        self,
        slab: Slab,
        transfer: Transfer,
        traffic: Traffic,
        *,
        slots: int,
        hot: Sequence[int],
        device: torch.device,
        poison: bool = False,
        expert_slots: int = 0,
    ) -> None:
        """`expert_slots` 0 is as many as fit in a gigabyte, at least two.

        `poison` overwrites a slot before it is filled anew, so that a late reader computes NaN. Slow.
        """
        self.slab = slab
        self.traffic = traffic
        self.transfer = transfer
        self._poison = poison
        layers = slab.layers
        self._hot = {number: torch.empty(layers[number].byte_count, dtype=torch.uint8, device=device) for number in hot}
        for number, buffer in self._hot.items():
            transfer.fill(number, buffer)
        self.cold = [number for number in range(len(layers)) if number not in self._hot]
        self._position = {number: position for position, number in enumerate(self.cold)}
        self.slots = [
            Slot(torch.empty(self._slot_bytes(turn, slots), dtype=torch.uint8, device=device))
            for turn in range(min(slots, len(self.cold)))
        ]
        self._current: int | None = None
        self._entered_generation = 0
        self._descending = False
        self.experts = (
            ExpertSlots(slab, transfer, traffic, slots=expert_slots, hot=hot, device=device, poison=poison)
            if any(slab.experts)
            else None
        )

    def _slot_bytes(self, turn: int, slots: int) -> int:
        return max(self.slab.layers[number].byte_count for number in self.cold[turn::slots])

    @property
    def buffers(self) -> list[torch.Tensor]:
        """All that the engine holds on the device: the slots, those of experts, and the layers that stay."""
        of_experts = self.experts.buffers if self.experts else []
        return [*(slot.buffer for slot in self.slots), *self._hot.values(), *of_experts]

    @property
    def device_bytes(self) -> int:
        """Bytes of all buffers."""
        return sum(int(buffer.numel()) for buffer in self.buffers)

    def view(self, layer: int, piece: Piece) -> torch.Tensor:
        """The piece as a tensor in the buffer that its layer always lies in."""
        buffer = self._hot[layer] if layer in self._hot else self._slot_of(layer).buffer
        return tensor_in(buffer, piece)

    def require(self, layer: int) -> None:
        """What is computed next may read this layer. Raises WeightsOverwritten when it was lost while in use."""
        if layer in self._hot:
            return
        if layer != self._current:
            self._enter(layer)
        self.require_intact()

    def require_intact(self) -> None:
        """Raises WeightsOverwritten when the layer in use no longer lies in its slot."""
        if self.experts is not None:
            self.experts.require_intact()
        if self._current is None:
            return
        slot = self._slot_of(self._current)
        if slot.layer != self._current or slot.generation != self._entered_generation:
            raise overwritten("layer", self._current, slot)

    def _enter(self, layer: int) -> None:
        self.require_intact()  # also covers readers that do not ask again, such as DoRA's norm of the weight
        position = self._position[layer]
        if self._current is not None:
            before = self._position[self._current]
            self._descending = position < before and position > 0
            self.transfer.release(self._slot_of(self._current))
        slot = self._slot_of(layer)
        if slot.layer != layer:
            self._send_for(position)
        self.transfer.wait(slot)
        self._current, self._entered_generation = layer, slot.generation
        for ahead in self._upcoming(position):
            if self._slot_at(ahead).layer != self.cold[ahead]:
                self._send_for(ahead)

    def _upcoming(self, position: int) -> list[int]:
        """Positions that are needed next and whose slots are free, nearest first: as many as there are other slots."""
        path = range(position - 1, -1, -1) if self._descending else range(position + 1, len(self.cold))
        ahead = list(path[: len(self.slots) - 1])
        if not ahead and not self._descending and not torch.is_grad_enabled():
            ahead = [0]  # no backward comes: the next pass begins at the first layer
        return [other for other in ahead if self._slot_at(other) is not self._slot_at(position)]

    def _send_for(self, position: int) -> None:
        slot, layer = self._slot_at(position), self.cold[position]
        if slot.filling is not None:  # sent for and never used: its thread must not write after the new one's
            self.transfer.wait(slot)
        slot.layer, slot.generation = layer, slot.generation + 1
        if self._poison:
            slot.buffer.fill_(POISON)
            self.transfer.release(slot)
        self.transfer.start(layer, slot)
        self.traffic.loads += 1
        self.traffic.bytes += self.slab.layers[layer].byte_count
        if len(self.traffic.load_order) < _ORDER_KEPT:
            self.traffic.load_order.append(layer)

    def _slot_at(self, position: int) -> Slot:
        return self.slots[position % len(self.slots)]

    def _slot_of(self, layer: int) -> Slot:
        return self._slot_at(self._position[layer])


def open_engine(
    slab: Slab, *, slots: int, hot_layers: int, tier: str, device: torch.device, expert_slots: int = 0
) -> Engine:
    """An engine over a slab on a CPU or CUDA device; `hot_layers` of its layers stay on the device.

    Raises EnvironmentProblem when nothing can be pinned.
    """
    traffic = Traffic()
    hot = hot_layers_of(len(slab.layers), hot_layers)
    poison = os.environ.get("CHARKHA_STREAMING_DEBUG") == "1"
    transfer = _transfer(slab, tier, device)(slab, traffic)
    return Engine(
        slab,
        transfer,
        traffic,
        slots=max(2, slots),
        hot=hot,
        device=device,
        poison=poison,
        expert_slots=expert_slots,
    )


def _transfer(slab: Slab, tier: str, device: torch.device) -> Callable[[Slab, Traffic], Transfer]:
    if device.type == "cpu":
        return DiskToMemory
    if device.type != "cuda":
        raise EnvironmentProblem(
            f"a base cannot be streamed to a device of type {device.type}", remedy="use model.placement resident"
        )
    if tier == "disk" or (tier == "auto" and not _fits_in_ram(slab)):
        return DiskToDevice
    return RamToDevice if tier == "ram" else _ram_or_disk


def _ram_or_disk(slab: Slab, traffic: Traffic) -> Transfer:
    try:
        return RamToDevice(slab, traffic)
    except EnvironmentProblem as problem:
        slower = "layers are read from the disk in every step, which is slower"
        logger.warning("%s; %s. To change that: %s", problem.message, slower, problem.remedy)
        return DiskToDevice(slab, traffic)


def _fits_in_ram(slab: Slab) -> bool:
    available = free_host_bytes()
    if slab.total_bytes + RAM_LEFT_BYTES <= available:
        return True
    logger.warning(
        "the base needs %s of host RAM and %s are available; layers are read from the disk in every step",
        format_bytes(slab.total_bytes),
        format_bytes(available),
    )
    return False
