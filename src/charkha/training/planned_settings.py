"""From a config, a base model's shape, a machine and the rows to settings in which nothing is `auto`.

`charkha plan` and `charkha train` decide here, by the same code, so that the same config on the same machine comes to
the same settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

from charkha.backends.base import Dtype
from charkha.carried_out import CARRIED_OUT, unsupported
from charkha.config import Config
from charkha.errors import ConfigError, ConfigProblem
from charkha.hardware.machine import Machine
from charkha.plan.architecture import Architecture
from charkha.plan.autos import CHECKPOINTING, LOSS_HEAD, MICRO_BATCH, OPTIMIZER, USUAL_OPTIMIZER, Free, Way
from charkha.plan.base_checks import stored_quantization
from charkha.plan.loss_memory import with_the_loss_that_runs
from charkha.plan.memory_settings import MemorySettings, Method, Strategy
from charkha.plan.packing_support import BY_MASK
from charkha.plan.placement import place
from charkha.plan.rows import Rows
from charkha.plan.search import evaluate
from charkha.plan.streamed import why_not_resident, why_not_streamed
from charkha.plan.weights import adapts_experts, why_not_quantized
from charkha.training.choices import ALL_KERNELS, Chooser, DeviceFacts, StepMemory
from charkha.training.placing import PLACEMENT, offloaded_note, streamed_note, take_tables

_WORKSPACE_BEFORE_HOPPER = 2 * 8_519_680  # torch's default for cuBLAS and cuBLASLt, once each
_WITHOUT_SDPA = frozenset({"gemma2", "gpt_oss"})  # of the architectures covered, in transformers 5.23

_TORCH_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


@dataclass(frozen=True)
class ModelChoices:
    """How the base is held, which does not depend on the rows."""

    dtype: Dtype
    attention: str
    quantization: str
    processes: int
    model_type: str  # as config.json has it
    cannot_stream: str | None  # why its layers cannot be brought one by one; None where they can
    cannot_stay: str | None  # why they cannot all be on the device
    is_cast: bool = False  # whether the base's files are said to have another type than `dtype`
    is_stored_quantized: bool = (
        False  # whether they are in the storage that they are trained in, and no other can be had
    )


@dataclass(frozen=True)
class PlannedSettings:
    """Settings with what was said beside the chooser's own choices, in the order of the config."""

    settings: MemorySettings
    step: StepMemory
    way: Way  # as the search judged it
    reasons: tuple[str, ...]
    is_stored_quantized: bool = False


def device_facts(machine: Machine) -> DeviceFacts:
    """What the rules of choices.py ask of that machine."""
    gpu = machine.gpu
    return DeviceFacts(
        device=machine.device,
        name=gpu.name if gpu else "CPU",
        supports_bf16=gpu.has_bf16 if gpu else True,
        compute_capability=gpu.capability if gpu else None,
        native_bf16=machine.cpu_bf16,
        count=max(1, len(machine.gpus)),
        here=machine.here,
    )


def choose_model(
    config: Config,
    chooser: Chooser,
    machine: Machine,
    base_config: Mapping[str, Any],
    parameters: int,
    kernels: frozenset[str] | None = None,
) -> ModelChoices:
    """What is decided before the rows are read. Raises ConfigError and EnvironmentProblem for what cannot be.

    `kernels` are the attention kernels of the model's class; None where it cannot be asked.
    """
    model_type = str(base_config.get("model_type"))
    dtype = chooser.dtype(parameters)
    without = ALL_KERNELS - {"sdpa"} if model_type in _WITHOUT_SDPA else ALL_KERNELS
    return ModelChoices(
        dtype=dtype,
        attention=chooser.attention(dtype, without if kernels is None else kernels),
        quantization=(quantization := chooser.quantization(stored := stored_quantization(base_config))),
        processes=(processes := _processes(config, chooser, machine)),
        model_type=model_type,
        cannot_stream=why_not_streamed(
            base_config,
            config.adapter.method,
            quantization,
            _targets(config),
            processes=processes,
            device=machine.device,
        ),
        cannot_stay=why_not_resident(base_config, quantization),
        is_cast=_written_dtype(base_config)
        not in (None, {"bf16": "bfloat16", "fp16": "float16"}.get(dtype, "float32")),
        is_stored_quantized=stored is not None,
    )


