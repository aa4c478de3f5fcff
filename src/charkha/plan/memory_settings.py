"""The settings of a run that decide how much memory its training step needs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

FULL_BYTES = 4  # fp32: trained weights, gradients, optimizer states, the loss
HALF_BYTES = 2  # bf16 and fp16

Method = Literal["full", "lora", "dora", "ia3", "prompt_tuning", "norms"]
HostTables = Literal["none", "embedding", "both"]
Strategy = Literal["single", "ddp", "fsdp", "deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3"]
# Whose loss runs. own: ours, which makes logits where a token is trained; transformers: over every position inside
# the model's forward; in_place: a kernel that turns fp32 logits into their gradient (Unsloth's and its descendants);
# ..._alone: as versions before 4.46; narrow, kept_chunks: in the logits' 16 bits.
LossKernel = Literal[
    "own",
    "transformers",
    "transformers_alone",
    "in_place",
    "in_place_alone",
    "narrow",
    "in_place_narrow",
    "kept_chunks",
]


@dataclass(frozen=True)
class HeldOutBatch:
    """Rows that are evaluated together, padded to the longest."""

    rows: int
    tokens: int
    padded: bool


@dataclass(frozen=True)
class MemorySettings:
    """One micro batch of the longest rows, and how the model is held; nothing in it is `auto`."""

    dtype: Literal["bf16", "fp16", "fp32"]
    rows: int  # of one micro batch on one device
    tokens: int  # of the longest row; shorter rows are padded to it
    method: Method = "lora"
    quantization: Literal["none", "nf4", "fp4", "int8"] = "none"
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
    lengths_vary: bool = False  # from micro batch to micro batch, with nothing that empties the allocator's cache
    # What follows is fixed in this version's own training, and says how other runs were made.
    double_quantization: bool = True
    upcast_unquantized: bool = False  # norms, embedding and head of a quantized base in fp32
    mixed_precision: bool = True  # autocast; False: matrix products in the type of the weights
    trained_dtype: Literal["fp32", "bf16"] = "fp32"  # of trained weights, their gradients and states
    selective: bool = False  # with gradient_checkpointing: what the attention kernel gives stays
    reentrant: bool = False  # torch's old checkpointing, which holds a layer's output while its gradients are taken
    loss_kernel: LossKernel = "own"  # where loss_head is full
    fused_norms: bool = False  # kernels that keep a norm's 16-bit input, not its fp32 copy
    fused_mlp: bool = False  # kernels that keep gate and up and make their product again
    fused_lora: bool = False  # kernels whose adapters share the base's input
    experts_in_turn: bool = False  # transformers before 5 ran one expert after another
    keys_repeated: bool = False  # older models repeat keys and values for every query head, whatever the kernel
    quantized_keeps_inputs: bool = False  # bitsandbytes before 0.43 kept what entered a frozen 4-bit layer
    kept_beside: int = 0  # elements a position and layer that other training code keeps and transformers does not
    modules_to_save: tuple[str, ...] = ()  # trained whole beside the adapter
    num_virtual_tokens: int = 0
    strategy: Strategy = "single"
    processes: int = 1
    hooks_keep_inputs: bool = False  # FSDP beside frozen weights, with re-entrant checkpointing
    offload: frozenset[str] = frozenset()  # optimizer, parameters, activations
    workspace_bytes: int = 32 * 2**20  # what torch gives cuBLAS on Hopper, once; older GPUs get about 8 MiB
    held_out: tuple[HeldOutBatch, ...] = ()  # the largest batches of the held-out loss; none where nothing is held out
    streamed: bool = False  # the frozen base comes layer by layer from host memory or disk
    streamed_resident_layers: int = 0  # of it, those that stay on the device
    streamed_slots: int = 2  # buffers of one layer each that the others take turns in
    streamed_from: Literal["ram", "disk"] = "ram"  # where the others wait
    host_tables: HostTables = "none"  # of a streamed base; only the rows in use, and blocks of the head, are brought
    casts_tables: bool = False  # whether the base's files have them in another type

    def cut_to(self, tokens: int) -> MemorySettings:
        """The same with no row longer than that, trained or held out."""
        held_out = tuple(replace(batch, tokens=min(batch.tokens, tokens)) for batch in self.held_out)
        return replace(self, tokens=tokens, trained_positions=None, held_out=held_out)

    @property
    def positions(self) -> int:
        """Tokens of the micro batch, padding counted."""
        return self.rows * (self.tokens + self.num_virtual_tokens)

    @property
    def loss_positions(self) -> int:
        """Positions of the micro batch that go through the head."""
        return self.positions if self.trained_positions is None else min(self.trained_positions, self.positions)

    @property
    def is_full(self) -> bool:
        """Whether every weight of the base is trained."""
        return self.method == "full"

    @property
    def is_narrow(self) -> bool:
        """Whether matrix products are in 16 bits."""
        return self.dtype != "fp32"

    @property
    def autocast(self) -> bool:
        """Whether matrix products cast fp32 trained weights themselves. Sharded weights arrive in 16 bits."""
        sharded_whole = self.is_full and self.shards_parameters
        return self.is_narrow and self.mixed_precision and self.trained_dtype == "fp32" and not sharded_whole

    @property
    def activation_bytes(self) -> int:
        """Bytes of one element that a matrix product reads or writes."""
        return HALF_BYTES if self.is_narrow else FULL_BYTES

    @property
    def trained_bytes(self) -> int:
        """Bytes of one element of a trained weight as the optimizer moves it."""
        return HALF_BYTES if self.is_narrow and self.trained_dtype == "bf16" else FULL_BYTES

    @property
    def base_bytes(self) -> int:
        """Bytes of one element of a base weight that is not quantized, as the device holds it."""
        if self.is_full:
            return self.trained_bytes
        return FULL_BYTES if self.upcast_unquantized and self.quantization != "none" else self.activation_bytes

    @property
    def residual_bytes(self) -> int:
        """Bytes of one element of the residual stream, which has the type of the embedding."""
        if self.is_full:
            return FULL_BYTES if self.autocast or not self.is_narrow else HALF_BYTES
        return self.base_bytes

    @property
    def has_padding(self) -> bool:
        """Whether attention gets a mask: torch then takes other kernels and the keys and values are repeated."""
        return self.rows > 1 if self.padded is None else self.padded

    @property
    def shards_parameters(self) -> bool:
        """Whether each process holds a part of the weights and gathers a layer when it is its turn."""
        return self.strategy in ("fsdp", "deepspeed_zero3") and self.processes > 1

    @property
    def shards_gradients(self) -> bool:
        """Whether each process keeps a part of the gradients."""
        return self.shards_parameters or (self.strategy == "deepspeed_zero2" and self.processes > 1)

    @property
    def shards_optimizer(self) -> bool:
        """Whether each process keeps a part of the optimizer's states."""
        return self.shards_gradients or (self.strategy == "deepspeed_zero1" and self.processes > 1)

    @property
    def is_deepspeed(self) -> bool:
        """Whether DeepSpeed holds the weights: 16-bit ones for the model and an fp32 master beside them."""
        return self.strategy.startswith("deepspeed") and self.processes > 1
