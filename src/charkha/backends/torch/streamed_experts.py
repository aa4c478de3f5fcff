"""Expert layers of a streamed base: transformers' fused 3-D expert weights, one expert at a time.

transformers keeps the experts of a layer in two parameters, gate_up_proj [experts, 2 x inner, hidden] and down_proj
[experts, hidden, inner]. Here each expert is a unit of the slab of its own, and the layer computes what transformers'
`grouped_mm` does, its default: tokens sorted by expert, a product per expert, the sum over a token's experts in its
order. A product's result is that of the same rows among others, so losses are those of a resident base bit for bit.

Quantized, each expert's three matrices are packed as linear layers of their own (bitsandbytes packs no 3-D weight, so
a resident base has no such numbers to compare with; they are those of a base with its experts packed and unpacked).

Not covered: experts with biases, transposed or interleaved weights (gpt-oss), and adapters on experts, whose PEFT
layers add to the whole 3-D weight at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers.integrations import moe

from charkha.backends.torch.expert_slots import ExpertSlots, tensor_in
from charkha.backends.torch.slab_parts import LinearShape, Rows, Weights
from charkha.backends.torch.slabs import Piece

_FUSED = ("gate_up_proj", "down_proj")
# Where files keep what transformers fuses: the experts' own name in the files, and gate, up and down within an expert.
_FOLDED_NAMES = ((".mlp.experts", ".mlp.experts"), (".mlp.experts", ".block_sparse_moe.experts"))
_APART = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))


def is_experts(module: torch.nn.Module) -> bool:
    """Whether it is a layer of fused experts that can be streamed."""
    held = dict(module.named_parameters(recurse=False))
    plain = not any(getattr(module, flag, False) for flag in ("has_bias", "is_transposed", "has_post_expert_norm"))
    return (
        tuple(held) == _FUSED
        and all(parameter.dim() == 3 for parameter in held.values())
        and getattr(module, "has_gate", False)
        and plain
    )


def expert_shapes(name: str, module: Any, weights: Weights, quantized: bool) -> list[tuple[LinearShape, ...]]:
    """Of each expert of the layer `name`, its matrices and where the base's files keep them."""
    experts, double, hidden = module.expert_shape
    inner = double // 2
    shapes = []
    for number in range(experts):
        gate, up, down = _sources(name, number, inner, hidden, weights)
        whole = f"{name}.{number}"
        if quantized:
            of_input = [
                LinearShape(f"{whole}.gate", inner, hidden, (gate,)),
                LinearShape(f"{whole}.up", inner, hidden, (up,)),
            ]
        else:
            of_input = [LinearShape(f"{whole}.gate_up", double, hidden, (gate, up))]
        shapes.append((*of_input, LinearShape(f"{whole}.down", hidden, inner, (down,))))
    return shapes


def _sources(name: str, number: int, inner: int, hidden: int, weights: Weights) -> tuple[Rows, Rows, Rows]:
    """Rows of gate, up and down of one expert in the files; names that are not there are told later."""
    if f"{name}.gate_up_proj" in weights:
        fused, first = f"{name}.gate_up_proj", number * 2 * inner
        down = Rows(f"{name}.down_proj", number * hidden, hidden)
        return Rows(fused, first, inner), Rows(fused, first + inner, inner), down
    found = [
        [f"{name.replace(mine, theirs)}.{number}.{part}.weight" for part in parts]
        for mine, theirs in _FOLDED_NAMES
        for parts in _APART
    ]
    gate, up, down_name = next((names for names in found if names[0] in weights), found[0])
    return Rows(gate, 0, inner), Rows(up, 0, inner), Rows(down_name, 0, hidden)