def _written_dtype(base_config: Mapping[str, Any]) -> str | None:
    """What config.json says of the type that weights are stored in, under its name of today or of old."""
    written = base_config.get("dtype") or base_config.get("torch_dtype")
    return written if isinstance(written, str) else None


def planned_settings(
    config: Config,
    chooser: Chooser,
    model: ModelChoices,
    architecture: Architecture,
    machine: Machine,
    rows: Rows,
) -> PlannedSettings:
    """What training holds for one micro batch of the longest rows, on each device of `machine`.

    Raises ConfigError for a base that is to be streamed and cannot be.
    """
    if config.model.placement == "streamed" and model.cannot_stream is not None:
        problem = ConfigProblem(PLACEMENT, f"streamed, but {model.cannot_stream}", remedy="use auto or resident")
        raise ConfigError("config", [problem])
    chooser.simple_defaults()
    reasons: list[str] = []
    open_keys = _open_keys(config, chooser)
    leanest = _leanest(config, model, chooser)
    start = _shared_settings(config, model, architecture, machine, rows, leanest, reasons)
    free = Free(open_keys, chooser.has_bitsandbytes())
    placed = place(config, architecture, start, free, machine, rows, model.cannot_stream, model.cannot_stay)
    picked, settings = placed.picked, placed.picked.way.settings
    if placed.reason is not None:
        chooser.take(PLACEMENT, "streamed" if settings.streamed else "resident", placed.reason)
    take_tables(config, chooser, architecture, settings)
    for key, value in _values(settings).items():
        if key in open_keys:
            chooser.take(key, value, picked.reasons[key])
    if chooser.recomputes_in_any_case:
        chooser.gradient_checkpointing(rows.longest, architecture.parameters)
    if settings.streamed:
        reasons.append(streamed_note(architecture, settings))
    if chooser.offloads_activations:
        reasons.append(offloaded_note(architecture, settings))
    if (config.training.loss_head, settings.loss_head) == ("full", "chunked"):
        reasons.append("training.loss_head: chunked all the same, since a head on the host comes in blocks")
    step = StepMemory(
        settings.rows,
        settings.gradient_checkpointing,
        settings.loss_head,
        chooser.optimizer(settings.optimizer),
        selective=settings.selective,
        offload_activations=chooser.offloads_activations,
    )
    notes = (*reasons, *chooser.offload_note(), *_not_carried_out(config, architecture, settings))
    return PlannedSettings(settings, step, picked.way, notes, model.is_stored_quantized)


def fixed_values_note(why: str) -> str:
    """Said where no plan decides."""
    return f"micro batch, checkpointing, loss head and optimizer are fixed values where they are auto: {why}"


def _open_keys(config: Config, chooser: Chooser) -> frozenset[str]:
    """The keys of memory and speed that are `auto` and that nothing else decides."""
    training = config.training
    taken = {CHECKPOINTING} if chooser.recomputes_in_any_case else set()
    taken |= {LOSS_HEAD} if training.fused_kernels == "liger" else set()
    names = (MICRO_BATCH, CHECKPOINTING, LOSS_HEAD, OPTIMIZER)
    return frozenset(key for key in names if getattr(training, key.partition(".")[2]) == "auto") - taken


def _values(settings: MemorySettings) -> dict[str, str | int]:
    return {
        MICRO_BATCH: settings.rows,
        CHECKPOINTING: "full" if settings.gradient_checkpointing else "none",
        LOSS_HEAD: settings.loss_head,
        OPTIMIZER: settings.optimizer,
    }


