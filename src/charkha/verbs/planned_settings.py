"""From a config, a base model's shape and a machine to settings in which nothing is `auto`, each with its reason.

The rules of training (`training/choices.py`) decide wherever they do not ask this very computer; what they would ask of
it is taken from the machine that is planned for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

from charkha.config import Config, unsupported
from charkha.errors import ConfigError, ConfigProblem
from charkha.hardware.machine import Machine
from charkha.plan.architecture import Architecture
from charkha.plan.device_memory import DeviceMemory
from charkha.plan.loss_memory import with_the_loss_that_runs
from charkha.plan.memory_settings import MemorySettings, Method, Strategy
from charkha.plan.search import evaluate
from charkha.training.choices import Chooser, DeviceFacts

_WORKSPACE_BEFORE_HOPPER = 2 * 8_519_680  # torch's default for cuBLAS and cuBLASLt, once each
_OFFLOADS = ("optimizer", "parameters", "activations")


@dataclass(frozen=True)
class Rows:
    """What is known of the data: finished rows, or only how many there are, or nothing."""

    longest: int
    mean: float
    count: int | None
    trained_positions: Mapping[int, int] = field(default_factory=dict)  # of the longest micro batch, by its rows
    known: bool = False  # whether lengths were counted, not taken as max_length
    packed: bool = False


@dataclass(frozen=True)
class PlannedSettings:
    """Settings with what was chosen, as sentences, in the order of the config."""

    settings: MemorySettings
    reasons: tuple[str, ...]


def chooser_of(config: Config, machine: Machine) -> Chooser:
    """Training's own rules, asked about that machine."""
    gpu = machine.gpu
    facts = DeviceFacts(
        device=machine.device,
        name=gpu.name if gpu else "this CPU",
        supports_bf16=gpu.has_bf16 if gpu else True,
        compute_capability=gpu.capability if gpu else None,
        native_bf16=False,
    )
    return Chooser(config, facts)


def planned_settings(
    config: Config, chooser: Chooser, architecture: Architecture, machine: Machine, rows: Rows
) -> PlannedSettings:
    """What training would hold for one micro batch of the longest rows, on each device of `machine`."""
    training, devices, model = config.training, config.devices, config.model
    reasons: list[str] = []
    processes = _processes(config, machine)
    per_device = max(1, training.batch_size // processes)
    head_default = model.upcast_unquantized is True and model.quantization != "none"
    micro = min(chooser.micro_batch_size(rows.longest, packed=rows.packed), per_device)
    selective = training.gradient_checkpointing == "selective"
    dtype = chooser.dtype(architecture.parameters)
    liger = training.fused_kernels == "liger"
    wide = devices.shard_dtype != "bf16"
    settings = MemorySettings(
        dtype=dtype,
        rows=micro,
        tokens=rows.longest,
        method=_method(config),
        quantization=model.quantization,
        r=config.adapter.r,
        lora_dropout=config.adapter.lora_dropout,
        target_modules=_targets(config),
        gradient_checkpointing=selective or chooser.gradient_checkpointing(rows.longest, architecture.parameters),
        accumulation_steps=-(-training.batch_size // (micro * processes)),
        loss_head=_loss_head(config, chooser, micro, rows.longest, architecture.vocab_size),
        trained_positions=rows.trained_positions.get(micro),
        optimizer="adamw_torch_fused" if training.optimizer == "auto" else training.optimizer,
        device=cast(Any, machine.device),
        attention="sdpa" if model.attention == "auto" else model.attention,
        padded=False if rows.packed or model.attention == "flash_attention_2" else None,
        lengths_vary=not rows.packed and "torch_empty_cache_steps" not in config.trainer,
        upcast_unquantized=head_default,
        mixed_precision=config.adapter.method != "full" or wide,
        trained_dtype="fp32" if wide or dtype == "fp32" else "bf16",
        selective=selective,
        fused_norms=liger,
        fused_mlp=liger,
        modules_to_save=tuple(config.adapter.modules_to_save),
        num_virtual_tokens=config.adapter.num_virtual_tokens if config.adapter.method == "prompt_tuning" else 0,
        processes=processes,
        offload=_offload(config),
        workspace_bytes=_workspace(machine),
    )
    settings = with_the_loss_that_runs(settings, architecture)
    settings = _shared_out(settings, config, architecture, machine, reasons)
    settings = _placed(settings, config, architecture, machine, reasons)
    notes = tuple(f"{choice.key}: {choice.value} ({choice.reason})" for choice in chooser.choices)
    return PlannedSettings(settings, (*notes, *reasons, *_not_carried_out(config)))


def _processes(config: Config, machine: Machine) -> int:
    asked = config.devices.processes
    if config.devices.strategy == "single":
        return 1
    hosts = 1 + len(config.devices.hosts)
    count = (max(1, len(machine.gpus)) if asked == "auto" else asked) * hosts
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


def _loss_head(config: Config, chooser: Chooser, micro: int, longest: int, vocabulary: int) -> Any:
    if config.training.fused_kernels == "liger" and config.training.loss_head == "auto":
        return "chunked"
    return chooser.loss_head(micro, longest, vocabulary)


def _offload(config: Config) -> frozenset[str]:
    wish = config.devices.offload
    names = [wish] if isinstance(wish, str) else wish
    unknown = [name for name in names if name not in (*_OFFLOADS, "none")]
    if unknown:
        problem = ConfigProblem("devices.offload", f"{unknown[0]!r} is none of {', '.join(_OFFLOADS)}, none")
        raise ConfigError("config", [problem])
    return frozenset(names) - {"none"}


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
    if asked != "auto":
        return _with_hooks(replace(settings, strategy=cast(Strategy, asked)))
    copies = replace(settings, strategy="ddp")
    if evaluate(architecture, copies, machine).fits:
        reasons.append(f"devices.strategy: ddp (a whole copy fits on each of {settings.processes} devices)")
        return copies
    reasons.append(f"devices.strategy: fsdp (a whole copy does not fit, shards on {settings.processes} devices may)")
    return _with_hooks(replace(settings, strategy="fsdp"))


def _with_hooks(settings: MemorySettings) -> MemorySettings:
    """FSDP beside frozen weights as it was measured in published runs, which all had the hooks that keep inputs."""
    return replace(settings, hooks_keep_inputs=settings.strategy == "fsdp" and not settings.is_full)


def _placed(
    settings: MemorySettings, config: Config, architecture: Architecture, machine: Machine, reasons: list[str]
) -> MemorySettings:
    if config.model.placement != "streamed" or settings.is_full:
        return settings
    settings = replace(settings, streamed=True)
    resident = most_resident_layers(architecture, settings, machine)
    reasons.append(f"model.placement: streamed ({resident} of {architecture.layers} layers stay on the device)")
    return replace(settings, streamed_resident_layers=resident)


def most_resident_layers(architecture: Architecture, settings: MemorySettings, machine: Machine) -> int:
    """How many layers of a streamed base fit beside everything else."""
    low, high = 0, architecture.layers - 2
    while low < high:
        middle = (low + high + 1) // 2
        memory: DeviceMemory = evaluate(
            architecture, replace(settings, streamed_resident_layers=middle), replace(machine, ram_bytes=None)
        ).memory
        if machine.gpu and memory.least <= machine.gpu.memory_bytes:
            low = middle
        else:
            high = middle - 1
    return low


def _not_carried_out(config: Config) -> list[str]:
    return [
        f"{key}: {value} is planned for, but `charkha train` of this version does not carry it out ({works} works)"
        for key, value, works in unsupported(config)
    ]
