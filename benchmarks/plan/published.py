"""Published runs as the planner's settings: what a row of measurements.csv says, and nothing read off its result.

What a publisher does not print (the library's version, the type of adapter weights) is taken from its tool and its
date, in the tables below, never from the measured number.
"""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from charkha.errors import CharkhaError
from charkha.hardware.catalog import Gpu, UnknownGpu, find_gpu
from charkha.plan.architecture import Architecture, read_architecture
from charkha.plan.memory_settings import MemorySettings
from charkha.plan.popular_models import popular_config

Row = dict[str, str]

# transformers version of publishers that do not print one, by the date of what they published.
_TRANSFORMERS_OF = (
    ("modelscope/ms-swift", (4, 36)),
    ("unslothai/unsloth", (4, 36)),
    ("AnswerDotAI/fsdp_qlora", (4, 38)),
    ("linkedin/Liger-Kernel", (4, 44)),
    ("huggingface/blog", (4, 41)),
)
# Tools with models and losses of their own, in which adapters have the type of the model.
_OWN_MODELS = ("torchtune", "torchtitan", "litgpt", "llm-foundry", "torchao", "pytorch/ao", "NeMo", "xtuner")
_ADAPTERS_IN_16_BITS = ("torchtune", "litgpt", "fsdp_qlora", "unsloth")


# llm-foundry's yamls: width, layers, heads.
_MPT = {
    f"MPT-{size}": {"model_type": "mpt", "d_model": width, "n_layers": layers, "n_heads": heads, "vocab_size": 50368}
    for size, width, layers, heads in (
        ("1b", 2048, 24, 16), ("3b", 2560, 32, 20), ("7b", 4096, 32, 32), ("13b", 5120, 40, 40), ("30b", 7168, 48, 64),
    )
}  # fmt: skip


class NotExpressible(Exception):
    """Why a row cannot be put to the planner."""


@dataclass(frozen=True)
class Published:
    """A row, and what the planner is asked for it."""

    row: Row
    architecture: Architecture
    settings: MemorySettings
    gpu: Gpu | None
    counter: str  # allocated | reserved | device (nvidia-smi, a monitor) | unstated
    peak_bytes: float | None
    out_of_memory: bool
    tokens_per_second: float | None  # of one card
    speed_settings: MemorySettings  # at the mean length where that is published
    version: str


def read_published(path: Path) -> tuple[list[Published], list[tuple[Row, str]]]:
    """(rows that can be expressed, rows that cannot with the reason)."""
    expressed: list[Published] = []
    left: list[tuple[Row, str]] = []
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            try:
                expressed.append(express(row))
            except NotExpressible as reason:
                left.append((row, str(reason)))
    return expressed, left


def express(row: Row) -> Published:
    """The row as settings. Raises NotExpressible."""
    architecture = _architecture(row)
    if "litgpt" in row["source"]:
        architecture = _with_one_projection(architecture)
    settings = _settings(row, architecture)
    mean = re.search(r"mean about (\d+) tokens", row["seq_kind"])
    return Published(
        row=row,
        architecture=architecture,
        settings=settings,
        speed_settings=replace(settings, tokens=int(mean[1])) if mean else settings,
        gpu=_gpu(row),
        counter=_counter(row),
        peak_bytes=float(row["peak_mem_gib"]) * 2**30 if row["peak_mem_gib"] else None,
        out_of_memory=row["mem_as_published"].startswith("OOM") or "out of memory" in row["notes"].lower(),
        tokens_per_second=_tokens_per_second(row),
        version=_version_text(row),
    )


def _architecture(row: Row) -> Architecture:
    name = re.sub(r"\s*\(.*\)$", "", row["model"])
    config = _MPT[name] if name in _MPT else popular_config(name)
    if config is None:
        raise NotExpressible(f"the shape of {row['model']} is not in the table of models")
    try:
        return read_architecture(config)
    except CharkhaError as error:
        raise NotExpressible(error.message) from None


