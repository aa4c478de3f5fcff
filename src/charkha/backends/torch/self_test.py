"""Small proofs that torch and bitsandbytes compute right on this machine, and how fast bytes reach its cards.

Run by `charkha doctor` as a process of its own, so that a broken driver ends no other:

    python -P -m charkha.backends.torch.self_test NAME      (devices | four_bit | attention | transfers)

leaves one JSON object as the last line of its output.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

_SIZE = 1024
_COPIED_BYTES, _COPIES = 256 << 20, 5  # large enough that starting a copy does not count


def devices() -> dict[str, Any]:
    """What torch was built for, and for every device a product of two matrices in bf16 against the same in fp32."""
    kind = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    torch.manual_seed(0)
    left, right = torch.randn(_SIZE, _SIZE), torch.randn(_SIZE, _SIZE)
    cards = []
    for index in range(torch.cuda.device_count() if kind == "cuda" else 1):
        device = torch.device(kind, index)
        name, capability = kind, None
        if kind == "cuda":
            name, capability = torch.cuda.get_device_name(index), list(torch.cuda.get_device_capability(index))
        product = (left.to(device).bfloat16() @ right.to(device).bfloat16()).float().cpu()
        error = relative_error(product, left @ right)
        cards.append({"kind": kind, "name": name, "capability": capability, "error": error})
    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if kind == "cuda" else None,
        "built_for": torch.cuda.get_arch_list(),
        "cards": cards,
    }


def four_bit() -> dict[str, Any]:
    """For every device the errors of a matrix quantized to nf4 and back, and of bitsandbytes' product with it."""
    import bitsandbytes
    from bitsandbytes import functional

    torch.manual_seed(0)
    errors = {}
    for name in [f"cuda:{index}" for index in range(torch.cuda.device_count())] or ["cpu"]:
        weight, inputs = torch.randn(_SIZE, _SIZE).to(name), torch.randn(8, _SIZE).to(name)
        packed, state = functional.quantize_4bit(weight, quant_type="nf4")
        unpacked = functional.dequantize_4bit(packed, state)
        product = bitsandbytes.matmul_4bit(inputs, packed.t(), quant_state=state)
        errors[name] = {
            "back": relative_error(unpacked, weight),
            "product": relative_error(product, inputs @ unpacked.t()),
        }
    return errors


def attention() -> dict[str, Any]:
    """For every GPU the errors of FlashAttention's kernels against plain attention: torch's own, and the package's.

    A kernel that does not run has its error's words instead of a number; a package that is not there None.
    """
    found = []
    for index in range(torch.cuda.device_count()):
        torch.manual_seed(0)
        shape = (2, 8, 256, 64)  # batch, heads, tokens, head
        query, key, value = (torch.randn(shape, device=f"cuda:{index}", dtype=torch.bfloat16) for _ in range(3))
        wanted = _plain_attention(query.float(), key.float(), value.float())
        found.append(
            {
                "name": torch.cuda.get_device_name(index),
                "torch": _tried(lambda: relative_error(_torch_flash(query, key, value), wanted)),  # noqa: B023
                "package": _tried(lambda: relative_error(_package_flash(query, key, value), wanted))  # noqa: B023
                if _has_package()
                else None,
            }
        )
    return {"cards": found}


def _plain_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Causal, [batch, heads, tokens, head]."""
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    return scores.masked_fill(future, float("-inf")).softmax(-1) @ value


def _torch_flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)


def _has_package() -> bool:
    import importlib.util

    return importlib.util.find_spec("flash_attn") is not None


def _package_flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """flash_attn takes and gives [batch, tokens, heads, head]."""
    from flash_attn import flash_attn_func

    turned = (part.transpose(1, 2).contiguous() for part in (query, key, value))
    result: torch.Tensor = flash_attn_func(*turned, causal=True)
    return result.transpose(1, 2)


def _tried(work: Callable[[], float]) -> float | str:
    try:
        return work()
    except (RuntimeError, ImportError, OSError) as error:  # no kernel for this card; built for another torch or CUDA
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no words'}"


def transfers() -> dict[str, Any]:
    """Bytes per second between pinned host memory and every GPU, both ways, and from each GPU to the next."""
    count = torch.cuda.device_count()
    host = torch.empty(_COPIED_BYTES, dtype=torch.uint8, pin_memory=True) if count else torch.empty(0)
    cards, blocks = [], []
    for index in range(count):
        block = torch.empty(_COPIED_BYTES, dtype=torch.uint8, device=f"cuda:{index}")
        blocks.append(block)
        cards.append({"to_device": _rate(block, host, [index]), "to_host": _rate(host, block, [index])})
    pairs = [
        {
            "from": one,
            "to": other,
            "direct": torch.cuda.can_device_access_peer(one, other),
            "bytes_per_s": _rate(blocks[other], blocks[one], [one, other]),
        }
        for one in range(count)
        for other in range(count)
        if one != other
    ]
    return {"cards": cards, "pairs": pairs}


def _rate(target: torch.Tensor, source: torch.Tensor, cards: list[int]) -> float:
    """Of the fastest of several copies: others may share the link."""
    best = float("inf")
    for _ in range(_COPIES):
        _settle(cards)
        began = time.perf_counter()
        target.copy_(source, non_blocking=True)
        _settle(cards)
        best = min(best, time.perf_counter() - began)
    return float(source.numel() / best)


def _settle(cards: list[int]) -> None:
    for index in cards:
        torch.cuda.synchronize(index)


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """|found - wanted| / |wanted| in fp32; NaN where either is."""
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


PROGRAMS: dict[str, Callable[[], dict[str, Any]]] = {
    "devices": devices,
    "four_bit": four_bit,
    "attention": attention,
    "transfers": transfers,
}

if __name__ == "__main__":
    os.write(1, f"\n{json.dumps(PROGRAMS[sys.argv[1]]())}\n".encode())  # the parent's file, past what libraries print
