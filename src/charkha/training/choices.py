"""What every `auto` becomes on this machine, each with its reason: the rules that ask neither rows nor memory.

Micro batch, checkpointing, loss head and optimizer come from plan/autos.py; their rules here are the fixed values for a
base that the planner does not cover.
"""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from typing import Any, TypeVar

from charkha.backends.base import AdapterSpec, Dtype, Packing, StepPlan
from charkha.config import Config
from charkha.errors import ConfigError, ConfigProblem, EnvironmentProblem
from charkha.optimizers import BITSANDBYTES_OPTIMIZERS
from charkha.units import format_bytes

LONGEST_BY_DEFAULT = 4096
ALL_KERNELS = frozenset({"flash_attention_2", "sdpa", "eager"})
LARGE_LOGITS_BYTES = 256 << 20  # fp32; their gradient and a copy come on top
# 21.9 M parameters on a CPU with avx512_bf16: 1062 tokens per CPU second in bf16, 708 in fp32; 1.4 M: fp32 is faster.
BF16_PAYS_FROM = 10_000_000
Value = TypeVar("Value", str, int)


@dataclass(frozen=True)
class Choice:
    """One `auto` decided."""

    key: str
    value: Any
    reason: str

    def __str__(self) -> str:
        return f"{self.key}: {self.value} ({self.reason})"


@dataclass(frozen=True)
class DeviceFacts:
    """What the rules below ask of the machine. See hardware/probe.py for how it is read."""

    device: str  # cpu | cuda | mps
    name: str
    supports_bf16: bool
    compute_capability: tuple[int, int] | None
    native_bf16: bool = False  # of a CPU: has instructions for it, where others emulate it slowly
    count: int = 1
    here: bool = True  # whether it is this very computer, whose packages can be looked for


