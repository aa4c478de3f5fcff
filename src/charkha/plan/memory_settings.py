"""The settings of a run that decide how much memory its training step needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FULL_BYTES = 4  # fp32: trained weights, gradients, optimizer states, the loss
HALF_BYTES = 2  # bf16 and fp16


@dataclass(frozen=True)
class MemorySettings:
    """One micro batch of the longest rows, and how the model is held; nothing in it is `auto`."""

    dtype: Literal["bf16", "fp16", "fp32"]
    rows: int  # of one micro batch
    tokens: int  # of the longest row; shorter rows are padded to it
    method: Literal["full", "lora"] = "lora"
    quantization: Literal["none", "nf4"] = "none"
    r: int = 16
    lora_dropout: float = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"
    gradient_checkpointing: bool = False
    accumulation_steps: int = 1  # micro batches per optimizer step
    loss_head: Literal["full", "chunked"] = "full"
    trained_positions: int | None = None  # of the micro batch, whose logits the loss takes; None: all
    optimizer: str = "adamw_torch_fused"
    device: Literal["cpu", "cuda", "mps"] = "cuda"
    attention: str = "sdpa"  # sdpa | eager | flash_attention_2
    padded: bool | None = None  # whether rows of a micro batch differ in length; None: they do where there are several

    @property
    def positions(self) -> int:
        """Tokens of the micro batch, padding counted."""
        return self.rows * self.tokens

    @property
    def loss_positions(self) -> int:
        """Positions of the micro batch that go through the head."""
        return self.positions if self.trained_positions is None else min(self.trained_positions, self.positions)

    @property
    def autocast(self) -> bool:
        """Whether matrix products are in 16 bits beside fp32 trained weights."""
        return self.dtype != "fp32"

    @property
    def activation_bytes(self) -> int:
        """Bytes of one element that a matrix product reads or writes."""
        return HALF_BYTES if self.autocast else FULL_BYTES

    @property
    def residual_bytes(self) -> int:
        """Bytes of one element of the residual stream, which has the type of the embedding."""
        return HALF_BYTES if self.autocast and self.method == "lora" else FULL_BYTES

    @property
    def has_padding(self) -> bool:
        """Whether attention gets a mask: torch then takes other kernels and the keys and values are repeated."""
        return self.rows > 1 if self.padded is None else self.padded
