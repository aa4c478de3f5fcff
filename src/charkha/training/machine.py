"""This computer as training will use it: the cards that torch sees, in its order, with what NVML says of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from charkha.hardware.catalog import APPLE_SHARE, find_gpu
from charkha.hardware.machine import Machine, this_machine
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
    from charkha.backends.torch.device import find_device

    device, name, bf16, capability, count = find_device()
    if device == "cpu":
        machine = replace(machine, gpus=())
    elif device == "mps" and not machine.gpus:
        memory = int((machine.ram_bytes or 0) * APPLE_SHARE)
        machine = replace(machine, gpus=(replace(find_gpu("M1"), name=name, memory_bytes=memory),))
    facts = replace(device_facts(machine), supports_bf16=bf16, compute_capability=capability, count=count)
    return TrainingMachine(machine, facts, name)
