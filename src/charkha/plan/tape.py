"""One layer's tensors from birth to death, forward and backward, as autograd orders them: sizes only, no framework.

An operator has inputs, outputs, what it saves for its backward pass, and what it needs for a moment inside. Backward
goes through the operators in reverse: an operator takes the gradient of its outputs, makes those of its inputs, and
lets go of what it saved. Gradients that meet are added in place where nothing else holds the first one, else into a
third tensor (torch/csrc/autograd/input_buffer.cpp).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(eq=False)
class Tensor:
    """`elements` of `width` bytes. A view has no bytes of its own; `owner` is the tensor whose storage it shows."""

    elements: int
    width: int
    needs_gradient: bool = True
    is_weight: bool = False
    lasting_gradient: bool = False  # of a weight: stays when it is made
    shows: Tensor | None = None

    @property
    def size(self) -> int:
        """Bytes as a tensor of its own, which a gradient has even for a view."""
        return self.elements * self.width

    @property
    def owner(self) -> Tensor:
        """The tensor whose storage this is."""
        return self if self.shows is None else self.shows.owner


@dataclass(eq=False)
class _Operator:
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    saves: tuple[Tensor, ...]
    inside: int
    inside_backward: int
    passes_gradient: bool  # the gradient of the output is that of every input of the same width


@dataclass
class Tape:
    """Operators in the order of forward, and what they save."""

    operators: list[_Operator] = field(default_factory=list)
    outside_hooks: list[Tensor] = field(default_factory=list)  # kept from the first forward on, whatever checkpointing

    def operator(
        self,
        inputs: tuple[Tensor, ...],
        elements: int,
        width: int,
        *,
        saves: Iterable[Tensor] = (),
        inside: int = 0,
        inside_backward: int = 0,
        passes_gradient: bool = False,
        saves_output: bool = False,
    ) -> Tensor:
        """Records an operator; its output."""
        made = Tensor(elements, width, any(tensor.needs_gradient for tensor in inputs))
        kept = (*saves, made) if saves_output else tuple(saves)
        self.operators.append(_Operator(inputs, (made,), kept, inside, inside_backward, passes_gradient))
        return made

    def split(self, whole: Tensor, parts: tuple[int, ...]) -> tuple[Tensor, ...]:
        """Views of consecutive parts, in elements."""
        views = tuple(Tensor(elements, whole.width, whole.needs_gradient, shows=whole) for elements in parts)
        self.operators.append(_Operator((whole,), views, (), 0, 0, False))
        return views

    def cast(self, tensor: Tensor, width: int) -> Tensor:
        """The tensor in `width` bytes: itself, or a copy."""
        return tensor if tensor.width == width else self.operator((tensor,), tensor.elements, width)

    def alive_until_here(self, *tensors: Tensor) -> None:
        """A variable of the model's code still refers to them."""
        self.operators.append(_Operator(tensors, (), (), 0, 0, False))

    def saved(self) -> set[Tensor]:
        """Owners of all that is saved for the backward pass."""
        return {tensor.owner for one in self.operators for tensor in one.saves}

    def forward_peak(
        self, *, from_checkpoint: bool = False, saving: bool = True, already_there: frozenset[Tensor] = frozenset()
    ) -> int:
        """Most bytes alive at once in forward, saved tensors included where `saving`, without `already_there`.

        From a checkpoint it ends where the last tensor that backward needs has been made.
        """
        savers = [index for index, one in enumerate(self.operators) if one.saves]
        end = savers[-1] if from_checkpoint and savers else len(self.operators) - 1
        last_use = {t.owner: index for index, one in enumerate(self.operators) for t in (*one.inputs, *one.outputs)}
        alive, kept = _Alive(already_there), set[Tensor]()
        alive.add(self._given())
        for index, one in enumerate(self.operators[: end + 1]):
            stopped = from_checkpoint and index == end  # torch stops as soon as the last tensor is saved
            alive.add(one.outputs if not stopped else ())
            alive.add(one.saves if saving else ())
            alive.note(one.inside)
            kept |= {tensor.owner for tensor in one.saves} if saving else set()
            gone = {t.owner for t in (*one.inputs, *one.outputs) if last_use[t.owner] <= index}
            alive.remove(gone - kept - _outputs_at_the_end(self))
        return alive.peak

    def _given(self) -> set[Tensor]:
        made = {tensor for one in self.operators for tensor in one.outputs}
        return {tensor for one in self.operators for tensor in one.inputs if tensor not in made}

    def backward_peak(self, *, recompute: int | None = None, already_there: frozenset[Tensor] = frozenset()) -> int:
        """Most bytes alive at once in backward: what is still saved and gradients, the output's at the start included.

        With `recompute` saved tensors come when the first of them is asked for, and that many bytes come and go then.
        """
        return _Backward(self, recompute, already_there).run()


