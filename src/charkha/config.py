"""The wish: one frozen model per section of charkha.yaml.

Names are the ecosystem's (Hugging Face, PEFT, TRL). Every field has one line of meaning with its unit. Reading the file
is in `config_file.py`; what `auto` becomes here in `training/choices.py` and `plan/autos.py`; what is not carried out
in `carried_out.py`.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from charkha.errors import UsageError
from charkha.guard_limits import parse_budget, parse_windows
from charkha.hardware.ups import open_ups
from charkha.optimizers import require_optimizer
from charkha.personal_kinds import PERSONAL_KINDS
from charkha.units import parse_seconds


class Section(BaseModel):
    """Frozen; an unknown key is an error, a number is never made out of a string and is always finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


Name = Annotated[str, Field(min_length=1)]  # of a file, folder or model
_SHARE = r"\d+(\.\d+)?\s*%\s*"


class ModelSection(Section):
    """Which base model, and how it is held in memory."""

    base: Name = Field(
        description="Hub id that was fetched before, or a local folder; `starter` is the built-in model."
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a hub model; null takes the fetched one.")
    quantization: Literal["none", "nf4", "fp4", "int8"] = Field(
        "none", description="Storage of the frozen base weights; nf4 and fp4 use double quantization."
    )
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = Field("auto", description="Type of base weights and arithmetic.")
    attention: Literal["auto", "flash_attention_2", "sdpa", "eager"] = Field(
        "auto",
        description="Attention kernel; auto takes flash_attention_2 where package and GPU allow it, else sdpa, and "
        "eager for models that have no other.",
    )
    upcast_unquantized: Literal["auto"] | bool = Field(
        "auto", description="Norms, embeddings and head in fp32 beside a quantized base."
    )
    placement: Literal["auto", "resident", "streamed"] = Field(
        "auto",
        description="resident holds the base on the device; streamed brings its layers one by one from host RAM or "
        "disk, forward and again backward; auto streams what does not fit.",
    )
    host_tables: Literal["auto", "none", "embedding", "both"] = Field(
        "auto",
        description="What of a streamed base stays on the host beside its layers: embedding, or both embedding and "
        "head, which then passes through the device in blocks; auto takes what must for the rest to fit.",
    )


class AdapterSection(Section):
    """What is trained."""

    method: Literal["full", "lora", "dora", "rslora", "ia3", "prompt_tuning"] = Field(
        "lora",
        description="full trains every weight; lora, dora, rslora low-rank matrices beside frozen weights; ia3 one "
        "scale per row or column; prompt_tuning embeddings before every row.",
    )
    r: int = Field(16, ge=1, description="Rank of the LoRA matrices.")
    lora_alpha: float = Field(
        32, gt=0, description="LoRA scale: updates are multiplied by lora_alpha / r (rslora: lora_alpha / sqrt(r))."
    )
    lora_dropout: float = Field(0.05, ge=0, lt=1, description="Dropout before the LoRA matrices, as a probability.")
    target_modules: str | list[str] = Field(
        "all-linear", description="`all-linear`, or names of the linear layers that get an adapter."
    )
    modules_to_save: list[Name] = Field(
        default_factory=list, description="Modules trained whole and kept beside the adapter, such as [lm_head]."
    )
    layers_to_transform: list[Annotated[int, Field(ge=0)]] | None = Field(
        None, description="Numbers of the blocks, from 0, that get LoRA matrices; null is all of them."
    )
    rank_pattern: dict[Name, Annotated[int, Field(ge=1)]] = Field(
        default_factory=dict, description="Other ranks for some layers, by name or end of name: {down_proj: 32}."
    )
    alpha_pattern: dict[Name, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict, description="Other lora_alpha for some layers, by name or end of name."
    )
    loraplus_ratio: Annotated[float, Field(ge=1)] | None = Field(
        None, description="LoRA+: learning rate of the B matrices over that of A, for example 16; null is one rate."
    )
    num_virtual_tokens: int = Field(
        20, ge=1, description="prompt_tuning: trained embeddings that stand before every row."
    )


class DataSource(Section):
    """One training file with its own column mapping and weight."""

    path: Name = Field(description="File or folder, relative to the config file, or hub:org/name.")
    weight: float = Field(1.0, gt=0, le=1000, description="How often its rows stand in an epoch; 0.5 is half of them.")
    map: dict[str, str] = Field(default_factory=dict, description="Our field -> column of the file.")


class DataSection(Section):
    """Which rows are learned, and how they are rendered to tokens."""

    train: list[Name | DataSource] = Field(
        min_length=1, description="Files or folders, relative to the config file, or hub:org/name."
    )
    eval: float | int | str | None = Field(
        "5%", description="Held-out rows: a share (5% or 0.05), a count, a file, or null for none."
    )
    format: Literal[
        "auto", "messages", "prompt_completion", "alpaca", "sharegpt", "oasst", "text", "preference", "kto"
    ] = Field("auto", description="Row layout; auto detects it from the columns and says so.")
    map: dict[str, str] = Field(default_factory=dict, description="For example {prompt: question, completion: answer}.")
    template: str = Field("auto", description="Chat template: the tokenizer's (auto), a built-in family, or a file.")
    max_length: Literal["auto"] | Annotated[int, Field(ge=8)] = Field("auto", description="Longest row in tokens.")
    overlong: Literal["error", "drop", "split", "truncate"] = Field(
        "error", description="What happens to rows longer than max_length; every choice but error is counted and told."
    )
    train_on: Literal["responses", "all"] = Field("responses", description="Tokens that carry loss.")
    packing: Literal["auto"] | bool = Field(
        "auto",
        description="Several rows in one of max_length tokens, none cut, none seeing another; batch_size then counts "
        "these.",
    )
    personal: Literal["block", "report", "mask", "drop"] = Field(
        "block",
        description="Personal data and secrets in the rows: block refuses to train where a find is sure, report trains "
        "on them, mask puts stand-ins such as <PAN_1>, drop leaves those rows out; manifest.json keeps what was done.",
    )
    personal_keep: list[Name] = Field(
        default_factory=list, description="Kinds that are left as they are, such as [ifsc, date_of_birth]."
    )
    group_by: str | None = Field(None, description="Column whose values never stand on both sides of the split.")
    time_by: str | None = Field(None, description="Column of time; the latest rows are held out.")
    assistant: str | None = Field(None, description="Who of a chat export is the assistant; null: who answers first.")
    normalize: Literal["none", "nfc"] = Field("none", description="nfc composes Unicode text; none leaves it.")
    num_proc: Literal["auto"] | Annotated[int, Field(ge=1, le=256)] = Field(
        "auto", description="Processes that read and tokenize; auto: one a core for large files."
    )

    @field_validator("personal_keep")
    @classmethod
    def _kinds_are_known(cls, kinds: list[str]) -> list[str]:
        unknown = [kind for kind in kinds if kind not in PERSONAL_KINDS]
        if unknown:
            raise ValueError(f"{unknown[0]!r} is no kind; write some of {', '.join(PERSONAL_KINDS)}")
        return kinds

    @field_validator("eval")
    @classmethod
    def _eval_is_possible(cls, wish: float | int | str | None) -> float | int | str | None:
        share = wish
        if isinstance(wish, str) and wish.rstrip().endswith("%"):
            if re.fullmatch(_SHARE, wish) is None:
                raise ValueError(f"{wish!r} is not a share of the rows; write for example 5%")
            share = float(wish.rstrip()[:-1]) / 100
        if wish == "":
            raise ValueError("'' is not a file; write null for no held-out rows")
        if (isinstance(share, float) and not 0 <= share < 1) or (isinstance(share, int) and share < 0):
            raise ValueError(f"{wish!r} is neither a share below 100% (5% or 0.05) nor a count of rows (200)")
        return wish

    @field_validator("time_by")
    @classmethod
    def _split_one_way(cls, wish: str | None, info: ValidationInfo) -> str | None:
        if wish is not None and info.data.get("group_by") is not None:
            raise ValueError("rows are split by group_by or by time_by, not by both")
        return wish


class TrainingSection(Section):
    """The optimizer's path."""

    objective: Literal["sft", "dpo", "orpo", "kto", "reward", "grpo", "rloo"] = Field("sft", description="The loss.")
    init_from: str | None = Field(None, description="Run folder whose adapter is continued.")
    epochs: float = Field(3, gt=0, description="Passes over the training rows.")
    max_steps: Annotated[int, Field(ge=1)] | None = Field(None, description="Optimizer steps; wins over epochs.")
    learning_rate: float = Field(2e-4, gt=0, description="Peak learning rate.")
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup"] = Field(
        "cosine", description="Shape of the learning rate after warmup."
    )
    warmup_ratio: float = Field(0.03, ge=0, lt=1, description="Share of the steps in which the rate rises from 0.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW weight decay (not on norms and biases).")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are scaled down to this 2-norm.")
    batch_size: int = Field(16, ge=1, description="Sequences per optimizer step, over all devices.")
    micro_batch_size: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        "auto", description="Sequences in memory at once; the rest is accumulated. auto is the fastest that fits."
    )
    gradient_checkpointing: Literal["auto", "none", "full", "selective"] | bool = Field(
        "auto",
        description="Recompute activations: less memory, a third more arithmetic; selective keeps what attention's "
        "kernel gives; auto is none where that fits.",
    )
    loss_head: Literal["auto", "full", "chunked"] = Field(
        "auto", description="full: all logits of a micro batch at once; chunked: a few; auto is the faster that fits."
    )
    fused_kernels: Literal["auto", "none", "liger"] = Field("auto", description="Fused GPU kernels.")
    optimizer: str = Field(
        "auto", description="A transformers name; auto is adamw_torch_fused, or paged_adamw_8bit where full needs it."
    )
    eval_every: Literal["auto"] | Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, lt=1)] = Field(
        "auto", description="Steps between evaluations, or a share of an epoch (0.5); auto is once an epoch."
    )
    early_stopping: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Stop after this many evaluations without a better held-out loss."
    )
    seed: int = Field(42, ge=0, description="Seed of data order, initialisation and dropout.")

    @field_validator("optimizer")
    @classmethod
    def _optimizer_is_known(cls, optimizer: str) -> str:
        require_optimizer(optimizer)
        return optimizer