def _with_one_projection(architecture: Architecture) -> Architecture:
    """As litgpt builds every model: query, key and value out of one linear layer (lit_gpt/model.py)."""
    if architecture.fused_projections:
        return architecture
    query, key, value, *rest = architecture.linears
    whole = replace(query, name="attn.qkv", outputs=query.outputs + key.outputs + value.outputs)
    return replace(architecture, fused_projections=True, linears=(whole, *rest))


def _settings(row: Row, architecture: Architecture) -> MemorySettings:
    if not row["batch"].isdigit():
        raise NotExpressible("the batch is not published")
    length = re.match(r"\d+", row["seq_len"])
    if not length:
        raise NotExpressible("the length of the rows is not published")
    if "SNAPSHOT" in row["mem_unit"]:
        raise NotExpressible("a snapshot between moments, not a peak")
    if "load or unshard moment" in row["notes"]:
        raise NotExpressible("the peak is of loading, by its publisher's note, not of training")
    if re.search(r"gptq|float8|fp8|int8 mixed", row["base_dtype"] + row["compute_dtype"], re.IGNORECASE):
        raise NotExpressible("quantized with GPTQ, or arithmetic in 8 bits")
    if re.search(r"TP \d|CP [2-9]|PP \d|device_map", row["sharding_offload"]):
        raise NotExpressible("layers or tensors split over cards")
    settings = MemorySettings(
        dtype="fp16" if row["compute_dtype"] == "fp16" else "bf16",
        rows=int(row["batch"]),
        tokens=int(length[0]),
        accumulation_steps=_accumulation(row),
        optimizer=_optimizer(row),
        attention=_attention(row),
        padded=_padded(row),
        lengths_vary=_lengths_vary(row),
        **_method(row, architecture),
        **_sharding(row),
        **_checkpointing(row),
        **_kernels(row, architecture),
        kept_beside=_padded_updates(row, architecture),
    )
    gpu = _gpu(row)
    if gpu is not None and gpu.capability is not None and gpu.capability < (9, 0):
        settings = replace(settings, workspace_bytes=2 * 8_519_680)
    return settings


def _padded_updates(row: Row, architecture: Architecture) -> int:
    """Of query and value, whose updates litgpt pads with zeros by index_copy, which keeps them (lit_gpt/lora.py)."""
    if "litgpt" not in row["source"] or row["method"] == "full" or row["lora_targets"] != "q v":
        return 0
    return architecture.query_size + architecture.key_value_size


def _accumulation(row: Row) -> int:
    return int(row["grad_accum"]) if row["grad_accum"].isdigit() else 1


def _optimizer(row: Row) -> str:
    text = row["optimizer"].lower()
    if "in-backward" in text:
        raise NotExpressible("the optimizer steps inside the backward pass")
    if "lora-fa" in text:
        raise NotExpressible("an optimizer of its own (LoRA-FA)")
    if "none (forward" in text:
        raise NotExpressible("no optimizer step")
    if "4bit" in text or "4-bit" in text:
        return "adamw_torch_4bit"
    if "8bit" in text or "8-bit" in text:
        return "paged_adamw_8bit" if "paged" in text else "adamw_8bit"
    if "paged" in text:
        return "paged_adamw_32bit"
    return "adamw_torch_fused" if "fused" in text else "adamw_torch"


def _attention(row: Row) -> str:
    text = row["attention"].lower()
    if text == "eager":
        return "eager"
    return "flash_attention_2" if "flash" in text else "sdpa"


def _padded(row: Row) -> bool | None:
    return None if "pad" in row["seq_kind"] or "cap" in row["seq_kind"] else False


def _upcasts(row: Row) -> bool:
    """PEFT's prepare_model_for_kbit_training, which TRL calls for a quantized base; not under FSDP."""
    trl = "unslothai" in row["source"] and row["kernels"] == "none"
    return trl or ("upcast to fp32" in row["kernels"] and row["n_gpus"] == "1")


