"""What crosses the wall between the rooms above and a backend: plain records, and who is told about progress.

A backend is a handful of functions over these records (`backends/torch/`: load, train, evaluate, generate, merge).
Nothing here imports a framework.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

Dtype = Literal["bf16", "fp16", "fp32"]


@dataclass(frozen=True)
class Streaming:
    """How a frozen base passes through the device layer by layer; see backends/torch/streaming.py."""

    slots: int = 2  # buffers of one layer each that the other layers take turns in
    hot_layers: int = 0  # stay on the device, spread evenly over the base
    tier: Literal["auto", "ram", "disk"] = "auto"  # where the layers wait; a CPU always reads them from the disk
    expert_slots: int = 0  # buffers of one expert each; 0: as many as a gigabyte holds, at most a layer's
    embedding_on_host: bool = False  # only the rows in use go to the device; a tied table stays with its head
    head_on_host: bool = False  # passes through the device in blocks; a tied embedding is then on the host as well
    expected_hidden_share: float | None = None  # of copying, by the plan; said beside what is measured


@dataclass(frozen=True)
class BaseModelSpec:
    """A base model as it is to be held in memory; nothing in it is `auto` any more."""

    path: Path
    dtype: Dtype
    attention: str
    quantization: str  # none | nf4 | fp4 | int8
    device: str  # cpu | cuda | mps
    streaming: Streaming | None = None  # None: the whole base is held on the device


@dataclass(frozen=True)
class AdapterSpec:
    """What is trained on top of the base."""

    method: str  # full | lora | dora | rslora | ia3 | prompt_tuning
    r: int
    lora_alpha: float
    lora_dropout: float
    target_modules: str | tuple[str, ...]
    modules_to_save: tuple[str, ...] = ()
    layers_to_transform: tuple[int, ...] | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    loraplus_ratio: float | None = None
    num_virtual_tokens: int = 20


@dataclass(frozen=True)
class Packing:
    """Packed rows: how many hold how many documents, and the share of their room that is filled (0 to 1)."""

    row_tokens: int
    rows: int
    documents: int
    fill_rate: float


@dataclass(frozen=True)
class StepPlan:
    """The optimizer's path, with every number decided."""

    total_steps: int
    steps_per_epoch: int
    warmup_steps: int
    learning_rate: float
    lr_scheduler_type: str
    weight_decay: float
    max_grad_norm: float
    batch_size: int
    micro_batch_size: int
    gradient_checkpointing: bool
    loss_head: str  # full | chunked
    optimizer: str
    seed: int
    eval_steps: int | None  # optimizer steps between evaluations; None: never
    checkpoint_seconds: float | None
    checkpoint_steps: int | None
    checkpoints_kept: int
    trainer: dict[str, Any]  # further SFTConfig arguments
    packing: Packing | None = None  # batch_size and micro_batch_size then count packed rows
    selective: bool = False  # with gradient_checkpointing: what attention's kernel gives is kept and not made again


class PeerGone(RuntimeError):
    """Several processes could not add up or agree: one of them is gone. Why, it says itself, not this."""


@dataclass(frozen=True)
class Place:
    """Which of how many processes on this host this one is, and the file by which they find each other.

    `waits` is told when this process begins (True) and ends (False) to wait for all others; `fails` of an error, before
    the connection to the others is given up.
    """

    rank: int = 0
    count: int = 1
    meeting: Path = Path()
    waits: Callable[[bool], None] = lambda _waiting: None
    fails: Callable[[BaseException], None] = lambda _error: None


@dataclass(frozen=True)
class HeldOutLoss:
    """Mean negative log-likelihood (natural log) over all trained held-out tokens, whatever the batch size."""

    loss: float
    tokens: int
    seconds: float
    row_losses: tuple[float, ...]  # mean per row, in the order of the shard


@dataclass(frozen=True)
class TrainOutcome:
    """How one call of `train` ended."""

    status: Literal["done", "paused"]
    step: int
    trained_tokens: int  # tokens of real rows seen in this call, without padding
    seconds: float  # of this call, evaluation and saving left out
    peak_memory_bytes: int | None
    trainable_parameters: int
    total_parameters: int
    quantized_modules: tuple[str, ...]


