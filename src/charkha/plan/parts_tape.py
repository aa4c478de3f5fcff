"""What decoder layers are made of beside matrices, on a tape: norms, dropout, sums, as in transformers 5.23."""

from __future__ import annotations

from charkha.plan.architecture import Architecture
from charkha.plan.layers import Norm
from charkha.plan.linear_tape import LinearTape
from charkha.plan.memory_settings import FULL_BYTES, MemorySettings
from charkha.plan.tape import Tape, Tensor


class PartsTape:
    """Writes norms, dropout and sums on the tape of one layer; `entering` is the residual that the layer is given."""

    def __init__(self, architecture: Architecture, settings: MemorySettings, stream_width: int) -> None:
        self.tape = Tape()
        self.architecture = architecture
        self.settings = settings
        self.linears = LinearTape(self.tape, architecture, settings)
        self.scores: tuple[Tensor, ...] = ()  # of whole attention, which the layer's code holds to its end
        self.cached_widths = (0, 0)  # bytes of an element of keys and values as a cache would keep them
        self.entering = Tensor(settings.positions * architecture.hidden_size, stream_width)

    def dropout(self, tensor: Tensor) -> Tensor:
        """A GPU keeps booleans, a CPU the scaled noise."""
        mask = Tensor(tensor.elements, 1 if self.settings.device != "cpu" else tensor.width, needs_gradient=False)
        return self.tape.operator((tensor,), tensor.elements, tensor.width, saves=(mask,))

    def add(self, first: Tensor, second: Tensor) -> Tensor:
        width = max(first.width, second.width)
        return self.tape.operator((first, second), first.elements, width, passes_gradient=True)

    def norm(self, tensor: Tensor, norm: Norm) -> Tensor:
        """RMSNorm works in fp32 whatever comes in; LayerNorm does under CUDA's autocast."""
        settings, tape = self.settings, self.tape
        rows = tensor.elements // norm.width
        statistics = Tensor(rows * (2 if norm.kind == "layer" else 1), FULL_BYTES, needs_gradient=False)
        if settings.fused_norms:
            return tape.operator((tensor,), tensor.elements, tensor.width, saves=(tensor, statistics))
        if norm.kind == "layer":
            wide = settings.autocast and settings.device == "cuda"
            read = tape.cast(tensor, FULL_BYTES) if wide else tensor
            return tape.operator((read,), read.elements, read.width, saves=(read, statistics))
        return self._rms_norm(tensor, statistics)

    def _rms_norm(self, tensor: Tensor, statistics: Tensor) -> Tensor:
        settings, tape = self.settings, self.tape
        trained = settings.method in ("full", "norms")
        wide = tape.cast(tensor, FULL_BYTES)
        square = wide.size
        normed = tape.operator((wide,), wide.elements, FULL_BYTES, saves=(wide, statistics), inside_backward=square)
        if self.architecture.model_type.startswith("gemma"):  # the scale is applied before rounding
            scaled = tape.operator((normed,), normed.elements, FULL_BYTES, saves=(normed,) if trained else ())
            made = tape.cast(scaled, tensor.width)
        else:
            narrow = tape.cast(normed, tensor.width)
            width = max(narrow.width, settings.trained_bytes if trained else settings.base_bytes)
            made = tape.operator((narrow,), narrow.elements, width, saves=(narrow,) if trained else ())
        tape.alive_until_here(wide, normed)
        return made