def _outputs_at_the_end(tape: Tape) -> set[Tensor]:
    last = next((one for one in reversed(tape.operators) if one.outputs), None)
    return {tensor.owner for tensor in last.outputs} if last else set()


class _Alive:
    """Tensors alive by owner, each once; weights and what was there before count nothing."""

    def __init__(self, without: frozenset[Tensor]) -> None:
        self._without = without
        self._tensors: set[Tensor] = set()
        self.now = 0
        self.peak = 0

    def add(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            owner = tensor.owner
            if owner not in self._tensors and owner not in self._without and not owner.is_weight:
                self._tensors.add(owner)
                self.now += owner.size
        self.peak = max(self.peak, self.now)

    def remove(self, owners: Iterable[Tensor]) -> None:
        for owner in owners:
            if owner in self._tensors:
                self._tensors.remove(owner)
                self.now -= owner.size

    def note(self, more: int) -> None:
        self.peak = max(self.peak, self.now + more)


@dataclass(eq=False)
class _Gradient:
    size: int
    holders: int = 1


class _Backward:
    """One walk back over a tape."""

    def __init__(self, tape: Tape, recompute: int | None, already_there: frozenset[Tensor]) -> None:
        self._tape = tape
        self._savers = Counter(owner for one in tape.operators for owner in {tensor.owner for tensor in one.saves})
        self._saved = _Alive(already_there)
        self._recompute = recompute
        if recompute is None:
            self._saved.add(self._savers)
        self._gradients: dict[Tensor, _Gradient] = {}
        self._made = 0
        self._peak = 0

    def run(self) -> int:
        for output in _outputs_at_the_end(self._tape):
            self._gradients[output] = self._new(output.size)
        for one in reversed(self._tape.operators):
            given = [self._gradients.pop(output) for output in one.outputs if output in self._gradients]
            if given:
                self._step(one, given)
        return self._peak

    def _step(self, one: _Operator, given: list[_Gradient]) -> None:
        if one.saves and self._recompute is not None:
            self._note(self._recompute)
            self._recompute = None
            self._saved.add(self._savers)
        made = [(tensor, self._gradient_for(tensor, one, given)) for tensor in one.inputs if tensor.needs_gradient]
        self._note(one.inside_backward)
        for owner in {tensor.owner for tensor in one.saves}:
            self._savers[owner] -= 1
            if not self._savers[owner]:
                self._saved.remove([owner])
        for gradient in given:
            self._let_go(gradient)
        for tensor, gradient in made:
            self._accumulate(tensor, gradient)

    def _gradient_for(self, tensor: Tensor, one: _Operator, given: list[_Gradient]) -> _Gradient:
        if one.passes_gradient and tensor.width == one.outputs[0].width:
            given[0].holders += 1
            return given[0]
        return self._new(tensor.size)

    def _accumulate(self, tensor: Tensor, gradient: _Gradient) -> None:
        if tensor.is_weight:
            if not tensor.lasting_gradient:
                self._let_go(gradient)
            return
        before = self._gradients.get(tensor)
        if before is None:
            self._gradients[tensor] = gradient
            return
        if before.holders > 1:
            self._gradients[tensor] = self._new(tensor.size)
            self._let_go(before)
        self._let_go(gradient)

    def _new(self, size: int) -> _Gradient:
        self._made += size
        self._note(0)
        return _Gradient(size)

    def _let_go(self, gradient: _Gradient) -> None:
        gradient.holders -= 1
        if not gradient.holders:
            self._made -= gradient.size

    def _note(self, inside: int) -> None:
        self._peak = max(self._peak, self._saved.now + self._made + inside)
