"""A decoder layer on a tape: norms, attention, MLP and the residual stream, as transformers 5.23 computes them."""

from __future__ import annotations

from charkha.plan.architecture import Architecture
from charkha.plan.attention_tape import attention, linears_around_attention
from charkha.plan.layers import Linear
from charkha.plan.memory_settings import FULL_BYTES, MemorySettings
from charkha.plan.parts_tape import PartsTape
from charkha.plan.tape import Tensor
from charkha.plan.weights import adapts_experts


class LayerTape(PartsTape):
    """One layer recorded: `entering` and `leaving` are the residual, `attended` what the attention kernel gave."""

    def __init__(self, architecture: Architecture, settings: MemorySettings, stream_width: int) -> None:
        super().__init__(architecture, settings, stream_width)
        self.attended: tuple[Tensor, ...] = ()
        if settings.kept_beside:
            kept = Tensor(settings.positions * settings.kept_beside, settings.activation_bytes, needs_gradient=False)
            self.tape.operator((), 0, 0, saves=(kept,))
        self.leaving = self._parallel() if architecture.parallel else self._sequential()
        self.before: tuple[Tensor, ...] = ()  # what the layer before it left to the model's loop: Falcon's scores
        if architecture.model_type == "falcon":
            self.before = tuple(Tensor(scores.elements, scores.width, needs_gradient=False) for scores in self.scores)
        self.tape.alive_until_here(*self.scores, *self.before)

    def _sequential(self) -> Tensor:
        norms = self.architecture.norms
        around = len(norms) == 4  # norms after attention and MLP as well
        normed = self.norm(self.entering, norms[0])
        attended = self._attention(normed)
        if around:
            attended = self.norm(attended, norms[1])
        middle = self.add(self.entering, self._residual_dropout(attended))
        self.tape.alive_until_here(self.entering)
        normed = self.norm(middle, norms[2 if around else 1])
        computed = self._mlp(normed)
        self.tape.alive_until_here(normed)
        if around:
            computed = self.norm(computed, norms[3])
        return self.add(middle, self._residual_dropout(computed))

    def _parallel(self) -> Tensor:
        norms = self.architecture.norms
        first = second = self.norm(self.entering, norms[0])
        both_first = self.architecture.model_type == "falcon"
        if len(norms) > 1 and both_first:
            second = self.norm(self.entering, norms[1])
        attended = self._attention(first)
        if len(norms) > 1 and not both_first:
            second = self.norm(self.entering, norms[1])
        computed = self._mlp(second)
        self.tape.alive_until_here(*(first, second) if both_first else (second,))
        return self.add(self.entering, self.add(computed, attended))

    def _residual_dropout(self, tensor: Tensor) -> Tensor:
        """GPT-2 drops out what attention and MLP give."""
        if not self.architecture.dropout:
            return tensor
        return self.dropout(tensor)

    def _attention(self, normed: Tensor) -> Tensor:
        made, self.attended = attention(self, normed)
        self.tape.alive_until_here(normed)
        return made

    def _mlp(self, normed: Tensor) -> Tensor:
        architecture = self.architecture
        if architecture.experts:
            return self._experts(normed)
        layers = linears_around_attention(architecture)[1]
        inner = self._inner(normed, layers)
        made = self.linears.linear(inner, layers[-1])
        self.tape.alive_until_here(inner)
        return made

    def _inner(self, normed: Tensor, layers: tuple[Linear, ...]) -> Tensor:
        linear = self.linears.linear
        if not self.architecture.gated_mlp:
            return self._activation(linear(normed, layers[0]))
        if len(layers) == 2:  # gate and up out of one product
            both = linear(normed, layers[0])
            gate, up = self.tape.split(both, (both.elements // 2, both.elements // 2))
            return self._gated(gate, up)
        gate = linear(normed, layers[0])
        if self.settings.fused_mlp:
            return self._gated(gate, linear(normed, layers[1]))
        active = self._activation(gate)
        return self._times(active, linear(normed, layers[1]))

    def _gated(self, gate: Tensor, up: Tensor) -> Tensor:
        if self.settings.fused_mlp:  # one kernel, which makes the product again in backward
            return self.tape.operator((gate, up), gate.elements, gate.width, saves=(gate, up))
        return self._times(self._activation(gate), up)

    def _times(self, first: Tensor, second: Tensor) -> Tensor:
        width = max(first.width, second.width)
        return self.tape.operator((first, second), first.elements, width, saves=(first, second))

    def _activation(self, tensor: Tensor) -> Tensor:
        """One kernel that keeps its input; GPT-2's is made of parts."""
        tape = self.tape
        if self.architecture.activation != "gelu_new":
            return tape.operator((tensor,), tensor.elements, tensor.width, saves=(tensor,))
        wide = tensor.width
        half = tape.operator((tensor,), tensor.elements, wide)
        on_gpu = self.settings.autocast and self.settings.device == "cuda"  # whose autocast takes powers in fp32
        read = tape.cast(tensor, FULL_BYTES) if on_gpu else tensor
        cube = tape.operator((read,), read.elements, read.width, saves=(read,))
        cube = tape.operator((cube,), cube.elements, cube.width)
        inside = self.add(tensor, cube)
        inside = tape.operator((inside,), inside.elements, inside.width)
        tangent = tape.operator((inside,), inside.elements, inside.width, saves_output=True)
        plus = tape.operator((tangent,), tangent.elements, tangent.width, passes_gradient=True)
        return self._times(half, plus)

    def _experts(self, normed: Tensor) -> Tensor:
        """All experts at once over the tokens sorted by expert, or as older versions did, one after another."""
        experts, settings = self.architecture.experts, self.settings
        assert experts is not None
        pairs = settings.positions * experts.per_token
        if not settings.experts_in_turn:
            return self._expert_group(normed, pairs, experts.count, None)
        computed: Tensor | None = None
        for _ in range(experts.count):
            computed = self._expert_group(normed, pairs // experts.count, 1, computed)
        assert computed is not None
        return computed

    def _expert_group(self, normed: Tensor, pairs: int, count: int, before: Tensor | None) -> Tensor:
        """`count` experts over `pairs` of a token and an expert; added to the sum of those before."""
        experts, settings, tape = self.architecture.experts, self.settings, self.tape
        assert experts is not None
        width, inner = settings.activation_bytes, experts.intermediate_size
        first, second = self._expert_weights(count)
        read = tape.cast(tape.operator((normed,), pairs * experts.hidden_size, normed.width), width)
        both = tape.operator((read, *first), 2 * pairs * inner, width, saves=(read, *first) if first else ())
        gate, up = tape.split(both, (both.elements // 2, both.elements // 2))
        product = self._gated(gate, up)
        output = tape.operator(
            (product, *second), pairs * experts.hidden_size, width, saves=(product, *second) if second else ()
        )
        weighted = tape.operator((output,), output.elements, width, saves=(output,))
        tape.alive_until_here(normed)
        if before is None:
            return tape.operator((weighted,), settings.positions * experts.hidden_size, width)
        return tape.operator((before, weighted), before.elements, width, passes_gradient=True)

    def _expert_weights(self, count: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Trained matrices of `count` experts: gate and up in one, and down; with adapters, the sums with the base."""
        experts = self.architecture.experts
        assert experts is not None
        matrix = count * experts.hidden_size * experts.intermediate_size
        if adapts_experts(self.architecture, self.settings):
            width = self.settings.activation_bytes
            adapter = Tensor(0, width, is_weight=True)
            return (self.tape.operator((adapter,), 2 * matrix, width),), (
                self.tape.operator((adapter,), matrix, width),
            )
        if not self.settings.is_full:
            return (), ()
        return (self.linears.weight(2 * matrix, counted=True),), (self.linears.weight(matrix, counted=True),)
