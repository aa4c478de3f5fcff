"""A base of random NF4 weights in pinned host memory, in the shape of a real one: nothing is downloaded or quantized.

Layout and loading are the engine's own; only the bytes are random. Constants are small, so that activations stay
finite through 80 layers.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig

from charkha.backends.torch import streamed_model
from charkha.backends.torch.slabs import LAYER_ALIGNMENT, PIECE_ALIGNMENT, Piece, Slab, SlabLayer
from charkha.backends.torch.streamed_4bit import four_bit_stand_in
from charkha.backends.torch.streaming import Engine
from charkha.backends.torch.transfers import PinnedMemory, RamToDevice, Slot, Traffic

SHAPES = {
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
}


def config_of(shape: str) -> LlamaConfig:
    """Llama 3's proportions: 8 key-value heads, vocabulary 128256."""
    return LlamaConfig(
        **SHAPES[shape], num_key_value_heads=8, vocab_size=128256, max_position_embeddings=8192, use_cache=False,
        tie_word_embeddings=False, rope_theta=500000.0, attn_implementation="sdpa",
    )  # fmt: skip


def layout(layers: list[list[tuple[str, int]]]) -> tuple[SlabLayer, ...]:
    """(module, weights) of each layer -> where its pieces lie, as in a slab file."""
    found, begin = [], 0
    for linears in layers:
        position, pieces = 0, []
        for name, weights in linears:
            blocks = -(-weights // 64)
            for part, dtype, shape, size in (
                ("packed", "U8", (weights // 2, 1), weights // 2),
                ("absmax", "U8", (blocks,), blocks),
                ("nested_absmax", "F32", (-(-blocks // 256),), 4 * -(-blocks // 256)),
                ("nested_offset", "F32", (), 4),
            ):
                position += -position % PIECE_ALIGNMENT
                pieces.append(Piece(name, part, dtype, shape, position, size))
                position += size
        position += -position % LAYER_ALIGNMENT
        found.append(SlabLayer(begin, position, "", tuple(pieces)))
        begin += position
    return tuple(found)


def fill_with_random_weights(slab: Slab, host: torch.Tensor, seed: int) -> None:
    """Packed bytes and constants at random, made on the GPU layer by layer; offset and nested constants small."""
    generator = torch.Generator("cuda").manual_seed(seed)
    for layer in slab.layers:
        device = torch.randint(0, 256, (layer.byte_count,), dtype=torch.uint8, device="cuda", generator=generator)
        for piece in layer.pieces:
            view = device[piece.offset : piece.offset + piece.byte_count]
            if piece.part == "nested_absmax":
                view.view(torch.float32).fill_(0.005)
            elif piece.part == "nested_offset":
                view.view(torch.float32).fill_(0.02)
        host[layer.offset : layer.offset + layer.byte_count].copy_(device)


class PacedRam(RamToDevice):
    """The production tier over given host memory; copies can be slowed to a bandwidth, and are timed by events."""

    def __init__(self, slab: Slab, host: PinnedMemory, traffic: Traffic, gb_per_second: float | None = None) -> None:
        super(RamToDevice, self).__init__(traffic)
        self._slab, self._host = slab, host
        self._gb_per_second = gb_per_second
        self._copies: list[tuple[Any, Any]] = []
        self._stalls: list[tuple[Any, Any]] = []
        self._nanoseconds_per_cycle = 0.0 if gb_per_second is None else _nanoseconds_per_cycle()
        self._free_gb_per_second = 0.0 if gb_per_second is None else bandwidth(host.tensor)

    def _move(self, target: torch.Tensor, source: torch.Tensor) -> None:
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        if self._gb_per_second is None:
            super()._move(target, source)
        else:  # in pieces, so that a slow link is busy in the same rhythm
            for to, of in zip(target.split(8 << 20), source.split(8 << 20), strict=True):
                super()._move(to, of)
                rest = of.numel() / self._gb_per_second - of.numel() / self._free_gb_per_second
                if rest > 0:
                    torch.cuda._sleep(int(rest / self._nanoseconds_per_cycle))
        ended.record()
        self._copies.append((began, ended))

    def wait(self, slot: Slot) -> None:
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        super().wait(slot)
        after.record()
        self._stalls.append((before, after))

    def forget(self) -> None:
        self._copies.clear()
        self._stalls.clear()

    def seconds(self) -> tuple[float, float]:
        """(of copying, of the computing stream's waiting) since `forget`."""
        torch.cuda.synchronize()
        copying, waiting = (
            sum(first.elapsed_time(last) for first, last in pairs) / 1000 for pairs in (self._copies, self._stalls)
        )
        return copying, waiting


def _nanoseconds_per_cycle() -> float:
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(1000)
    torch.cuda.synchronize()
    began.record()
    torch.cuda._sleep(100_000_000)
    ended.record()
    torch.cuda.synchronize()
    return began.elapsed_time(ended) * 1e6 / 100_000_000


def bandwidth(pinned: torch.Tensor) -> float:
    """GB/s (bytes per nanosecond) of copies of 256 MiB to the device."""
    size = min(256 << 20, pinned.numel())
    target = torch.empty(size, dtype=torch.uint8, device="cuda")
    target.copy_(pinned[:size], non_blocking=True)
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    for _ in range(8):
        target.copy_(pinned[:size], non_blocking=True)
    ended.record()
    torch.cuda.synchronize()
    return float(8 * size / (began.elapsed_time(ended) * 1e6))


class SyntheticBase:
    """Host memory of a base, made once; models over it, streamed or resident, as often as asked."""

    def __init__(self, shape: str, seed: int = 0) -> None:
        from transformers import LlamaForCausalLM

        self.config = config_of(shape)

        class Streamed(LlamaForCausalLM):  # type: ignore[misc]  # transformers ships no types
            def __init__(self, config: LlamaConfig) -> None:
                super().__init__(config)
                for _, layer in streamed_model.decoder_layers(self):
                    for name in streamed_model.streamed_names(layer):
                        stand_in = four_bit_stand_in(layer.get_submodule(name), "nf4", torch.bfloat16)
                        layer.set_submodule(name, stand_in)

        self._kind = Streamed
        with torch.device("meta"):
            skeleton = Streamed(self.config)
        names = [
            [(f"{layer}.{name}", linear.in_features * linear.out_features) for name, linear in _linears(module)]
            for layer, module in streamed_model.decoder_layers(skeleton)
        ]
        self.slab = Slab(None, layout(names))  # type: ignore[arg-type]  # there is no file
        self.host = PinnedMemory(self.slab.total_bytes)
        fill_with_random_weights(self.slab, self.host.tensor, seed)

    def model(self, *, slots: int, hot_layers: int, gb_per_second: float | None = None) -> tuple[Any, Engine]:
        """A model on the GPU whose base streams from the host memory; all layers hot is a resident base."""
        traffic = Traffic()
        transfer = PacedRam(self.slab, self.host, traffic, gb_per_second)
        engine = Engine(
            self.slab, transfer, traffic, slots=slots, hot=range(hot_layers), device=torch.device("cuda", 0)
        )
        with torch.device("meta"):
            model = self._kind(self.config).to(torch.bfloat16)
        model.to_empty(device="cuda")
        # A buffer of its own values, which meta tensors lost.
        model.model.rotary_emb = type(model.model.rotary_emb)(self.config, device="cuda")
        generator = torch.Generator("cuda").manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.fill_(1.0)
                else:
                    parameter.normal_(std=0.02, generator=generator)
        streamed_model._bind(model, engine, self.slab)
        model.is_loaded_in_4bit = True  # PEFT then takes its layers for 4-bit bases
        model.streaming_engine = engine
        return model, engine


def _linears(layer: torch.nn.Module) -> list[tuple[str, Any]]:
    return streamed_model._streamed_modules(layer)
