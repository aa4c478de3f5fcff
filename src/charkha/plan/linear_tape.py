"""Linear layers on a tape: plain, trained, quantized, and with PEFT's adapters around them.

Rules of types and copies: PEFT 0.21 (lora/layer.py, lora/bnb.py, lora/dora.py, ia3/layer.py, ia3/bnb.py), bitsandbytes
0.50 (nn/modules.py, autograd/_functions.py), torch's autocast. Widths are bytes an element.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from charkha.plan.architecture import Architecture
from charkha.plan.layers import Linear
from charkha.plan.memory_settings import FULL_BYTES, HALF_BYTES, MemorySettings
from charkha.plan.tape import Tape, Tensor
from charkha.plan.weights import adapter_targets, largest_rank

_BLOCK = 64  # weights that share one constant in 4 bits


@dataclass
class LinearTape:
    """Writes linear layers on a tape."""

    tape: Tape
    architecture: Architecture
    settings: MemorySettings
    copies: list[Tensor] = field(default_factory=list)  # 16-bit copies of trained matrices

    def __post_init__(self) -> None:
        self._targets = adapter_targets(self.architecture, self.settings)

    @property
    def product_width(self) -> int:
        """Of what a matrix product gives."""
        return self.settings.activation_bytes

    def linear(self, entering: Tensor, layer: Linear) -> Tensor:
        """The layer's output, with its adapter where it has one."""
        if self.settings.is_full:
            return self._trained(entering, layer)
        has_adapter = layer in self._targets
        if not has_adapter:
            return self._base(entering, layer)
        if self.settings.method == "ia3":
            return self._ia3(entering, layer)
        return self._low_rank(entering, layer)

    def weight(self, elements: int, *, counted: bool) -> Tensor:
        """A trained matrix in the type of the products: itself, or autocast's copy. `counted`: with its gradient."""
        settings = self.settings
        lasting = counted and settings.accumulation_steps == 1 and not settings.shards_gradients
        held = elements if counted else 0
        sharded_whole = settings.is_full and settings.shards_parameters
        width = HALF_BYTES if sharded_whole and settings.is_narrow else settings.trained_bytes
        trained = Tensor(held, width, is_weight=True, lasting_gradient=lasting)
        if width == self.product_width or not settings.autocast:
            return trained
        copy = self.tape.operator((trained,), elements, self.product_width)
        self.copies.append(copy)
        return copy

    def _trained(self, entering: Tensor, layer: Linear) -> Tensor:
        read = self.tape.cast(entering, self.product_width)
        weight = self.weight(layer.weights, counted=True)
        return self._product((read, weight), layer, saves=(read, weight))

    def _product(self, inputs: tuple[Tensor, ...], layer: Linear, saves: tuple[Tensor, ...] = ()) -> Tensor:
        return self.tape.operator(inputs, self._positions * layer.outputs, self.product_width, saves=saves)

    @property
    def _positions(self) -> int:
        return self.settings.positions

    def _base(self, entering: Tensor, layer: Linear) -> Tensor:
        """The frozen layer alone."""
        quantization = self.settings.quantization
        if quantization == "none":
            return self._product((self.tape.cast(entering, self.product_width),), layer)
        if quantization == "int8":
            return self._int8(entering, layer)
        read = self.tape.cast(entering, self.product_width)
        unpacked = layer.weights * self.product_width
        constants = FULL_BYTES * (layer.weights // _BLOCK) if self.settings.double_quantization else 0
        twice = 2 if self.settings.device == "cuda" else 1
        made = self.tape.operator(
            (read,),
            self._positions * layer.outputs,
            self.product_width,
            saves=(read,) if self.settings.quantized_keeps_inputs else (),
            inside=unpacked + twice * constants,
            inside_backward=unpacked + constants,
        )
        return self.tape.cast(made, entering.width)

    def _int8(self, entering: Tensor, layer: Linear) -> Tensor:
        """Its input is kept outside of autograd's hooks, so that checkpointing does not let go of it.

        On a GPU rows are rounded from an fp16 copy, and products come in int32, then fp16; a CPU unpacks the weight.
        """
        self.tape.outside_hooks.append(entering)
        elements, outputs = entering.elements, self._positions * layer.outputs
        unpacked = layer.weights * entering.width
        if self.settings.device == "cuda":
            width = entering.width
            inside = max(6 * elements - width * outputs, elements + 6 * outputs)
            return self.tape.operator(
                (entering,), outputs, width, saves=(entering,), inside=inside, inside_backward=unpacked
            )
        width = self.product_width
        narrowed = (layer.weights + elements) * width if entering.width > width else 0
        return self.tape.operator(
            (entering,), outputs, width, saves=(entering,), inside=unpacked + narrowed, inside_backward=unpacked
        )

    def _low_rank(self, entering: Tensor, layer: Linear) -> Tensor:
        tape, settings = self.tape, self.settings
        result = self._base(entering, layer)
        width = result.width
        if settings.quantization in ("nf4", "fp4"):
            result = tape.operator((result,), result.elements, width)  # PEFT clones it
        read = entering if self._knows_autocast or settings.fused_lora else self._as_adapter(entering)
        if settings.method == "dora":
            result = self._dora(read, result, layer)
        else:
            added = self._scaled(self._between(self._dropped_out(read), layer, entering))
            if settings.quantization != "none" and not self._knows_autocast:
                added = tape.cast(added, width)
            result = self._add(result, added)
        if not (settings.quantization != "none" and self._knows_autocast):
            result = tape.cast(result, width)
        tape.alive_until_here(entering, read)
        return result

    @property
    def _knows_autocast(self) -> bool:
        """PEFT's quantized layers ask CUDA's autocast, and convert nothing while it is on."""
        settings = self.settings
        return settings.quantization != "none" and settings.autocast and settings.device == "cuda"

    def _as_adapter(self, entering: Tensor) -> Tensor:
        return self.tape.cast(entering, self.settings.trained_bytes)

    def _dropped_out(self, read: Tensor) -> Tensor:
        """A GPU keeps booleans, a CPU the scaled noise in the input's type; fused kernels keep a copy and no mask."""
        settings = self.settings
        if settings.fused_lora:
            return self.tape.operator((read,), read.elements, self.product_width)
        if settings.lora_dropout == 0:
            return read
        mask = Tensor(read.elements, 1 if settings.device != "cpu" else read.width, needs_gradient=False)
        return self.tape.operator((read,), read.elements, read.width, saves=(mask,))

    def _between(self, read: Tensor, layer: Linear, entering: Tensor) -> Tensor:
        """B(A(read))."""
        settings, tape = self.settings, self.tape
        narrow = tape.cast(read, self.product_width) if settings.autocast else read
        rank = largest_rank(self.architecture, settings, layer)
        first = self.weight(rank * layer.inputs, counted=False)
        saves: tuple[Tensor, ...] = (narrow, first)
        if settings.fused_lora and layer.reads == "attention_in":  # one function of query, key and value keeps it too
            saves = (*saves, entering)
        middle = tape.operator((narrow, first), self._positions * rank, narrow.width, saves=saves)
        tape.alive_until_here(read)
        second = self.weight(rank * layer.outputs, counted=False)
        return tape.operator((middle, second), self._positions * layer.outputs, middle.width, saves=(middle, second))

    def _scaled(self, product: Tensor) -> Tensor:
        return self.tape.operator((product,), product.elements, product.width)

    def _add(self, first: Tensor, second: Tensor) -> Tensor:
        """On a CPU the narrower one is copied, which kernels of a GPU convert as they read."""
        width = max(first.width, second.width)
        copied = first.elements * width if self.settings.device == "cpu" and first.width != second.width else 0
        return self.tape.operator((first, second), first.elements, width, passes_gradient=True, inside=copied)

    def _dora(self, read: Tensor, result: Tensor, layer: Linear) -> Tensor:
        """The base's product and the adapter's, each times a trained fp32 vector; the sum comes in fp32."""
        tape, settings = self.tape, self.settings
        base = result
        if settings.lora_dropout > 0:
            read = self._dropped_out(read)
        matrices = self._norm_of_rows(read, layer)
        if settings.lora_dropout > 0:
            narrow = tape.cast(read, self.product_width) if settings.autocast else read
            unpacked = Tensor(layer.weights, narrow.width, needs_gradient=False)  # for the input's gradient
            # PEFT casts the matrix to what is read, and autocast that copy to what is multiplied.
            copied = {read.width, narrow.width} != {settings.base_bytes}
            saves = (unpacked,) if copied or settings.quantization != "none" else ()
            base = tape.operator((narrow,), result.elements, narrow.width, saves=saves)
        lora = self._between(read, layer, read)
        wide = max(settings.trained_bytes, base.width)
        scaled_base = self._times_vector(base, wide)
        scaled = self._scaled(self._times_vector(lora, wide))
        scaled = self._add(scaled_base, scaled)
        tape.alive_until_here(matrices)
        return self._add(result, scaled)

    def _norm_of_rows(self, read: Tensor, layer: Linear) -> Tensor:
        """The matrix and the adapter's, which exist until all is added up, and an identity that B(A(.)) is taken of.

        For a moment the adapter's scaled and their sum are beside them; CUDA's autocast takes the norm in fp32.
        """
        identity = layer.inputs * layer.inputs * self.product_width
        upcast = self.settings.autocast and self.settings.device == "cuda" and read.width < FULL_BYTES
        beside = max(2 * read.width, read.width + FULL_BYTES if upcast else 0)
        held = identity + 2 * read.width * layer.weights
        return self.tape.operator((), held, 1, inside=beside * layer.weights)

    def _ia3(self, entering: Tensor, layer: Linear) -> Tensor:
        """A trained fp32 vector times the product, or before the MLP's last layer times its input."""
        tape, settings = self.tape, self.settings
        quantized = settings.quantization != "none"
        converts = quantized and not self._knows_autocast
        read = tape.cast(entering, FULL_BYTES) if converts else entering
        wide = settings.trained_bytes
        if layer.reads == "mlp_inner":
            held = read if quantized else tape.cast(read, wide)
            scaled = self._times_vector(held, max(wide, held.width))
            result = self._base(scaled if quantized else tape.cast(scaled, entering.width), layer)
            tape.alive_until_here(scaled)
            expected = result.width
        else:
            result = self._base(read, layer)
            expected = result.width
            result = self._times_vector(result, max(wide, result.width))
        if settings.quantization in ("nf4", "fp4"):
            result = tape.operator((result,), result.elements, result.width)
        if converts or not quantized:
            result = tape.cast(result, expected)
        tape.alive_until_here(entering, read)
        return result

    def _times_vector(self, tensor: Tensor, width: int) -> Tensor:
        """Backward makes the vector's gradient from a whole product in fp32."""
        return self.tape.operator(
            (tensor,), tensor.elements, width, saves=(tensor,), inside_backward=tensor.elements * width
        )
