"""What copying a streamed base costs in time: how much of it hides behind computing, and from which micro batch all.

The engine's rule (backends/torch/streaming.py): when a layer is entered, the slot of the one before is free, and the
next one that lacks its layer is sent for. So a layer's copy has the time of the cold layers ahead of it and of the hot
ones between; a forward pass, a third of the computing, must hide half of the copying. Of the layers whose copies take
longer, computing waits for the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from charkha.hardware.machine import Machine
from charkha.plan.architecture import Architecture
from charkha.plan.memory_settings import MemorySettings
from charkha.plan.speed import StepTime, step_time
from charkha.plan.streamed import (
    cold_layers,
    expert_passes,
    hot_layer_bytes,
    hot_layers_of,
    moved_bytes,
    slab_layer_bytes,
    table_moved_bytes,
)

# A PCIe 4.0 x4 NVMe disk, sustained; data sheets say up to 7.4.
ASSUMED_DISK_BYTES_PER_S = 5e9
ASSUMED_LINK_BYTES_PER_S = 12e9  # where no card is known
FORWARD_SHARE = 0.3  # of a micro step's computing, about: see below
FREE_SHARE = 0.01  # of the computing: waiting up to this counts as free
_MOST_TOKENS = 1 << 20
_MOST_LAYERS = 1000  # that are gone through one by one
# Forward's share of what one checkpointed layer costs: it is run twice, and its backward adds the inputs' gradient.
_PRODUCTS_FORWARD, _ATTENTION_FORWARD, _TRAFFIC_FORWARD, _UNPACKED_FORWARD = 1 / 3, 1 / 4.5, 1 / 4, 1 / 3


@dataclass(frozen=True)
class Link:
    """Where layers come from and how fast. `source` says who says so."""

    bytes_per_second: float
    source: str


@dataclass(frozen=True)
class Copying:
    """One micro step of a streamed base in the steady state."""

    moved_bytes: int
    copy_seconds: float
    compute_seconds: float
    exposed_seconds: float  # of copying, that computing waits for

    @property
    def hidden_share(self) -> float:
        """Of the copying, what hides behind computing: 0 to 1; 1 where nothing is copied."""
        return max(0.0, 1 - self.exposed_seconds / self.copy_seconds) if self.copy_seconds else 1.0

    @property
    def is_free(self) -> bool:
        """Whether the micro step takes as long as with a resident base, but for a hundredth."""
        return self.exposed_seconds <= FREE_SHARE * self.compute_seconds


def link_of(machine: Machine, settings: MemorySettings) -> Link:
    """How fast layers come to the device; from the disk they come at the speed of the slower of disk and slot."""
    if machine.host_to_device_bytes_per_s:
        slot = Link(machine.host_to_device_bytes_per_s, "measured: host to device")
    elif machine.gpu:
        slot = Link(machine.gpu.pcie_bytes_per_s, f"assumed: what {machine.gpu.name} reaches in its widest slot")
    else:
        slot = Link(ASSUMED_LINK_BYTES_PER_S, "assumed: host memory")
    if settings.streamed_from == "ram" and settings.device != "cpu":
        return slot
    if machine.disk_read_bytes_per_s:
        disk = Link(machine.disk_read_bytes_per_s, "measured: reading from the disk")
    else:
        disk = Link(ASSUMED_DISK_BYTES_PER_S, "assumed: a PCIe 4.0 NVMe disk; `charkha doctor` measures yours")
    return min(disk, slot, key=lambda link: link.bytes_per_second)


def copying(architecture: Architecture, settings: MemorySettings, machine: Machine, bytes_per_second: float) -> Copying:
    """One micro step with layers coming at `bytes_per_second`."""
    time = step_time(architecture, settings, machine.gpu, cpu_flops=machine.cpu_flops)
    forward, backward = _layer_seconds(architecture, settings, machine, time)
    experts = expert_passes(architecture, settings) * (
        hot_layer_bytes(architecture, settings) - slab_layer_bytes(architecture, settings)
    )
    one_copy = (slab_layer_bytes(architecture, settings) + experts / 2) / bytes_per_second
    is_cold = _pass(architecture, settings)
    slots = settings.streamed_slots
    exposed = exposed_seconds(is_cold, slots, one_copy, forward)
    exposed += exposed_seconds(is_cold[::-1], slots, one_copy, backward)
    exposed *= architecture.layers / max(1, len(is_cold))
    # Rows of the embedding come before anything is computed, and a block of the head takes longer than its product.
    tables = table_moved_bytes(architecture, settings)
    exposed += tables / bytes_per_second
    moved = moved_bytes(architecture, settings) + tables
    return Copying(moved, moved / bytes_per_second, time.micro_batch_seconds, exposed)


def _pass(architecture: Architecture, settings: MemorySettings) -> list[bool]:
    """Which layers of a forward pass are cold; of an absurdly deep model a part, with as large a share of hot ones."""
    layers = min(architecture.layers, _MOST_LAYERS)
    hot = frozenset(hot_layers_of(layers, settings.streamed_resident_layers * layers // max(1, architecture.layers)))
    return [number not in hot for number in range(layers)]


def exposed_seconds(is_cold: Sequence[bool], slots: int, copy_seconds: float, compute_seconds: float) -> float:
    """Seconds of one pass in which computing waits for a layer. The first cold ones lie in the slots from the turn.

    `is_cold` is in the order of the pass. A slot is free again when the cold layer after the one in it is entered.
    """
    clock = link = 0.0
    entered: list[float] = []
    for cold in is_cold:
        if cold:
            turn = len(entered)
            entered.append(clock)
            if turn >= slots:
                link = max(link, entered[turn - slots + 1]) + copy_seconds
                clock = max(clock, link)
        clock += compute_seconds
    return max(0.0, clock - len(is_cold) * compute_seconds)


def _layer_seconds(
    architecture: Architecture, settings: MemorySettings, machine: Machine, time: StepTime
) -> tuple[float, float]:
    """(forward, run again and backward) of one layer: all that is not head, loss and batch."""
    rest = step_time(replace(architecture, layers=0), settings, machine.gpu, cpu_flops=machine.cpu_flops)
    forward = (
        _PRODUCTS_FORWARD * (time.products_seconds - rest.products_seconds)
        + _ATTENTION_FORWARD * time.attention_seconds
        + _TRAFFIC_FORWARD * (time.traffic_seconds - rest.traffic_seconds)
        + _UNPACKED_FORWARD * time.dequantization_seconds
    )
    whole = time.micro_batch_seconds - rest.micro_batch_seconds
    # Where the host cannot launch kernels as fast as they run, forward is stretched with the rest.
    forward = max(forward, _PRODUCTS_FORWARD * time.launch_seconds)
    return forward / architecture.layers, (whole - forward) / architecture.layers


def streamed_step_time(architecture: Architecture, settings: MemorySettings, machine: Machine) -> StepTime:
    """The step's time with what of copying is not hidden; that of `step_time` for a resident base."""
    time = step_time(architecture, settings, machine.gpu, cpu_flops=machine.cpu_flops)
    if not settings.streamed:
        return time
    rate = link_of(machine, settings).bytes_per_second
    return replace(time, exposed_copy_seconds=copying(architecture, settings, machine, rate).exposed_seconds)


