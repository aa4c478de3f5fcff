"""How much of a streamed base's copying was hidden, measured in a run's second and third step and said once.

The engine's transfer is timed in place, so that whatever asks it for layers is counted; numbers computed meanwhile are
the same. On a GPU two events stand around each copy and each wait, on a CPU the clock does.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainerCallback

from charkha.backends.base import Recorder, Streaming
from charkha.backends.torch.streaming import Engine
from charkha.backends.torch.transfers import DiskToDevice, DiskToMemory, Slot
from charkha.plan.streamed_time import FORWARD_SHARE

_FIRST, _LAST = 2, 3  # steps of this call: the first one fills the slots and the caches
_WELL_HIDDEN, _NOTICED = 0.9, 0.1  # below that share, and where waiting is more of the step than this, people are told


@dataclass(frozen=True)
class Copied:
    """Means over the measured steps."""

    bytes: float
    copy_seconds: float
    waited_seconds: float
    step_seconds: float

    @property
    def bytes_per_second(self) -> float:
        return self.bytes / self.copy_seconds

    @property
    def hidden_share(self) -> float:
        """Of the copying, what computing did not wait for."""
        return max(0.0, 1 - self.waited_seconds / self.copy_seconds)

    @property
    def needed_bytes_per_second(self) -> float:
        """From what speed on forward, which has the least computing for its half of the copies, would hide them."""
        return self.bytes / 2 / (FORWARD_SHARE * max(1e-9, self.step_seconds - self.waited_seconds))


class CopyWatch(TrainerCallback):  # type: ignore[misc]  # transformers ships no types
    """Times two steps and says what it found; a run of one step says nothing."""

    def __init__(self, engine: Engine, record: Recorder, streaming: Streaming | None = None) -> None:
        self._engine = engine
        self._record = record
        self._expected = streaming.expected_hidden_share if streaming else None
        self._timer = _Timer(engine.transfer)
        self._step = self._measured = 0
        self._began = self._seconds = 0.0
        self._bytes = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._step += 1
        if _FIRST <= self._step <= _LAST:
            self._timer.begin()
            self._began = time.monotonic()
            self._bytes -= self._engine.traffic.bytes

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not _FIRST <= self._step <= _LAST:
            return
        self._timer.end()
        self._seconds += time.monotonic() - self._began
        self._bytes += self._engine.traffic.bytes
        self._measured += 1
        if self._step == _LAST:
            self._tell()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._step < _LAST:
            self._tell()

    def _tell(self) -> None:
        copied, waited = self._timer.seconds()
        if not self._measured or not copied:
            return
        steps = self._measured
        found = Copied(self._bytes / steps, copied / steps, waited / steps, self._seconds / steps)
        for text in told(found, self._engine, self._expected):
            self._record("note", text=text)


def told(found: Copied, engine: Engine, expected_hidden_share: float | None = None) -> list[str]:
    """What a person is told of it: the measured share, and what to do where waiting takes a part of the step."""
    planned = "" if expected_hidden_share is None else f" (planned: {expected_hidden_share:.0%})"
    said = [
        f"copying hid {found.hidden_share:.0%} behind computing{planned}: {found.bytes / 1e9:.3g} GB a step came at "
        f"{found.bytes_per_second / 1e9:.3g} GB/s, computing waited {found.waited_seconds:.3g} of "
        f"{found.step_seconds:.3g} s"
    ]
    if found.hidden_share < _WELL_HIDDEN and found.waited_seconds > _NOTICED * found.step_seconds:
        gives, needed = (rate / 1e9 for rate in (found.bytes_per_second, found.needed_bytes_per_second))
        said.append(
            f"{_bottleneck(engine)} is too slow to hide: it gives {gives:.3g} GB/s, about {needed:.3g} GB/s would do. "
            f"Larger micro batches, longer or packed rows need less; {_remedy(engine)}"
        )
    return said


def where_layers_wait(engine: Engine) -> str:
    """Said when a run begins: in pinned memory, or on the disk."""
    places = {DiskToMemory: "on the disk, which the page cache helps", DiskToDevice: "on the disk"}
    place = next((text for kind, text in places.items() if isinstance(engine.transfer, kind)), "in pinned host memory")
    layers = len(engine.slab.layers)
    return (
        f"streamed base: {engine.slab.total_bytes / 1e9:.3g} GB wait {place}; {layers - len(engine.cold)} of {layers} "
        f"layers stay on the device, {len(engine.slots)} slots"
    )


def _bottleneck(engine: Engine) -> str:
    return "the disk" if isinstance(engine.transfer, DiskToMemory | DiskToDevice) else "the GPU's slot"


def _remedy(engine: Engine) -> str:
    if isinstance(engine.transfer, DiskToMemory):
        return "more free memory caches more of the file"
    if isinstance(engine.transfer, DiskToDevice):
        return "with more RAM layers wait there, and a faster disk helps"
    return "the widest PCIe slot of the board is the fastest"


class _Timer:
    """Seconds of copying and of waiting while it is on; `begin` and `end` swap the transfer's methods."""

    def __init__(self, transfer: Any) -> None:
        self._transfer = transfer
        self._copied = self._waited = self._copy_ended = 0.0
        self._copies: list[tuple[Any, Any]] = []
        self._waits: list[tuple[Any, Any]] = []
        self._stream = getattr(transfer, "_stream", None)  # of copies to a GPU

    def begin(self) -> None:
        start, wait = self._transfer.start, self._transfer.wait
        self._transfer.start = lambda layer, slot: self._start(start, layer, slot)
        self._transfer.wait = lambda slot: self._wait(wait, slot)

    def end(self) -> None:
        del self._transfer.start, self._transfer.wait  # the class's own show again

    def seconds(self) -> tuple[float, float]:
        """(of copying, of computing that waited for it), waiting for the device once."""
        if self._stream is not None:
            torch.cuda.synchronize()
        copied, waited = (
            sum(first.elapsed_time(last) for first, last in pairs) / 1000 for pairs in (self._copies, self._waits)
        )
        return self._copied + copied, self._waited + waited

    def _start(self, start: Callable[[int, Slot], None], layer: int, slot: Slot) -> None:
        began = time.monotonic()
        first = self._before_copy(slot)
        start(layer, slot)
        if slot.filling is not None:
            slot.filling.add_done_callback(lambda filled: self._arrived(began, filled))
        elif first is not None:
            self._copies.append((first, _event(self._stream)))

    def _before_copy(self, slot: Slot) -> Any:
        """An event when the slot is free and the copy can begin; None where a thread copies."""
        if self._stream is None or isinstance(self._transfer, DiskToDevice):
            return None
        self._stream.wait_event(self._transfer._done_event(slot))
        return _event(self._stream)

    def _arrived(self, began: float, filled: Future[None]) -> None:
        """In the reading thread, which brings one layer after another."""
        now = time.monotonic()
        self._copied += now - max(began, self._copy_ended)
        self._copy_ended = now

    def _wait(self, wait: Callable[[Slot], None], slot: Slot) -> None:
        if self._stream is None:
            began = time.monotonic()
            wait(slot)
            self._waited += time.monotonic() - began
            return
        current = torch.cuda.current_stream()
        first = _event(current)
        wait(slot)
        self._waits.append((first, _event(current)))


def _event(stream: Any) -> Any:
    made = torch.cuda.Event(enable_timing=True)
    made.record(stream)
    return made
