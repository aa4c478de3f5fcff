"""How the bytes of one layer get from where they wait into a slot of the device, beside the computing.

What moves is a unit of the slab: a decoder layer or one expert.

- DiskToMemory    CPU: a thread reads the slab file straight into the slot
- RamToDevice     CUDA: one copy per layer, on its own stream, from host RAM that is pinned in one piece
- DiskToDevice    CUDA: a thread reads directly (past the page cache) into pinned buffers, and copies from there

torch's own pinned allocator rounds each allocation up to a power of two (CachingHostAllocator), up to twice the bytes;
registering one mapped range with cudaHostRegister costs none. Buffers are never freed while the engine lives, so the
caching allocator needs no record_stream; two events per slot order the streams
(https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-streams).
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from charkha.backends.torch.freed_memory import give_freed_memory_back
from charkha.backends.torch.slabs import LAYER_ALIGNMENT, Slab, SlabLayer, require_undamaged
from charkha.errors import EnvironmentProblem
from charkha.units import format_bytes

logger = logging.getLogger(__name__)
_BOUNCE_BUFFERS = 2
_HASHING_THREADS = 4


@dataclass(eq=False)
class Slot:
    """A buffer on the device that one layer at a time lies in. `generation` grows whenever it is given another."""

    buffer: torch.Tensor  # uint8
    layer: int | None = None
    generation: int = 0
    filling: Future[None] | None = None  # the thread that brings the layer, where there is one
    ready: Any = None  # CUDA event: the layer has arrived
    done: Any = None  # CUDA event: the layer that lay here before is used no more


@dataclass
class Traffic:
    """What moved so far, and how long the computing thread waited for it (on CUDA: for the reading thread alone)."""

    loads: int = 0
    bytes: int = 0
    stall_seconds: float = 0.0
    load_order: list[int] = field(default_factory=list)


class Transfer(Protocol):
    """Brings layers into buffers. All calls come from the computing thread."""

    def fill(self, layer: int, target: torch.Tensor) -> None:
        """Brings a layer into a buffer that it stays in; done when this returns."""
        ...

    def start(self, layer: int, slot: Slot) -> None:
        """Begins to bring a layer into a slot, once what lay there before is used no more."""
        ...

    def wait(self, slot: Slot) -> None:
        """What is computed after this sees the slot's layer. Raises what went wrong on the way."""
        ...

    def release(self, slot: Slot) -> None:
        """What was computed so far is the last to read the slot's layer."""
        ...


class CannotPin(EnvironmentProblem):
    """Host memory that the system or the driver does not give; layers can come from the disk instead."""

    kind = "cannot_pin"