@dataclass(frozen=True)
class TraceRequest:
    """Everything that decides how much memory one training step needs; nothing in it is `auto`.

    `config` is the content of config.json. Every micro batch has `micro_batch_size` rows of `sequence_length` tokens;
    `row_lengths` says otherwise (shorter rows are padded to the longest, which then must be `sequence_length`).
    With `document_lengths` rows are packed: each holds documents of these lengths.
    """

    config: dict[str, Any]
    adapter: AdapterSpec
    micro_batch_size: int
    sequence_length: int
    dtype: Dtype = "bf16"
    attention: str = "sdpa"  # sdpa | eager | flash_attention_2
    quantization: str = "none"  # none | nf4 | fp4 | int8
    double_quantization: bool = True
    upcast_unquantized: bool = False  # norms, embeddings and head in fp32 beside a quantized base
    trainable_dtype: Dtype = "fp32"  # of trained weights, their gradients and optimizer states
    row_lengths: tuple[int, ...] = ()
    document_lengths: tuple[int, ...] = ()
    trained_tokens_per_row: int | None = None  # the last ones of each row; None: all
    accumulation_steps: int = 1
    gradient_checkpointing: Literal["none", "full", "selective"] = "none"
    loss_head: str = "full"  # full | chunked
    optimizer: str = "adamw_torch_fused"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    device: Literal["cuda", "cpu"] = "cuda"
    compute_capability: tuple[int, int] = (8, 9)  # decides between attention kernels, and cuBLAS's workspace
    held_out_lengths: tuple[int, ...] = ()  # of the rows of a batch that is evaluated before and after the steps
    expandable_segments: bool = False
    device_limit_bytes: int | None = None  # of what may be reserved; free segments are given back when it is met


@dataclass(frozen=True)
class TraceResult:
    """Peak memory of two optimizer steps. `breakdown` sums to `peak_allocated_bytes`, largest first.

    On a CPU nothing is reserved beyond what is allocated. `fits` is None without a `device_limit_bytes`; when it is
    False, the peaks are those up to the allocation that found no room.
    """

    peak_allocated_bytes: int
    peak_reserved_bytes: int
    breakdown: dict[str, int]
    peak_moment: str
    between_steps_bytes: int  # allocated after the last optimizer step
    fits: bool | None
    trainable_parameters: int
    operators: int
    seconds: float  # that the trace took; of the first time when it comes from the cache
    notes: tuple[str, ...]


@dataclass(frozen=True)
class ProbedStep:
    """One real optimizer step of a probe: one or two micro batches. Its memory was measured, or it was timed."""

    kind: Literal["first", "later", "median", "worst"]  # first, later: as the run's first step, and its largest after
    rows: tuple[int, ...]  # of each micro batch
    longest: tuple[int, ...]  # tokens of the longest row of each
    tokens: int  # of all its rows, without padding
    seconds: float  # of the whole step, slowed down by the measuring where memory was measured on a CPU
    first_seconds: float | None = None  # of a timed one: until the first of two micro batches was done, else the whole
    peak_allocated_bytes: int | None = None
    peak_reserved_bytes: int | None = None


@dataclass(frozen=True)
class ProbeResult:
    """What a probe of the device found, in the order of its steps. `loading_peak_bytes` is None on a CPU."""

    steps: tuple[ProbedStep, ...]
    loading_peak_bytes: int | None


class Recorder(Protocol):
    """Takes events as they happen: `recorder("step", step=1, loss=...)`; see events.py for the vocabulary."""

    def __call__(self, name: str, **fields: Any) -> object: ...


@dataclass(frozen=True)
class Order:
    """What the training loop does at a step boundary, beside going on. `reason` is for people."""

    save: bool = False
    pause: bool = False  # save, then stand still until an order without it
    stop: bool = False  # save, then leave
    idle_seconds: float = 0.0  # stand still before the next step
    reason: str | None = None


class Steering(Protocol):
    """Where a run's orders come from: signals, the run folder's control file, the guard."""

    def order(self, step_seconds: float) -> Order:
        """The order of now, asked at every step boundary; `step_seconds` is what the last step took."""
        ...

    def beat(self) -> None:
        """Told that the run gets on: every micro batch, evaluation batch and try at a save."""
        ...
