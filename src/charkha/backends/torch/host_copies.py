"""Tensors of the device copied to host memory and back, beside the computing: `leave`, later `bring`.

- HostCopies    CPU: plain copies, so that what is built on them can be tried and compared without a GPU
- CudaCopies    CUDA: asynchronous copies on one stream of their own, to and from pinned memory

Whoever copies holds the device's tensor until `left` and the new one until `arrived`; both order the streams and keep
nobody waiting on the host. So nothing needs `record_stream`, and memory is free again at a known place of the program
(https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-streams). All copies are on one stream, one after another:
a buffer may be given to the next tensor as soon as the last copy out of it was begun.
"""

from __future__ import annotations

import logging
import mmap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from charkha.errors import EnvironmentProblem

logger = logging.getLogger(__name__)


class Memory(Protocol):
    """Host memory as one tensor of bytes."""

    tensor: torch.Tensor  # uint8


class PageableMemory:
    """Host memory outside torch's allocator, as pinned memory is: what torch counts is then the device's."""

    def __init__(self, size: int) -> None:
        self.tensor = torch.frombuffer(mmap.mmap(-1, max(1, size)), dtype=torch.uint8)


@dataclass(eq=False)
class Copy:
    """A tensor's content in host memory, with all that makes the same tensor again."""

    memory: Memory
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    byte_count: int
    done: Any = None  # CUDA event: the newest copy, there or back

    def content(self) -> torch.Tensor:
        """The content as a tensor on the host, laid out as it was on the device."""
        return self.memory.tensor[: self.byte_count].view(self.dtype).as_strided(self.shape, self.stride)


class Buffers:
    """Host memory used again and again: as many pieces as are in use at once, each as large as it had to be."""

    def __init__(self, make: Callable[[int], Memory]) -> None:
        self._make = make
        self._free: list[Memory] = []
        self.byte_count = 0  # of all pieces, in use or not

    def take(self, size: int) -> Memory:
        """The smallest free piece of at least `size` bytes; a new one in the place of a smaller one where none is."""
        enough = [piece for piece in self._free if piece.tensor.numel() >= size]
        if enough:
            found = min(enough, key=lambda piece: piece.tensor.numel())
            self._free.remove(found)
            return found
        if self._free:
            self.byte_count -= self._free.pop().tensor.numel()  # first, so that there are never both
        made = self._make(size)
        self.byte_count += made.tensor.numel()
        return made

    def give(self, piece: Memory) -> None:
        """Nobody reads the piece any more, or only copies that were begun."""
        self._free.append(piece)


class HostCopies:
    """Copies that are done when a call returns."""

    def __init__(self, make: Callable[[int], Memory] = PageableMemory) -> None:
        self.buffers = Buffers(make)

    def leave(self, tensor: torch.Tensor) -> Copy:
        """Begins to copy a tensor that overlaps with nothing and has no gaps; it must not change until `left`."""
        size = tensor.numel() * tensor.element_size()
        memory = self.buffers.take(size)
        copy = Copy(memory, tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device, size)
        self._move(copy.content(), tensor)
        return copy

    def left(self, copy: Copy) -> None:
        """What is computed after this may use the memory of the tensor that left."""

    def bring(self, copy: Copy) -> torch.Tensor:
        """Begins to copy back: the same tensor on its device, to be read or dropped only after `arrived`."""
        made = torch.empty_strided(copy.shape, copy.stride, dtype=copy.dtype, device=copy.device)
        self._move(made, copy.content())
        return made

    def arrived(self, copy: Copy) -> None:
        """What is computed after this sees the tensor's content."""

    def forget(self, copy: Copy) -> None:
        """The content is needed no more."""
        self.buffers.give(copy.memory)

    def _move(self, target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source, non_blocking=True)


class CudaCopies(HostCopies):
    """Copies on a stream of their own, each after what the computing stream had been given when it was begun."""

    def __init__(self) -> None:
        super().__init__(_PinnedWherePossible())
        self._stream = torch.cuda.Stream()

    def leave(self, tensor: torch.Tensor) -> Copy:
        self._stream.wait_stream(torch.cuda.current_stream())  # the tensor is computed
        with torch.cuda.stream(self._stream):
            copy = super().leave(tensor)
            self._mark(copy)
        return copy

    def left(self, copy: Copy) -> None:
        torch.cuda.current_stream().wait_event(copy.done)

    def bring(self, copy: Copy) -> torch.Tensor:
        # Allocated for the computing stream, which reads it: what that had in the same memory before must be over.
        made = torch.empty_strided(copy.shape, copy.stride, dtype=copy.dtype, device=copy.device)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._move(made, copy.content())
            self._mark(copy)
        return made

    def arrived(self, copy: Copy) -> None:
        torch.cuda.current_stream().wait_event(copy.done)

    def _mark(self, copy: Copy) -> None:
        copy.done = torch.cuda.Event()
        copy.done.record(self._stream)


class _PinnedWherePossible:
    """Makes exactly as much pinned memory as is asked for: torch's own allocator would round up to a power of two.

    Pageable memory from the first piece on that cannot be pinned, and that is said once.
    """

    def __init__(self) -> None:
        self._given_up = False

    def __call__(self, size: int) -> Memory:
        from charkha.backends.torch.transfers import PinnedMemory

        if not self._given_up:
            try:
                return PinnedMemory(size)
            except EnvironmentProblem as problem:
                self._given_up = True
                logger.warning("%s; copies of it hold up the computing. To do: %s", problem.message, problem.remedy)
        return PageableMemory(size)
