"""How long a training step takes: arithmetic, memory traffic, what is dequantized, moved between cards, and launched.

Each term has its own cause and its own limit of the card; only communication overlaps with arithmetic. The shares of
a card's peaks that are reached were set once on published runs (docs/plan-accuracy.md has every residual): one for
matrix products, one for memory traffic, for all cards of a kind.
"""

from __future__ import annotations

from dataclasses import dataclass

from charkha.hardware.catalog import Gpu
from charkha.plan.architecture import Architecture
from charkha.plan.memory_settings import MemorySettings
from charkha.plan.optimizer_memory import optimizer_memory
from charkha.plan.weights import adapter_targets, layer_weight_bytes, trainable_parameters

# Share of the peak that matrix products of a training step reach, between large ones.
_PRODUCT_SHARE = {"datacenter": 0.80, "workstation": 0.75, "desktop": 0.85, "laptop": 0.70, "amd": 0.45, "apple": 0.55}
# Sustained 10^12 operations per watt, by compute capability: cards whose power limit is low for their units throttle.
_PER_WATT = {
    (7, 0): 0.35,
    (7, 5): 0.45,
    (8, 0): 0.64,
    (8, 6): 0.40,
    (8, 9): 0.62,
    (9, 0): 0.90,
    (10, 0): 1.4,
    (12, 0): 0.5,
}
_TRAFFIC_SHARE = 0.80  # of the memory bandwidth
_TRAFFIC_SHARE_LARGE_CACHE = 0.95  # Ada, Hopper and later: some of what is written is still in the cache when read
_LINK_SHARE = 0.6
_ALWAYS_SEEN = 0.25  # of what is gathered, the share that no arithmetic hides
_COLLECTIVE_SECONDS = 2e-4  # to start one gather or reduction
_LAUNCH_SECONDS = 7e-6
_KERNELS_A_LAYER = 110  # forward and backward of one layer, without recomputing
# On a CPU the program waits for every operation, so what it takes to begin one comes on top. A 1.4 M model, LoRA, one
# thread: CPU seconds of a step of 16 rows in micro batches of 16, 8, 4, 2, 1 rows: 0.26, 0.27, 0.30, 0.40, 0.55.
_CPU_LAUNCH_SECONDS = 2e-5
_CPU_SHARE = 0.5


@dataclass(frozen=True)
class StepTime:
    """Seconds of one micro batch on one device, and by cause. `optimizer_seconds` is once per optimizer step."""

    products_seconds: float
    attention_seconds: float
    traffic_seconds: float
    dequantization_seconds: float
    communication_seconds: float  # beyond what hides behind arithmetic
    launch_seconds: float
    optimizer_seconds: float
    flops_per_token: float
    waits: bool = False  # whether the next operation is begun only when the last one is done
    exposed_copy_seconds: float = 0.0  # of a streamed base, beyond what hides behind arithmetic; see streamed_time.py

    @property
    def micro_batch_seconds(self) -> float:
        """Forward and backward of one micro batch."""
        busy = self.products_seconds + self.attention_seconds + self.traffic_seconds + self.dequantization_seconds
        alone = busy + self.launch_seconds if self.waits else max(busy, self.launch_seconds)
        return alone + self.communication_seconds + self.exposed_copy_seconds

    def step_seconds(self, accumulation_steps: int) -> float:
        """One optimizer step."""
        return accumulation_steps * self.micro_batch_seconds + self.optimizer_seconds


def step_time(
    architecture: Architecture, settings: MemorySettings, gpu: Gpu | None, *, cpu_flops: float = 1e11
) -> StepTime:
    """Seconds of one micro batch of full rows on `gpu`, or on a CPU where it is None."""
    limits = _limits(gpu, settings, cpu_flops)
    flops = _product_flops(architecture, settings)
    attention = _attention_flops(architecture, settings)
    gathered = _gathered_seconds(architecture, settings, gpu)
    products = flops * settings.positions / limits.flops
    return StepTime(
        products_seconds=products,
        attention_seconds=attention * settings.positions / (_attention_share(gpu) * limits.flops),
        traffic_seconds=_traffic_bytes(architecture, settings) / limits.bytes_per_second,
        dequantization_seconds=_dequantized_bytes(architecture, settings) / limits.bytes_per_second,
        communication_seconds=max(_ALWAYS_SEEN * gathered, gathered - 0.7 * products)
        + _collectives_seconds(architecture, settings),
        launch_seconds=_launch_seconds(architecture, settings, _LAUNCH_SECONDS if gpu else _CPU_LAUNCH_SECONDS),
        optimizer_seconds=_optimizer_bytes(architecture, settings) / limits.bytes_per_second,
        flops_per_token=flops + attention,
        waits=gpu is None,
    )