class DevicesSection(Section):
    """On what it runs."""

    strategy: Literal[
        "auto", "single", "ddp", "fsdp", "deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3", "mlx"
    ] = Field("auto", description="How the work is spread; auto is one device, or ddp where processes says more.")
    processes: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        "auto", description="Processes on this host, each with a device; auto is 1, with ddp one for each GPU."
    )
    hosts: list[str] = Field(default_factory=list, description="Further hosts.")
    shard_dtype: Literal["auto", "fp32", "bf16"] = Field("auto", description="Type of sharded trainable weights.")
    offload: str | list[str] = Field("none", description="none, optimizer, parameters, activations, or a list.")
    offload_to: Literal["cpu", "nvme"] = Field("cpu", description="Where offloaded tensors go.")


class CheckpointSection(Section):
    """How much work may be lost."""

    every: str = Field(
        "auto",
        description="Time (`5min`, `300s`) or steps (`50 steps`) between checkpoints: at most this much work is lost. "
        "auto is a minute, or longer where saving would otherwise take over 1 % of the run.",
    )
    keep: int = Field(2, ge=1, description="Newest verified checkpoints kept, beside the best and the pinned.")

    @field_validator("every")
    @classmethod
    def _every_is_time_or_steps(cls, every: str) -> str:
        interval_of(every)
        return every

    def interval(self) -> CheckpointInterval:
        """The interval as numbers; neither is set for auto."""
        return interval_of(self.every)