class Chooser:
    """Decides one key after another and remembers every choice that the user did not make."""

    def __init__(self, config: Config, facts: DeviceFacts) -> None:
        self._config = config
        self._facts = facts
        self.choices: list[Choice] = []

    def dtype(self, parameters: int) -> Dtype:
        asked = self._config.model.dtype
        if asked == "fp16" and self._facts.device != "cuda":
            raise _refused("model.dtype", asked, "fp16 needs a GPU to be of use", "bf16 or fp32")
        if asked == "bf16" and not self._facts.supports_bf16:
            raise _refused("model.dtype", asked, f"{self._facts.name} has no bf16 arithmetic", "fp16 or fp32")
        if asked != "auto":
            return asked
        if self._facts.device == "cpu":
            if not self._facts.native_bf16:
                return self._dtype("fp32", "this CPU has no instructions for bf16")
            if parameters < BF16_PAYS_FROM:
                return self._dtype("fp32", "on a CPU a base this small is no faster in bf16")
            return self._dtype("bf16", "this CPU computes in bf16: half the memory, about 1.5 times the speed")
        if self._facts.supports_bf16:
            return self._dtype("bf16", f"{self._facts.name} computes in bf16")
        return self._dtype("fp16", f"{self._facts.name} has no bf16 arithmetic")

    def _dtype(self, dtype: Dtype, reason: str) -> Dtype:
        self._choose("model.dtype", dtype, reason)
        return dtype

    def attention(self, dtype: str, kernels: frozenset[str] = ALL_KERNELS) -> str:
        """`kernels` are those that the architecture has."""
        asked = self._config.model.attention
        if asked != "auto" and asked not in kernels:
            raise _refused(
                "model.attention", asked, "the model's architecture has no such kernel", " or ".join(sorted(kernels))
            )
        missing = self._flash_attention_missing(dtype)
        if missing is None and "flash_attention_2" not in kernels:
            missing = "the model's architecture has no FlashAttention 2"
        if asked == "flash_attention_2" and missing:
            raise EnvironmentProblem(
                f"model.attention flash_attention_2 cannot be used: {missing}",
                where="model.attention",
                remedy="use attention: auto or sdpa",
            )
        if asked != "auto":
            return asked
        if missing is None and not self._facts.here:
            missing = "whether the package flash-attn is installed there is not known"
        if missing is None:
            return self._choose("model.attention", "flash_attention_2", "package and GPU allow it")
        if "sdpa" not in kernels:
            return self._choose("model.attention", "eager", f"the model's architecture has no sdpa, and {missing}")
        return self._choose("model.attention", "sdpa", missing)

    def quantization(self, stored: str | None) -> str:
        """`stored` is the quantization in which the base's files are; None for whole weights."""
        asked = self._config.model.quantization
        if stored is None or asked == stored:
            return asked
        if asked != "none":
            raise _refused("model.quantization", asked, f"the base's files are stored in {stored}", stored)
        if self._config.adapter.method == "full":
            raise _refused("adapter.method", "full", f"the base's files are stored in {stored}", "lora")
        return self._choose("model.quantization", stored, f"the base's files are stored in {stored}")

    def _flash_attention_missing(self, dtype: str) -> str | None:
        """Why FlashAttention 2 cannot be used here; None when it can (Ampere or newer, 16-bit types, package)."""
        if self._facts.device != "cuda":
            return "FlashAttention 2 needs a CUDA GPU"
        if (self._facts.compute_capability or (0, 0)) < (8, 0):
            return f"{self._facts.name} is older than Ampere"
        if dtype == "fp32":
            return "FlashAttention 2 has no fp32 kernels"
        if self._facts.here and importlib.util.find_spec("flash_attn") is None:
            return "the package flash-attn is not installed"
        return None

    def max_length(self, model_positions: int | None) -> int:
        asked = self._config.data.max_length
        if model_positions is not None and self._config.adapter.method == "prompt_tuning":
            model_positions = self._positions_beside_virtual_tokens(model_positions)
        if asked != "auto":
            if model_positions is not None and asked > model_positions:
                raise _refused(
                    "data.max_length", asked, f"the model has {model_positions} positions", f"{model_positions}"
                )
            return asked
        limit = min(model_positions or LONGEST_BY_DEFAULT, LONGEST_BY_DEFAULT)
        return self._choose("data.max_length", limit, f"the model's positions, at most {LONGEST_BY_DEFAULT}")

    def _positions_beside_virtual_tokens(self, positions: int) -> int:
        virtual = self._config.adapter.num_virtual_tokens
        if virtual + 8 > positions:
            raise _refused(
                "adapter.num_virtual_tokens",
                virtual,
                f"the model has {positions} positions",
                f"at most {positions - 8}",
            )
        return positions - virtual

    def processes(self) -> int:
        """How many processes train together, each on a device of its own (of a CPU they share the cores)."""
        strategy, asked = self._config.devices.strategy, self._config.devices.processes
        count = asked if isinstance(asked, int) else self._facts.count if strategy == "ddp" else 1
        self._require_devices(count)
        reason = f"one device: {self._facts.name}"
        if self._facts.count > 1:
            reason += f"; there are {self._facts.count}, and devices.processes: {self._facts.count} uses them"
        if strategy == "auto":
            several = "every process holds the model and adds up gradients with the others"
            self._choose("devices.strategy", "ddp" if count > 1 else "single", several if count > 1 else reason)
        if asked == "auto":
            self._choose("devices.processes", count, "one for each device" if strategy == "ddp" else "one device")
        return count

    def _require_devices(self, count: int) -> None:
        key, batch = "devices.processes", self._config.training.batch_size
        if count > 1 and self._config.devices.strategy == "single":
            raise _refused(key, count, "devices.strategy single is one process", "devices.strategy: ddp")
        if count > 1 and self._facts.device == "mps":
            raise _refused(key, count, "an Apple GPU is one device", "1")
        if self._facts.device == "cuda" and count > self._facts.count:
            raise _refused(key, count, f"this machine has {self._facts.count} GPUs", f"at most {self._facts.count}")
        if count > batch:
            raise _refused(key, count, f"training.batch_size {batch} has fewer rows", "a larger batch")

    def micro_batch_size(self, longest_row: int, *, packed: bool = False, processes: int = 1) -> int:
        asked = self._config.training.micro_batch_size
        batch = self._config.training.batch_size // processes
        if asked != "auto":
            return asked
        by_rows = self._facts.device == "cpu" and not packed
        most = 16 if by_rows else max(1, 4096 // max(longest_row, 1))
        # A divisor of the batch: every micro batch of a step is then equally full.
        fitting = max(size for size in range(1, min(batch, max(most, 1)) + 1) if batch % size == 0)
        reason = (
            "a whole batch of short rows at once" if fitting == batch else "a divisor of batch_size, about 4096 tokens"
        )
        return self._choose("training.micro_batch_size", fitting, reason)

    def gradient_checkpointing(self, longest_row: int, parameters: int) -> bool:
        asked = self._config.training.gradient_checkpointing
        if self._config.model.placement == "streamed":
            return self._checkpointing_of_streamed(asked)
        if asked in ("full", "selective", True):
            return True
        if asked in ("none", False):
            return False
        wanted = parameters >= 500_000_000 or longest_row > 2048
        reason = "a large base or long rows" if wanted else "a base under 0.5 B parameters and rows up to 2048 tokens"
        return self._choose("training.gradient_checkpointing", "full" if wanted else "none", reason) == "full"

    def _checkpointing_of_streamed(self, asked: str | bool) -> bool:
        if asked in ("none", False):
            reason = "a streamed base brings each layer back for the backward pass, which begins by running it again"
            raise _refused("training.gradient_checkpointing", asked, reason, "full")
        if asked == "auto":
            self._choose("training.gradient_checkpointing", "full", "a streamed base runs each layer twice")
        return True

    def loss_head(self, micro_batch_size: int, longest_row: int, vocabulary: int) -> str:
        asked = self._config.training.loss_head
        if asked != "auto":
            return asked
        logits_bytes = micro_batch_size * longest_row * vocabulary * 4
        if logits_bytes > LARGE_LOGITS_BYTES:
            return self._choose(
                "training.loss_head", "chunked", f"the logits of a micro batch would take {format_bytes(logits_bytes)}"
            )
        return self._choose("training.loss_head", "full", "the logits of a micro batch are small")

    def has_bitsandbytes(self) -> bool:
        """Whether its optimizers can be used; of a machine that is only described, it is taken for granted."""
        return not self._facts.here or importlib.util.find_spec("bitsandbytes") is not None

    def optimizer(self, picked: str | None = None) -> str:
        """`picked` is what a plan has decided, and told, where the config says auto."""
        asked = self._config.training.optimizer
        if asked in BITSANDBYTES_OPTIMIZERS and not self.has_bitsandbytes():
            raise EnvironmentProblem(
                f"{asked} needs bitsandbytes, which is not installed",
                where="training.optimizer",
                remedy="pip install 'bitsandbytes>=0.50.2', or use adamw_torch_fused",
            )
        if asked != "auto" or picked is not None:
            return picked or asked
        return self._choose("training.optimizer", "adamw_torch_fused", "AdamW in 32 bits, one fused kernel")

    def simple_defaults(self) -> None:
        """Keys whose `auto` has one answer in this version."""
        for key, value, reason in (
            ("model.upcast_unquantized", False, "norms, embeddings and head stay in model.dtype"),
            ("training.fused_kernels", "none", "only the kernels of torch"),
        ):
            section, name = key.split(".")
            if getattr(getattr(self._config, section), name) == "auto":
                self.choices.append(Choice(key, value, reason))

    def eval_steps(self, steps_per_epoch: int, has_eval: bool) -> int | None:
        asked = self._config.training.eval_every
        if not has_eval:
            return None
        if asked == "auto":
            return self._choose("training.eval_every", steps_per_epoch, "steps: once an epoch, and at the end")
        return asked if isinstance(asked, int) else max(1, round(asked * steps_per_epoch))

    def take(self, key: str, value: str | int, reason: str) -> None:
        """Records what was decided elsewhere for a key that is `auto`."""
        self.choices.append(Choice(key, value, reason))

    def _choose(self, key: str, value: Value, reason: str) -> Value:
        self.choices.append(Choice(key, value, reason))
        return value


@dataclass(frozen=True)
class StepMemory:
    """How one step is carried out; none of it but the optimizer changes what is learned."""

    micro_batch_size: int
    gradient_checkpointing: bool
    loss_head: str  # full | chunked
    optimizer: str
    selective: bool = False  # with checkpointing: what attention's kernel gives is kept and not made again


def step_plan(
    config: Config,
    memory: StepMemory,
    *,
    rows: int,
    eval_steps: int | None,
    packing: Packing | None = None,
) -> StepPlan:
    """The optimizer's path for `rows` training rows; with `packing` that many packed ones."""
    training = config.training
    steps_per_epoch = steps_of_an_epoch(config, rows)
    total = training.max_steps or max(1, round(training.epochs * steps_per_epoch))
    interval = config.checkpoint.interval()
    return StepPlan(
        total_steps=total,
        steps_per_epoch=steps_per_epoch,
        warmup_steps=0 if training.lr_scheduler_type == "constant" else int(training.warmup_ratio * total),
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.lr_scheduler_type,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        batch_size=training.batch_size,
        micro_batch_size=memory.micro_batch_size,
        gradient_checkpointing=memory.gradient_checkpointing,
        loss_head=memory.loss_head,
        optimizer=memory.optimizer,
        selective=memory.selective,
        seed=training.seed,
        eval_steps=eval_steps,
        checkpoint_seconds=interval.seconds,
        checkpoint_steps=interval.steps,
        checkpoints_kept=config.checkpoint.keep,
        trainer=dict(config.trainer),
        packing=packing,
    )


def steps_of_an_epoch(config: Config, rows: int) -> int:
    """Optimizer steps that `rows` rows make; the last may be short."""
    return math.ceil(rows / config.training.batch_size)


def adapter_spec(config: Config) -> AdapterSpec:
    """The adapter section as the backend takes it."""
    adapter = config.adapter
    targets = adapter.target_modules
    return AdapterSpec(
        method=adapter.method,
        r=adapter.r,
        lora_alpha=adapter.lora_alpha,
        lora_dropout=adapter.lora_dropout,
        target_modules=targets if isinstance(targets, str) else tuple(targets),
        modules_to_save=tuple(adapter.modules_to_save),
        layers_to_transform=None if adapter.layers_to_transform is None else tuple(adapter.layers_to_transform),
        rank_pattern=dict(adapter.rank_pattern),
        alpha_pattern=dict(adapter.alpha_pattern),
        loraplus_ratio=adapter.loraplus_ratio if adapter.method in ("lora", "dora", "rslora") else None,
        num_virtual_tokens=adapter.num_virtual_tokens,
    )


_USED_BY: dict[str, frozenset[str]] = {
    "full": frozenset(),
    "ia3": frozenset({"target_modules", "modules_to_save"}),
    "prompt_tuning": frozenset({"num_virtual_tokens"}),
}


def unused_adapter_keys(config: Config, keys_set: frozenset[str]) -> list[str]:
    """Keys of the adapter section that the user set and that the chosen method does not use, one note each."""
    method = config.adapter.method
    everything = frozenset(type(config.adapter).model_fields) - {"method"}
    used = _USED_BY.get(method, everything - {"num_virtual_tokens"})
    return [
        f"adapter.{name} is not used by method {method}"
        for name in sorted(everything - used)
        if f"adapter.{name}" in keys_set
    ]


def _refused(key: str, value: object, reason: str, works: str) -> ConfigError:
    return ConfigError(
        "config", [ConfigProblem(key, f"{value!r} cannot be used here: {reason}", remedy=f"use {works}")]
    )