def _attention_share(gpu: Gpu | None) -> float:
    """Of what matrix products reach. FlashAttention 2 and torch's kernels do not use Hopper's own instructions."""
    return 0.36 if gpu is not None and (gpu.capability or (0, 0)) >= (9, 0) else 0.48


@dataclass(frozen=True)
class _Limits:
    flops: float
    bytes_per_second: float


def _limits(gpu: Gpu | None, settings: MemorySettings, cpu_flops: float) -> _Limits:
    if gpu is None:
        return _Limits(cpu_flops * _CPU_SHARE * (2 if settings.is_narrow else 1), 2e10)
    peak = gpu.flops if settings.is_narrow and (settings.dtype == "fp16" or gpu.has_bf16) else gpu.flops / 4
    reached = peak * _PRODUCT_SHARE.get(gpu.kind, 0.6)
    if gpu.capability is not None:
        reached = min(reached, gpu.power_w * 1e12 * _PER_WATT.get(gpu.capability, 0.6))
    large_cache = (gpu.capability or (0, 0)) >= (8, 9)
    traffic = _TRAFFIC_SHARE_LARGE_CACHE if large_cache else _TRAFFIC_SHARE
    return _Limits(reached, gpu.bandwidth_bytes_per_s * traffic)


def active_matrix_weights(architecture: Architecture) -> int:
    """Weights of one layer's matrices that a token is multiplied with."""
    experts = architecture.experts
    return sum(linear.weights for linear in architecture.linears) + (
        experts.per_token * experts.weights + experts.router_parameters if experts else 0
    )


def _product_flops(architecture: Architecture, settings: MemorySettings) -> float:
    """Of one token: two per weight forward, two for the inputs' gradient, two for the weight's where it is trained."""
    layers = architecture.layers * active_matrix_weights(architecture)
    head = architecture.vocab_size * architecture.hidden_size
    passes = 2 + (1 if settings.is_full else 0)
    recomputed = 1.0 if settings.gradient_checkpointing else 0.0
    adapters = sum(linear.inputs + linear.outputs for linear in adapter_targets(architecture, settings)) * settings.r
    trained = 2.0 * (3 + recomputed) * architecture.layers * adapters if settings.method in ("lora", "dora") else 0.0
    head_share = settings.loss_positions / settings.positions
    head_passes = passes + (1 if settings.loss_head == "chunked" and settings.is_full else 0)
    return 2.0 * (passes + recomputed) * layers + 2.0 * head_passes * head * head_share + trained


def _attention_flops(architecture: Architecture, settings: MemorySettings) -> float:
    """Of one token: scores and their product with the values, over half the row where the kernel skips the future."""
    seen = settings.tokens if settings.attention == "eager" else settings.tokens / 2
    forward = 4.0 * seen * architecture.query_size * architecture.layers
    recomputed = 1.0 if settings.gradient_checkpointing and not settings.selective else 0.0
    return forward * (1 + 2.5 + recomputed)


def _traffic_bytes(architecture: Architecture, settings: MemorySettings) -> float:
    """Bytes that pass through the card's memory beside the products: norms, rotation, activation, adapters, logits."""
    hidden, width = architecture.hidden_size, settings.residual_bytes / 2
    count = len(architecture.norms) + (1 if architecture.query_key_norms else 0)
    # An unfused RMSNorm casts, squares, averages, scales, casts back and multiplies: 34 bytes an element.
    norms = count * hidden * (4 if settings.fused_norms or architecture.final_norm.kind == "layer" else 34)
    turned = (architecture.query_size + architecture.key_value_size) * (4 if settings.fused_norms else 24)
    experts = architecture.experts.per_token if architecture.experts else 1
    inner = experts * architecture.intermediate_size * (6 if settings.fused_mlp else 10)
    moved = 2 * experts * hidden * 8 if architecture.experts else 0  # to its experts and back
    layer = (norms + 12 * hidden) * width + turned + inner + moved + _adapter_traffic(architecture, settings)
    if settings.residual_bytes == 4 and settings.is_narrow:
        layer += 6 * (2 * hidden + architecture.query_size + experts * architecture.intermediate_size)  # casts
    passes = 3 + (1 if settings.gradient_checkpointing else 0)  # backward counts as two
    # Chunks save passes over memory on a GPU; on a CPU they were measured 1 to 4 % slower than all logits at once.
    in_chunks = settings.loss_head == "chunked" and settings.device != "cpu"
    logits = settings.loss_positions * architecture.vocab_size * (16.0 if in_chunks else 32.0)
    return architecture.layers * layer * passes * settings.positions + logits