class CheckpointInterval(Section):
    """Time or steps between two checkpoints; neither is set where the cost of saving decides."""

    seconds: float | None = None
    steps: int | None = None


def interval_of(text: str) -> CheckpointInterval:
    """`"50 steps"`, a duration, or `auto`. Raises ValueError with the spellings."""
    if text.strip() == "auto":
        return CheckpointInterval()
    number, _, unit = text.strip().partition(" ")
    if unit.strip() in ("step", "steps"):
        if not number.isdigit() or int(number) < 1:
            raise ValueError(f"{text!r} is not a number of steps; write for example `50 steps`")
        return CheckpointInterval(steps=int(number))
    try:
        seconds = parse_seconds(text)
    except ValueError:
        raise ValueError(
            f"{text!r} is neither a duration (`5min`, `300s`) nor a number of steps (`50 steps`)"
        ) from None
    return CheckpointInterval(seconds=seconds)


class GuardSection(Section):
    """Limits at which the run waits or stops."""

    ups: Name = Field(
        "auto",
        description="Where the UPS is asked: `nut:NAME@HOST:PORT`, `apcupsd:HOST:PORT`, `battery`, `command:...` (exit "
        "0 mains, 1 battery, 2 low), none; auto asks NUT and apcupsd on this machine, then a laptop battery.",
    )
    max_gpu_temperature_c: float = Field(
        83, ge=40, le=110, description="GPU temperature in degrees Celsius that is held, by power limit or pacing."
    )
    max_power_w: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Watts that the GPUs may draw together, such as those of the inverter."
    )
    budget: float | str | None = Field(
        None, description="What the run may cost: money in cost.currency (500) or energy (`12 kWh`); then it stops."
    )
    windows: list[str] = Field(
        default_factory=list,
        description="Hours in which the run may work, such as [`22:00-06:00`, `Sat,Sun`]; outside it waits.",
    )

    @field_validator("ups")
    @classmethod
    def _ups_is_of_a_known_form(cls, ups: str) -> str:
        if ups != "auto":
            try:
                open_ups(ups)
            except UsageError as error:
                raise ValueError(f"{error.message}; {error.remedy}") from None
        return ups

    @field_validator("windows")
    @classmethod
    def _windows_can_be_read(cls, windows: list[str]) -> list[str]:
        parse_windows(windows)
        return windows

    @field_validator("budget")
    @classmethod
    def _budget_can_be_read(cls, budget: float | str | None) -> float | str | None:
        parse_budget(budget, _currency_named_in(str(budget)))
        return budget


