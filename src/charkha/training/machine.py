"""This computer as training will use it: the cards that torch sees, in its order, with what NVML says of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from charkha.hardware.catalog import APPLE_SHARE, UnknownGpu, find_gpu
from charkha.hardware.machine import UNKNOWN_BYTES, Machine, this_machine
from charkha.training.choices import DeviceFacts
from charkha.training.planned_settings import device_facts


@dataclass(frozen=True)
class TrainingMachine:
    """The machine for the planner, and the same for the rules of choices.py."""

    machine: Machine
    facts: DeviceFacts
    device_name: str  # as torch calls it; the manifest keeps it


def training_machine(folder: Path) -> TrainingMachine:
    """What torch would train on; `folder` is on the disk that is written to. Imports torch."""
    machine = this_machine(folder)  # before torch opens a card, which takes memory of it
    from charkha.backends.torch.device import find_device, gpu_uuids

    device, name, bf16, capability, count = find_device()
    if device == "cpu":
        machine = machine.only([])
    elif device == "cuda":
        machine = _as_torch_sees_it(machine, gpu_uuids(), name)
    elif not machine.gpus:
        memory = int((machine.ram_bytes or 0) * APPLE_SHARE)
        machine = replace(machine, gpus=(replace(find_gpu("M1"), name=name, memory_bytes=memory),))
    facts = replace(device_facts(machine), supports_bf16=bf16, compute_capability=capability, count=count)
    return TrainingMachine(machine, facts, name)


def _as_torch_sees_it(machine: Machine, uuids: list[str], name: str) -> Machine:
    """Its cards in torch's order. Where NVML does not know them all, the first is taken by its name in the table."""
    places = {uuid.removeprefix("GPU-"): place for place, uuid in enumerate(machine.uuids)}
    cards = [places.get(uuid.removeprefix("GPU-")) for uuid in uuids]
    known = [card for card in cards if card is not None]
    if known and len(known) == len(cards):
        return machine.only(known)
    try:
        gpu = find_gpu(name)
    except UnknownGpu:
        gpu = replace(find_gpu("RTX 3060 12GB"), name=name, memory_bytes=UNKNOWN_BYTES)
    return replace(machine, gpus=(gpu,) * len(uuids), uuids=tuple(uuids), free_bytes=())