def _lengths_vary(row: Row) -> bool:
    return bool(re.search("cap;|padded to|max only", row["seq_kind"])) and "cache emptied" not in row["mem_unit"]


def _method(row: Row, architecture: Architecture) -> dict[str, Any]:
    method, base = row["method"], row["base_dtype"]
    if method.startswith("full"):
        fp32 = "fp32" in base or "fp32" in row["compute_dtype"] or "HF --bf16" in base
        return {"method": "full", "trained_dtype": "fp32" if fp32 else "bf16", "mixed_precision": fp32}
    if method == "ln_tuning":
        return {"method": "norms", "mixed_precision": False}
    if method not in ("lora", "qlora", "qlora + trained embeddings and head", "lora(dora)"):
        raise NotExpressible(f"the method {method} is not one of charkha's")
    nf4 = "nf4" in base
    if method.startswith("qlora") and not nf4:
        raise NotExpressible(f"the base type {base} is not one of charkha's")
    distinguishes = "litgpt" in row["source"]
    narrow = any(tool in row["source"] for tool in _ADAPTERS_IN_16_BITS)
    autocast = bool(re.search("autocast|mixed", row["compute_dtype"])) and "no autocast" not in row["compute_dtype"]
    if "fp32 weights" in base:
        raise NotExpressible("a base in fp32 under autocast")
    return {
        "method": "dora" if "dora" in method else "lora",
        "quantization": "nf4" if nf4 else "none",
        "double_quantization": "no double" not in base and (not distinguishes or "double" in base),
        "upcast_unquantized": nf4 and _upcasts(row),
        "mixed_precision": autocast or (not re.search(r"no autocast|true", row["compute_dtype"]) and not narrow),
        "trained_dtype": "bf16" if narrow else "fp32",
        "r": int((re.match(r"\d+", row["lora_r"]) or re.match("8", "8"))[0]),  # type: ignore[index]
        "lora_dropout": _dropout(row),
        "target_modules": _targets(row["lora_targets"], architecture),
        "modules_to_save": ("lm_head", "embed_tokens") if "embeddings and head" in method else (),
    }


def _dropout(row: Row) -> float:
    """Unprinted: the examples of the tools have 0.05 to 0.1, and kernels that fuse adapters need none."""
    return 0.0 if re.search("fused LoRA|^unsloth", row["kernels"]) or "peft:" in row["source"] else 0.05


def _targets(text: str, architecture: Architecture) -> str | tuple[str, ...]:
    names = tuple(linear.name for linear in architecture.linears)
    if re.search(r"all|mlp|\*_proj", text) and "lm_head" not in text:
        return "all-linear"
    if "lm_head" in text:
        return (*names, "lm_head")
    wanted = set(re.findall(r"[a-z_]+", text.replace("_proj", "")))
    if "default" in text and ("attn" in text or "qkv" in text):
        wanted = {"q", "k", "v", "qkv"}
    fused = [name for name in names if re.search("query_key_value|qkv|c_attn|Wqkv", name)]
    found = [name for name in names if name.rpartition(".")[2].removesuffix("_proj") in wanted]
    if fused and wanted & {"q", "k", "v", "qkv", "c_attn"}:
        found = [*fused, *found]
    if not found:
        raise NotExpressible(f"the adapted layers are not published ({text!r})")
    return tuple(dict.fromkeys(found))


def _sharding(row: Row) -> dict[str, Any]:
    text, count = row["sharding_offload"], int(row["n_gpus"] or 1)
    away = set()
    if re.search("CPU param|CPU offload", text):
        away |= {"parameters", "optimizer"}
    if "activation offload" in text:
        away.add("activations")
    if "NO_SHARD" in text:
        return {"strategy": "fsdp", "processes": 1}  # FSDP's hooks around weights that each card has whole
    if count == 1:
        strategy = "single"
    elif "ZeRO-3" in text:
        strategy = "deepspeed_zero3"
    elif "FSDP" in text or "FSDP" in row["base_dtype"]:
        strategy = "fsdp"
    else:
        raise NotExpressible(f"how the cards share the work is not said ({text!r})")
    return {"strategy": strategy, "processes": count if strategy != "single" else 1, "offload": frozenset(away)}


