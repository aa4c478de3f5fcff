"""Every storage's birth and death in a training step that runs on fake tensors, in order, with its bytes and its kind.

Weights and what is computed from them are fake: shapes without memory or arithmetic. Everything else (ids, masks,
positions, routes, small constants) is real, because models branch on it: whether a mask hides anything, how many tokens
are trained, which expert gets a token. So code that asks "is this tensor being traced?" finds an ordinary one and takes
the way it takes in a run.
"""

from __future__ import annotations

import weakref
from array import array
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode

_LARGEST_REAL_BYTES = 64 << 20  # of an integer tensor; a larger one (a mask of very long rows) is fake too
_LARGEST_CONSTANT_BYTES = 64 << 10  # of a new floating-point tensor: PEFT joins a float mask to one of integers
_UNSIZED = (DataDependentOutputException, DynamicOutputShapeException)
_PRIM_DEVICE = torch.ops.prim.device.default

# What an operator allocates and frees inside itself on the planned device, in bytes, one allocation each.
Temporaries = Callable[[Any, tuple[Any, ...], Any], Iterable[int]]
# Stands in for an operator whose answer depends on numbers that a fake tensor does not have.
StandIn = Callable[[FakeTensorMode, tuple[Any, ...], dict[str, Any]], Any]


class Recorder(TorchDispatchMode):  # type: ignore[misc]  # its base is untyped
    """Records while entered: `with recorder: loss.backward()`. Numbers of allocations begin at 1.

    `events` holds +n for the birth of allocation n and -n for its death; `sizes[n]` its bytes, `phases[n]` and
    `kinds[n]` where and as what it was born. `phase_starts` are (index into events, phase).
    """

    def __init__(
        self,
        fake_mode: FakeTensorMode,
        temporaries: Temporaries = lambda operator, arguments, result: (),
        stand_ins: dict[Any, StandIn] | None = None,
    ) -> None:
        super().__init__()
        self._fake_mode = fake_mode
        self._temporaries = temporaries
        self._stand_ins = stand_ins or {}
        self._alive: dict[int, tuple[weakref.ref[Any], int]] = {}  # by address of the storage: (reference, number)
        self.events = array("q")
        self.sizes = array("q", [0])
        self.kinds: list[str] = [""]
        self.phases: list[str] = [""]
        self.phase_starts: list[tuple[int, str]] = []
        self.phase = "model"
        self.kind = "temporaries"
        self.operators = 0

    def enter_phase(self, phase: str) -> None:
        """What is born from now on is born in `phase`."""
        self.phase = phase
        self.phase_starts.append((len(self.events), phase))

    def hold(self, tensor: torch.Tensor, kind: str) -> None:
        """Counts a tensor that was made elsewhere (a weight), or names the kind of one that is counted already."""
        number = self._number(tensor) or self._born(tensor, kind)
        self.kinds[number] = kind

    def allocation(self, size: int, kind: str) -> int:
        """An allocation that no tensor shows; its number, for `release`."""
        self.sizes.append(size)
        self.kinds.append(kind)
        self.phases.append(self.phase)
        number = len(self.sizes) - 1
        self.events.append(number)
        return number

    def release(self, number: int) -> None:
        """The end of an `allocation`."""
        self.events.append(-number)

    def leave_out(self, tensor: torch.Tensor) -> None:
        """Takes a counted tensor off the record: it lies on the host or in managed memory."""
        number = self._number(tensor)
        if number:
            self.sizes[number] = 0

    def kind_of(self, tensor: torch.Tensor) -> str | None:
        """The kind under which a tensor's storage is counted; None when it is not."""
        number = self._number(tensor)
        return self.kinds[number] if number else None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is _PRIM_DEVICE:
            return func(*args)
        self.operators += 1
        result = self._run(func, args, kwargs or {})
        inside = [self.allocation(size, "temporaries") for size in self._temporaries(func, args, result) if size > 0]
        for tensor in _tensors(result):
            if self._number(tensor) is None:
                self._born(tensor, self._kind(func, args))
        for number in reversed(inside):
            self.release(number)
        return result

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = [*_tensors(args), *_tensors(kwargs.values())]
        if any(isinstance(tensor, FakeTensor) for tensor in given):
            stand_in = self._stand_ins.get(func)
            if stand_in is not None:
                return stand_in(self._fake_mode, args, kwargs)
            # What entering the mode and calling the operator comes to, at nine tenths of the time.
            return self._fake_mode.dispatch(func, (), args, kwargs)
        return self._run_on_real(func, args, kwargs, bool(given))

    def _run_on_real(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], has_inputs: bool) -> Any:
        """Real where the result is small enough to be."""
        try:
            with self._fake_mode:
                shown = func(*args, **kwargs)
        except _UNSIZED:
            return func(*args, **kwargs)
        made = list(_tensors(shown))
        size = sum(tensor.numel() * tensor.element_size() for tensor in made)
        is_new = not has_inputs and any(tensor.is_floating_point() for tensor in made)
        if size > (_LARGEST_CONSTANT_BYTES if is_new else _LARGEST_REAL_BYTES):
            return shown
        return func(*args, **kwargs)

    def _kind(self, func: Any, args: tuple[Any, ...]) -> str:
        if func is torch.ops.aten._to_copy.default and self.kind_of(args[0]) in ("base_weights", "adapter_weights"):
            return "weight_copies"
        if self.phase.endswith("backward") and self.kind == "temporaries" and torch.is_grad_enabled():
            return "recomputed_activations"  # in a backward pass only checkpointing computes with gradients on
        return self.kind

    def _number(self, tensor: torch.Tensor) -> int | None:
        known = self._alive.get(tensor.untyped_storage()._cdata)
        return None if known is None or known[0]() is None else known[1]

    def _born(self, tensor: torch.Tensor, kind: str) -> int:
        storage = tensor.untyped_storage()
        number = self.allocation(storage.nbytes(), kind)
        address = storage._cdata
        reference = weakref.ref(storage, lambda _gone: self._died(address, number))
        self._alive[address] = (reference, number)
        return number

    def _died(self, address: int, number: int) -> None:
        known = self._alive.get(address)
        if known is not None and known[1] == number:
            del self._alive[address]
            self.events.append(-number)


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    """The tensors among values and in lists and tuples of them."""
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, (list, tuple)) or hasattr(values, "__next__") or type(values).__name__ == "dict_values":
        for value in values:
            yield from _tensors(value)