def _adapter_traffic(architecture: Architecture, settings: MemorySettings) -> float:
    """Of one token and layer: the input cast and dropped out, B's product scaled and added to the base's."""
    if settings.method not in ("lora", "dora"):
        return 0.0
    targets = adapter_targets(architecture, settings)
    if settings.fused_lora:
        return float(sum(4 * linear.inputs + 6 * linear.outputs for linear in targets))
    wide = settings.is_narrow and not settings.autocast and settings.trained_dtype == "fp32"
    read, written = (19, 20) if wide else (7, 12)
    return float(sum(read * linear.inputs + written * linear.outputs for linear in targets))


def _dequantized_bytes(architecture: Architecture, settings: MemorySettings) -> float:
    """4- and 8-bit weights are unpacked to 16 bits, written and read, in every pass over them."""
    if settings.quantization == "none":
        return 0.0
    passes = 2 + (1 if settings.gradient_checkpointing else 0)
    weights = architecture.layers * architecture.linear_weights
    return float(passes * weights) * (0.55 + 2 * 2 if settings.quantization != "int8" else 1 + 2 * 2)


def _gathered_seconds(architecture: Architecture, settings: MemorySettings, gpu: Gpu | None) -> float:
    """What one micro batch moves between cards, or from the host where weights are kept there."""
    if gpu is None:
        return 0.0
    layers = architecture.layers * layer_weight_bytes(architecture, settings)
    passes = 2 + (1 if settings.gradient_checkpointing and not settings.is_full else 0)
    host = gpu.pcie_bytes_per_s * _LINK_SHARE
    seconds = 0.0
    if settings.processes == 1:
        return seconds
    link, others = gpu.link_bytes_per_s * _LINK_SHARE, (settings.processes - 1) / settings.processes
    gradients = trainable_parameters(architecture, settings) * settings.activation_bytes * others / link
    if not settings.shards_parameters:
        return seconds + 2 * gradients / max(1, settings.accumulation_steps)
    if "parameters" in settings.offload:
        seconds += passes * layers / settings.processes / host
    return seconds + passes * layers * others / link + gradients


def _collectives_seconds(architecture: Architecture, settings: MemorySettings) -> float:
    """Starting gathers and reductions; FSDP wraps each adapter matrix by itself."""
    if settings.processes == 1:
        return 0.0
    units = 1 + (2 * len(adapter_targets(architecture, settings)) if settings.shards_parameters else 0)
    passes = 3 if settings.shards_parameters else 1
    return architecture.layers * units * passes * _COLLECTIVE_SECONDS


def _launch_seconds(architecture: Architecture, settings: MemorySettings, one_seconds: float) -> float:
    adapted = 8 * len(adapter_targets(architecture, settings))
    passes = 1.5 if settings.gradient_checkpointing else 1.0
    experts = 15 * architecture.experts.count if architecture.experts else 0
    return architecture.layers * (_KERNELS_A_LAYER + adapted + experts) * passes * one_seconds


def _optimizer_bytes(architecture: Architecture, settings: MemorySettings) -> float:
    """Weights, gradients and states read and written."""
    trained = trainable_parameters(architecture, settings)
    optimizer = optimizer_memory(settings.optimizer, settings.trained_bytes, settings.device)
    share = settings.processes if settings.shards_optimizer else 1
    once = 2 * optimizer.states + 5 * settings.trained_bytes
    return (
        trained * once * (2.5 if optimizer.temporary else 1.0) / share
    )  # torch's default goes over them again and again