class LayerReader:
    """Reads whole units of a slab file into memory, for one thread, each compared with its hash the first time.

    Raises EnvironmentProblem for a short file, SlabDamaged for other bytes than were written.
    """

    def __init__(self, slab: Slab, *, direct: bool = False) -> None:
        self._slab = slab
        self._seen: set[int] = set()
        flag = getattr(os, "O_DIRECT", 0) if direct else 0
        self.is_direct = bool(flag)
        try:
            self._descriptor = os.open(slab.path, os.O_RDONLY | flag)
        except OSError:
            if not flag:
                raise
            self._read_through_the_cache()

    def read(self, number: int, target: torch.Tensor) -> None:
        """Fills the beginning of `target` (uint8, host memory; aligned to 4096 bytes where reads are direct)."""
        view = self.read_unseen(number, target)
        if number not in self._seen:
            require_undamaged(self._slab, number, view)
            self._seen.add(number)

    def read_unseen(self, number: int, target: torch.Tensor) -> memoryview:
        """Reads without looking at the hash; the unit's bytes in `target`."""
        layer = self._slab.units[number]
        whole = memoryview(target.numpy())[: layer.byte_count]
        rest, position = whole, layer.offset
        while len(rest):
            count = self._read_some(rest, position)
            if not count:
                raise self._unreadable("ended while it was read", "what is missing is made again")
            rest, position = rest[count:], position + count
        return whole

    def _read_some(self, target: memoryview, position: int) -> int:
        try:
            return os.preadv(self._descriptor, [target], position)
        except OSError as error:
            if self.is_direct and error.errno == errno.EINVAL:
                direct = self._descriptor
                self._read_through_the_cache()
                os.close(direct)
                return self._read_some(target, position)
            again = "with its folder removed, it is made again; look at the health of this disk"
            raise self._unreadable(f"cannot be read: {error.strerror}", again) from error

    def _read_through_the_cache(self) -> None:
        """Opens the file anew: tmpfs and some network disks know no direct reads, or say so only when asked for one."""
        self._descriptor = os.open(self._slab.path, os.O_RDONLY)
        self.is_direct = False

    def _unreadable(self, message: str, again: str) -> EnvironmentProblem:
        remedy = f"run the same command again: {again}, and the run goes on from its newest checkpoint"
        return EnvironmentProblem(message, where=str(self._slab.path), remedy=remedy)

    def forget_cached(self, layer: SlabLayer) -> None:
        """Tells the system that these pages will not be read again soon."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, layer.offset, layer.byte_count, os.POSIX_FADV_DONTNEED)

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)


class DiskToMemory:
    """A thread reads layers from the slab file into slots in host memory; the page cache helps where RAM is free."""

    def __init__(self, slab: Slab, traffic: Traffic) -> None:
        give_freed_memory_back()
        self._reader = LayerReader(slab)
        self._traffic = traffic
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="charkha-stream")

    def fill(self, layer: int, target: torch.Tensor) -> None:
        self._thread.submit(self._reader.read, layer, target).result()

    def start(self, layer: int, slot: Slot) -> None:
        # What lay in the slot is used no more: on a CPU every operation is finished when it returns.
        slot.filling = self._thread.submit(self._reader.read, layer, slot.buffer)

    def wait(self, slot: Slot) -> None:
        if slot.filling is None:
            return
        began = time.monotonic()
        require_arrived(slot)
        self._traffic.stall_seconds += time.monotonic() - began

    def release(self, slot: Slot) -> None:
        """Nothing: see `start`."""


def require_arrived(slot: Slot) -> None:
    """Waits for the thread that fills the slot. Raises what went wrong there: the slot then holds no layer."""
    assert slot.filling is not None
    filling, slot.filling = slot.filling, None
    try:
        filling.result()
    except BaseException:
        slot.layer = None  # or who asks for it again would be given what lies there
        raise


class PinnedMemory:
    """Host memory in one mapped range that the GPU copies from without the CPU. Raises CannotPin."""

    def __init__(self, size: int) -> None:
        size += -size % LAYER_ALIGNMENT
        try:  # Page-aligned, as direct reads need.
            self._map = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise _cannot_pin(size, str(error.strerror)) from error
        self.tensor = torch.frombuffer(self._map, dtype=torch.uint8)
        code = int(torch.cuda.cudart().cudaHostRegister(self.tensor.data_ptr(), size, 0))
        self._registered = code == 0
        if code:
            clear_cuda_error()
            raise _cannot_pin(size, f"CUDA error {code}")

    def __del__(self) -> None:
        if getattr(self, "_registered", False):
            torch.cuda.synchronize()  # no copy may still read from it
            torch.cuda.cudart().cudaHostUnregister(self.tensor.data_ptr())


def _cannot_pin(size: int, why: str) -> CannotPin:
    return CannotPin(
        f"{format_bytes(size)} of host memory could not be pinned ({why})",
        remedy="free host RAM, raise `ulimit -l`, and on WSL2 the memory limit in .wslconfig",
    )


def clear_cuda_error() -> None:
    """Takes back the error that a failed runtime call leaves, which torch would raise at its next kernel.

    cudaGetLastError clears it, which torch does not hand out, but asks at every launch and then raises what it found
    (C10_CUDA_KERNEL_LAUNCH_CHECK). An error that stays, of a device that is lost, is raised by the next kernel.
    """
    with suppress(RuntimeError):
        torch.ones(1, device="cuda")


class _DeviceCopies:
    """What both CUDA tiers share: a stream for copies, and two events per slot."""

    def __init__(self, traffic: Traffic) -> None:
        self._traffic = traffic
        self._stream = torch.cuda.Stream()

    def _copy(self, source: torch.Tensor, slot: Slot, done: Any) -> None:
        """One copy to the device, after `done` and before `slot.ready`."""
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(done)
            self._move(slot.buffer[: source.numel()], source)
            slot.ready.record(self._stream)

    def _move(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Enqueues the copy on the current stream; a benchmark paces it here."""
        target.copy_(source, non_blocking=True)

    def _done_event(self, slot: Slot) -> Any:
        """When the slot may be written; at first, when the work that made the buffer is over."""
        if slot.ready is None:
            slot.ready, slot.done = torch.cuda.Event(), torch.cuda.Event()
            slot.done.record(torch.cuda.current_stream())
        return slot.done

    def release(self, slot: Slot) -> None:
        # A new event: the copy that another thread has yet to enqueue must not wait for a later use of the same slot.
        slot.done = torch.cuda.Event()
        slot.done.record(torch.cuda.current_stream())


