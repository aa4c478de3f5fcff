"""The parts that decoder layers are made of, as shapes: what has weights, and which tensor it reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# The tensors of a layer that linear layers read. Linears that read the same one share it while it is kept for backward.
Stream = Literal["attention_in", "attention_out", "mlp_in", "mlp_inner"]


@dataclass(frozen=True)
class Linear:
    """A weight [outputs, inputs], with a bias [outputs] where `bias`."""

    name: str  # path inside the layer, such as self_attn.q_proj
    inputs: int
    outputs: int
    reads: Stream
    bias: bool = False

    @property
    def weights(self) -> int:
        """Elements of the matrix, without the bias."""
        return self.inputs * self.outputs

    @property
    def parameters(self) -> int:
        """Elements of the matrix and the bias."""
        return self.weights + (self.outputs if self.bias else 0)


@dataclass(frozen=True)
class Norm:
    """RMSNorm has a scale, LayerNorm a scale and a bias; both as wide as what they normalize."""

    name: str
    width: int
    kind: Literal["rms", "layer"] = "rms"

    @property
    def parameters(self) -> int:
        """Elements of the scale and, for LayerNorm, of the bias."""
        return self.width * (2 if self.kind == "layer" else 1)


@dataclass(frozen=True)
class Experts:
    """The expert block of one layer: gate, up and down per expert, held in 3-D parameters, and the router."""

    count: int
    per_token: int
    hidden_size: int
    intermediate_size: int
    bias: bool = False  # on gate, up, down and router

    @property
    def weights(self) -> int:
        """Elements of one expert's matrices."""
        return 3 * self.hidden_size * self.intermediate_size

    @property
    def router_parameters(self) -> int:
        """Elements of what chooses the experts."""
        return self.count * (self.hidden_size + (1 if self.bias else 0))

    @property
    def parameters(self) -> int:
        """Elements of all experts and the router."""
        return self.count * self._one_expert + self.router_parameters

    @property
    def active_parameters(self) -> int:
        """Elements that one token meets."""
        return self.per_token * self._one_expert + self.router_parameters

    @property
    def _one_expert(self) -> int:
        return self.weights + (2 * self.intermediate_size + self.hidden_size if self.bias else 0)