class StreamedExperts(torch.nn.Module):  # type: ignore[misc]  # torch is not typed here
    """Put before a model's own class of experts, whose activation and gate it uses; see `stream_experts`."""

    slots: ExpertSlots | None = None
    units: Sequence[int] = ()
    pieces: Sequence[Mapping[str, Mapping[str, Piece]]] = ()  # of each expert: matrix -> part -> piece
    expert_shape: tuple[int, int, int]  # of gate_up_proj
    compute_dtype: torch.dtype
    quant_type: str | None = None

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """[tokens, hidden], [tokens, k], [tokens, k] -> [tokens, hidden], as transformers' grouped_mm forward."""
        tokens, chosen_per_token = top_k_index.shape
        ids, order = torch.sort(top_k_index.reshape(-1))
        chosen, counts = torch.unique_consecutive(ids, return_counts=True)
        experts: list[int] = chosen.tolist()  # waits for the device: what is to be brought must be known
        rows = hidden_states[order // chosen_per_token].split(counts.tolist())
        answers = [
            self._answer(rows[place], expert, experts[:place], experts[place + 1 :])
            for place, expert in enumerate(experts)
        ]
        weighted = torch.cat(answers) * top_k_weights.reshape(-1)[order].unsqueeze(-1)
        back = torch.empty_like(order)
        back[order] = torch.arange(order.size(0), device=order.device)
        summed = weighted[back].view(tokens, chosen_per_token, -1).sum(dim=1)
        return summed.to(hidden_states.dtype)

    def _answer(self, rows: torch.Tensor, expert: int, before: list[int], after: list[int]) -> torch.Tensor:
        around = (expert, before[::-1], after)
        inner = self._apply_gate(_Product.apply(rows.to(self.compute_dtype), self, "gate_up", around))
        return _Product.apply(inner.to(self.compute_dtype), self, "down", around)

    def weight(self, expert: int, matrix: str, upcoming: Sequence[int]) -> torch.Tensor:
        """[rows, columns] of one expert, which is brought first; `upcoming` are those used next."""
        assert self.slots is not None
        buffer = self.slots.use(self.units[expert], [self.units[other] for other in upcoming])
        held = self.pieces[expert]
        if self.quant_type is None:
            return tensor_in(buffer, held[matrix]["weight"])
        from charkha.backends.torch.streamed_4bit import unpacked_into

        _experts, double, hidden = self.expert_shape
        parts = ["gate", "up"] if matrix == "gate_up" else ["down"]
        shape = (double, hidden) if matrix == "gate_up" else (hidden, double // 2)
        whole = torch.empty(shape, dtype=self.compute_dtype, device=buffer.device)
        for part, target in zip(parts, whole.chunk(len(parts)), strict=True):
            tensors = {kind: tensor_in(buffer, piece) for kind, piece in held[part].items()}
            unpacked_into(target, tensors, self.quant_type)
        return whole

    def require_intact(self) -> None:
        """Raises WeightsOverwritten when the expert was lost while it was read."""
        assert self.slots is not None
        self.slots.require_intact()


class _Product(torch.autograd.Function):  # type: ignore[misc]  # torch is not typed here
    """The rows of one expert times its weight, by the kernel that transformers takes, without keeping the weight."""

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, module: StreamedExperts, matrix: str, around: tuple[int, list[int], list[int]]
    ) -> torch.Tensor:
        ctx.module, ctx.matrix, ctx.around = module, matrix, around
        expert, _before, after = around
        weight = module.weight(expert, matrix, after)
        result: torch.Tensor = moe._grouped_linear(rows, weight[None], _all_of(rows))
        module.require_intact()
        return result

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (grad,) = grads
        expert, before, _after = ctx.around
        weight = ctx.module.weight(expert, ctx.matrix, before)
        result = moe._grouped_mm(grad, weight[None], _all_of(grad))
        ctx.module.require_intact()
        return result, None, None, None


def _all_of(rows: torch.Tensor) -> torch.Tensor:
    """Offsets of one group."""
    return torch.full((1,), len(rows), dtype=torch.int32, device=rows.device)


def stream_experts(module: Any, dtype: torch.dtype, quantization: str) -> None:
    """Makes a layer of experts a streamed one, without weights: loading the model then passes over them."""
    kind = type(module)
    streamed = type(kind.__name__, (StreamedExperts, kind), {"forward": StreamedExperts.forward})
    module.expert_shape = tuple(module.gate_up_proj.shape)
    module.compute_dtype = dtype
    module.quant_type = None if quantization == "none" else quantization
    for name in _FUSED:
        del module._parameters[name]
    module.__class__ = streamed
    module._is_hf_initialized = not module._buffers  # or transformers would fill what is not there


def bind_experts(module: StreamedExperts, name: str, slots: ExpertSlots, units: Sequence[int], slab_units: Any) -> None:
    """Tells the layer which units of the slab are its experts."""
    module.slots, module.units = slots, tuple(units)
    found = []
    for expert, unit in enumerate(units):
        matrices: dict[str, dict[str, Piece]] = {}
        for piece in slab_units[unit].pieces:
            matrices.setdefault(piece.module.removeprefix(f"{name}.{expert}."), {})[piece.part] = piece
        found.append(matrices)
    module.pieces = tuple(found)