def _checkpointing(row: Row) -> dict[str, Any]:
    text = row["grad_checkpointing"]
    if text.startswith("not") or not text:
        raise NotExpressible("whether activations are checkpointed is not said")
    if "selective" in text:
        raise NotExpressible("torchtitan's selective checkpointing, of every second layer or product")
    return {
        "gradient_checkpointing": text != "none",
        "reentrant": "(HF)" in text or "(re-entrant)" in text,
        "hooks_keep_inputs": "(HF)" in text or "(re-entrant)" in text,
    }


def _kernels(row: Row, architecture: Architecture) -> dict[str, Any]:
    text, own = row["kernels"], any(tool in row["source"] for tool in _OWN_MODELS)
    fused = bool(re.search("RMSNorm|liger|unsloth|compile|CCE|triton", text)) and not text.startswith("none")
    chunked = bool(re.search(r"liger|chunked CE|CCE|compile", text)) and "in 128-token" not in text
    version = _version(row)
    if "in 128-token" in text:
        kernel = "kept_chunks"
    elif architecture.model_type == "gpt_bigcode":
        kernel = "in_place_narrow" if "fused" in text and text[:5] == "fused" else "narrow"
    elif re.search("fused CE|fused LoRA/CE|unsloth", text):
        kernel = "in_place" if version >= (4, 46) else "in_place_alone"
    else:
        kernel = "transformers" if version >= (4, 46) else "transformers_alone"
    return {
        "loss_head": "chunked" if chunked else "full",
        "loss_kernel": kernel,
        "fused_norms": fused,
        "fused_mlp": bool(re.fullmatch("liger|unsloth", text)) or "compile" in text,
        "fused_lora": bool(re.search("fused LoRA|^unsloth|triton LoRA", text)),
        "experts_in_turn": version < (5, 0),
        "keys_repeated": version < (4, 48) and not own,
        "quantized_keeps_inputs": version < (4, 40) or "bnb 0.41" in row["notes"],
    }


def _version(row: Row) -> tuple[int, int]:
    printed = re.search(r"transformers (\d+)\.(\d+)", row["notes"])
    if printed:
        return int(printed[1]), int(printed[2])
    return next((version for source, version in _TRANSFORMERS_OF if source in row["source"]), (4, 48))


def _version_text(row: Row) -> str:
    torch = re.search(r"torch (\d+\.\d+)", row["notes"])
    major, minor = _version(row)
    own = next((tool for tool in _OWN_MODELS if tool in row["source"]), None)
    return f"torch {torch[1] if torch else '?'}, {own or f'transformers {major}.{minor}'}"


def _gpu(row: Row) -> Gpu | None:
    try:
        return find_gpu(re.sub(r",.*|\(printed.*", "", row["gpu"]).strip())
    except UnknownGpu:
        return None


def _counter(row: Row) -> str:
    unit = row["mem_unit"].lower()
    if "unslothai" in row["source"]:
        return "reserved"  # what its notebooks print
    if "monitoring" in unit or "nvidia-smi" in unit:
        return "device"
    if "reserved" in unit and "allocated" not in unit and "not stated" not in unit:
        return "reserved"
    if "allocated" in unit and "reserved" not in unit:
        return "allocated"
    return "unstated"


def _tokens_per_second(row: Row) -> float | None:
    if not row["tokens_per_s"] or not re.fullmatch(r"[\d.]+", row["tokens_per_s"]):
        return None
    whole = re.search(r"\ball\b|both|total", row["tokens_basis"])
    return float(row["tokens_per_s"]) / (int(row["n_gpus"]) if whole else 1)