def _leanest(config: Config, model: ModelChoices, chooser: Chooser) -> StepMemory:
    """What the config says, and where it says auto what needs least."""
    training = config.training
    asked, micro = training.gradient_checkpointing, training.micro_batch_size
    per_device = max(1, training.batch_size // model.processes)
    return StepMemory(
        micro_batch_size=1 if micro == "auto" else min(micro, per_device),
        gradient_checkpointing=asked in ("auto", "full", "selective", True),
        loss_head="chunked" if training.loss_head == "auto" else training.loss_head,
        optimizer=USUAL_OPTIMIZER if training.optimizer == "auto" else training.optimizer,
        offload_activations=chooser.offloads_activations,
    )


def chosen_step(
    config: Config, chooser: Chooser, model: ModelChoices, rows: Rows, parameters: int, vocabulary: int
) -> StepMemory:
    """Micro batch, checkpointing, loss head and optimizer by fixed rules: for a base that no plan covers."""
    per_device = max(1, config.training.batch_size // model.processes)
    micro = min(chooser.micro_batch_size(rows.longest, packed=rows.packed, processes=model.processes), per_device)
    return StepMemory(
        micro_batch_size=micro,
        gradient_checkpointing=chooser.gradient_checkpointing(rows.longest, parameters),
        loss_head=chooser.loss_head(micro, rows.longest, vocabulary),
        optimizer=chooser.optimizer(),
        offload_activations=chooser.offloads_activations,
        selective=config.training.gradient_checkpointing == "selective",
    )


def _shared_settings(
    config: Config,
    model: ModelChoices,
    architecture: Architecture,
    machine: Machine,
    rows: Rows,
    step: StepMemory,
    reasons: list[str],
) -> MemorySettings:
    """The settings of that step, and how devices share it out; what was decided there goes to `reasons`."""
    settings = with_the_loss_that_runs(_settings(config, model, machine, rows, step), architecture)
    return _shared_out(settings, config, architecture, machine, reasons)


def _settings(config: Config, model: ModelChoices, machine: Machine, rows: Rows, step: StepMemory) -> MemorySettings:
    training, adapter = config.training, config.adapter
    liger = training.fused_kernels == "liger"
    wide = config.devices.shard_dtype != "bf16"
    quantized = model.quantization != "none"
    # Packed rows are given to the kernel by their documents' bounds, or have no padding: no mask either way.
    by_bounds = rows.packed and model.model_type not in BY_MASK
    return MemorySettings(
        dtype=model.dtype,
        rows=step.micro_batch_size,
        tokens=rows.longest,
        method=_method(config),
        quantization=cast(Any, model.quantization),
        r=adapter.r,
        lora_dropout=adapter.lora_dropout,
        target_modules=_targets(config),
        rank_pattern=tuple(adapter.rank_pattern.items()),
        layers_to_transform=tuple(sorted(set(adapter.layers_to_transform or ()))) or None,
        gradient_checkpointing=step.gradient_checkpointing,
        accumulation_steps=-(-training.batch_size // (step.micro_batch_size * model.processes)),
        loss_head=cast(Any, step.loss_head),
        trained_positions=rows.trained_positions.get(step.micro_batch_size),
        optimizer=step.optimizer,
        device=cast(Any, machine.device),
        attention=model.attention,
        padded=False if by_bounds or model.attention == "flash_attention_2" else None,
        lengths_vary=not rows.packed and "torch_empty_cache_steps" not in config.trainer,
        upcast_unquantized=config.model.upcast_unquantized is True and quantized,
        mixed_precision=adapter.method != "full" or wide,
        trained_dtype="fp32" if wide or model.dtype == "fp32" else "bf16",
        selective=training.gradient_checkpointing == "selective",
        fused_norms=liger,
        fused_mlp=liger,
        modules_to_save=tuple(adapter.modules_to_save),
        num_virtual_tokens=adapter.num_virtual_tokens if adapter.method == "prompt_tuning" else 0,
        processes=model.processes,
        offload=config.devices.offloaded - (frozenset() if step.offload_activations else {"activations"}),
        casts_tables=model.is_cast,
        workspace_bytes=_workspace(machine),
        held_out=rows.held_out,
    )


def _processes(config: Config, chooser: Chooser, machine: Machine) -> int:
    """Of this computer what training would take; of a machine that is described, every card it has."""
    asked = config.devices.processes
    if config.devices.strategy == "single":
        return 1 if not machine.here else chooser.processes()
    if machine.here and config.devices.strategy in CARRIED_OUT["devices.strategy"]:
        return chooser.processes()
    hosts = 1 + len(config.devices.hosts)
    cards = len(machine.gpus)
    if cards and asked != "auto" and asked > cards:
        problem = ConfigProblem(
            "devices.processes", f"{asked} devices on a machine with {cards}", remedy=f"at most {cards}"
        )
        raise ConfigError("config", [problem])
    count = (max(1, cards) if asked == "auto" else asked) * hosts
    if count > config.training.batch_size:
        raise ConfigError(
            "config",
            [
                ConfigProblem(
                    "training.batch_size",
                    f"{config.training.batch_size} rows a step cannot be shared out over {count} devices",
                    remedy=f"a multiple of {count}",
                )
            ],
        )
    return count


def _method(config: Config) -> Method:
    return cast(Method, {"rslora": "lora"}.get(config.adapter.method, config.adapter.method))


def _targets(config: Config) -> str | tuple[str, ...]:
    wanted = config.adapter.target_modules
    return wanted if isinstance(wanted, str) else tuple(wanted)


def _workspace(machine: Machine) -> int:
    gpu = machine.gpu
    older = gpu is not None and gpu.capability is not None and gpu.capability < (9, 0)
    return _WORKSPACE_BEFORE_HOPPER if older else MemorySettings.workspace_bytes


def _shared_out(
    settings: MemorySettings, config: Config, architecture: Architecture, machine: Machine, reasons: list[str]
) -> MemorySettings:
    """How several devices share the work: what the config says, or whole copies where they fit and shards where not."""
    asked = config.devices.strategy
    if settings.processes == 1 or asked in ("single", "mlx"):
        return settings
    if machine.here and asked == "auto":  # the only way of this version's training
        return replace(settings, strategy="ddp")
    if asked != "auto":
        return _with_hooks(replace(settings, strategy=cast(Strategy, asked)))
    copies = replace(settings, strategy="ddp")
    if evaluate(architecture, copies, machine).device_fits:
        reasons.append(f"devices.strategy: ddp (a whole copy fits on each of {settings.processes} devices)")
        return copies
    reasons.append(f"devices.strategy: fsdp (a whole copy does not fit, shards on {settings.processes} devices may)")
    return _with_hooks(replace(settings, strategy="fsdp"))


def _with_hooks(settings: MemorySettings) -> MemorySettings:
    """FSDP beside frozen weights as it was measured in published runs, which all had the hooks that keep inputs."""
    return replace(settings, hooks_keep_inputs=settings.strategy == "fsdp" and not settings.is_full)


def _not_carried_out(config: Config, architecture: Architecture, settings: MemorySettings) -> list[str]:
    """What of the settings, asked for or decided, training refuses."""
    told = {key: (value, works) for key, value, works in unsupported(config)}
    if config.devices.strategy == "auto" and settings.strategy not in CARRIED_OUT["devices.strategy"]:
        told["devices.strategy"] = (settings.strategy, "ddp")
    said = [
        f"{key}: {value} is planned for, but `charkha train` of this version does not carry it out ({works} works)"
        for key, (value, works) in told.items()
    ]
    refusal = None if settings.streamed else why_not_quantized(architecture, settings)
    if refusal is not None:
        said.append(f"model.quantization: {settings.quantization} is planned for, but training refuses it: {refusal}")
    if adapts_experts(architecture, settings) and settings.lora_dropout > 0:
        said.append("adapter.lora_dropout: training refuses any on this model's experts; use 0, or name target_modules")
    return said