class RamToDevice(_DeviceCopies):
    """Layers wait in pinned host RAM; a copy is one asynchronous call."""

    def __init__(self, slab: Slab, traffic: Traffic) -> None:
        super().__init__(traffic)
        self._slab = slab
        self._host = PinnedMemory(slab.total_bytes)
        reader = LayerReader(slab)
        # A disk reads faster than one core hashes; hashlib lets the others run.
        with ThreadPoolExecutor(_HASHING_THREADS, thread_name_prefix="charkha-hash") as hashing:
            compared = []
            for number, layer in enumerate(slab.units):
                content = reader.read_unseen(number, self._of(layer))
                compared.append(hashing.submit(require_undamaged, slab, number, content))
                reader.forget_cached(layer)  # or the base would be in RAM twice
            for each in compared:
                each.result()

    def _of(self, layer: SlabLayer) -> torch.Tensor:
        return self._host.tensor[layer.offset : layer.offset + layer.byte_count]

    def fill(self, layer: int, target: torch.Tensor) -> None:
        source = self._of(self._slab.units[layer])
        target[: source.numel()].copy_(source)

    def start(self, layer: int, slot: Slot) -> None:
        self._copy(self._of(self._slab.units[layer]), slot, self._done_event(slot))

    def wait(self, slot: Slot) -> None:
        torch.cuda.current_stream().wait_event(slot.ready)


class DiskToDevice(_DeviceCopies):
    """Layers wait on the disk; a thread reads them into pinned buffers in turn and enqueues the copies."""

    def __init__(self, slab: Slab, traffic: Traffic) -> None:
        super().__init__(traffic)
        self._slab = slab
        self._reader = LayerReader(slab, direct=True)
        size = slab.largest_layer_bytes
        self._host = PinnedMemory(_BOUNCE_BUFFERS * size)
        self._bounce = [self._host.tensor[turn * size : (turn + 1) * size] for turn in range(_BOUNCE_BUFFERS)]
        self._emptied = [torch.cuda.Event() for _ in range(_BOUNCE_BUFFERS)]
        self._turn = 0
        self._device = torch.cuda.current_device()
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="charkha-stream")

    def fill(self, layer: int, target: torch.Tensor) -> None:
        size = self._slab.units[layer].byte_count
        with self._lock:
            self._emptied[0].synchronize()
            self._reader.read(layer, self._bounce[0])
            target[:size].copy_(self._bounce[0][:size])

    def start(self, layer: int, slot: Slot) -> None:
        slot.filling = self._thread.submit(self._bring, layer, slot, self._done_event(slot))

    def _bring(self, layer: int, slot: Slot, done: Any) -> None:
        torch.cuda.set_device(self._device)  # the current device is a property of the thread
        with self._lock:
            turn, self._turn = self._turn, (self._turn + 1) % _BOUNCE_BUFFERS
            self._emptied[turn].synchronize()  # the copy out of this buffer, two layers ago; at once when never used
            self._reader.read(layer, self._bounce[turn])
            self._copy(self._bounce[turn][: self._slab.units[layer].byte_count], slot, done)
            self._emptied[turn].record(self._stream)

    def wait(self, slot: Slot) -> None:
        if slot.filling is not None:
            began = time.monotonic()
            require_arrived(slot)  # `ready` is recorded by now
            self._traffic.stall_seconds += time.monotonic() - began
        torch.cuda.current_stream().wait_event(slot.ready)