def _currency_named_in(budget: str) -> str:
    """The letters of a budget, taken for its currency; whether that is cost.currency is asked with the whole config."""
    return "".join(letter for letter in budget if letter.isalpha()) or "INR"


class CostSection(Section):
    """What electricity costs here."""

    currency: str = Field("INR", description="Currency of every amount.")
    electricity_per_kwh: float = Field(10, ge=0, description="Your marginal price of one kWh.")


class Config(Section):
    """One charkha.yaml."""

    model: ModelSection
    adapter: AdapterSection = AdapterSection()
    data: DataSection
    training: TrainingSection = TrainingSection()
    devices: DevicesSection = DevicesSection()
    checkpoint: CheckpointSection = CheckpointSection()
    guard: GuardSection = GuardSection()
    cost: CostSection = CostSection()
    report_to: str | list[str] = Field(
        "none", description="Experiment trackers: tensorboard, wandb (offline), mlflow, trackio, or a list; none."
    )
    output: Name = Field(description="Run folder, relative to the config file.")
    trainer: dict[str, Any] = Field(
        default_factory=dict, description="Further TRL SFTConfig arguments, checked against that class."
    )

    @model_validator(mode="after")
    def _batch_divides(self) -> Config:
        micro = self.training.micro_batch_size
        if micro != "auto" and micro > self.training.batch_size:
            raise ValueError(
                f"training.micro_batch_size {micro} is larger than training.batch_size {self.training.batch_size}"
            )
        if self.adapter.method == "full" and self.model.quantization != "none":
            raise ValueError(
                f"adapter.method full trains every weight, which model.quantization {self.model.quantization} "
                "does not allow; use adapter.method lora, or quantization none"
            )
        return self