def free_from_tokens(
    architecture: Architecture, settings: MemorySettings, machine: Machine, bytes_per_second: float
) -> int | None:
    """The shortest single row whose computing hides all copying, within 1 %, None: none does.

    Whether that row fits is another question.
    """
    if not cold_layers(architecture, settings):
        return 1

    def is_free(tokens: int) -> bool:
        return copying(architecture, _one_row(settings, tokens), machine, bytes_per_second).is_free

    return _first(is_free, _MOST_TOKENS)


def free_from_rows(
    architecture: Architecture, settings: MemorySettings, machine: Machine, bytes_per_second: float
) -> int | None:
    """How many rows of the length planned for a micro batch must have for the same; None: no number does."""

    def is_free(rows: int) -> bool:
        there = replace(settings, rows=rows, trained_positions=None, padded=False)
        return copying(architecture, there, machine, bytes_per_second).is_free

    return _first(is_free, max(1, _MOST_TOKENS // settings.tokens))


def _one_row(settings: MemorySettings, tokens: int) -> MemorySettings:
    return replace(settings, rows=1, tokens=tokens, trained_positions=None)


def _first(holds: Callable[[int], bool], most: int) -> int | None:
    """The smallest number from 1 to `most` from which on `holds`, found by halving."""
    if not holds(most):
        return None
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high
