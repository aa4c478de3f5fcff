"""Answers for operators that read numbers which a fake tensor does not have.

There are few: integers are real in a trace (see recorder.py). What is left depends on activations: which experts a
router picks, which columns of an int8 layer's input hold outliers, and scalars that are read to be logged.
"""

from __future__ import annotations

from typing import Any

import torch

_aten = torch.ops.aten


def _even_topk(fake_mode: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Values are fake; indices are real and deal rows to columns in turn, so that every expert gets as many tokens."""
    with fake_mode:
        values, _indices = _aten.topk.default(*args, **kwargs)
    scores, count = args[0], args[1]
    rows, columns = scores.numel() // scores.shape[-1], scores.shape[-1]
    indices = torch.arange(rows * count).remainder(columns).view(*scores.shape[:-1], count)
    return values, indices


def _some_number(fake_mode: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A scalar that is read: 1, or true."""
    return True if args[0].dtype == torch.bool else 1


def _no_outliers(fake_mode: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Bitsandbytes' int8 rows, their scales, and no column of outliers."""
    activations = args[0]
    with fake_mode:
        rows = torch.empty(activations.shape, dtype=torch.int8)
        scales = torch.empty(activations.numel() // activations.shape[-1], dtype=torch.float32)
        columns = torch.empty(0, dtype=torch.int64)
    return rows, scales, columns


def _int8_product(fake_mode: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    activations, rows, weight = args[0], args[1], args[2]
    with fake_mode:
        return torch.empty((*rows.shape[:-1], weight.shape[0]), dtype=activations.dtype), None


def _grouped_product(fake_mode: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """All experts' products at once. torch's shape function knows bf16 only; its kernels know every type."""
    first, second, *rest = args
    with fake_mode:
        made = _aten._grouped_mm.default(first.bfloat16(), second.bfloat16(), *rest, **kwargs)
        return torch.empty_strided(made.shape, made.stride(), dtype=first.dtype)


def _stand_ins() -> dict[Any, Any]:
    table = {
        _aten.topk.default: _even_topk,
        _aten._local_scalar_dense.default: _some_number,
        _aten._grouped_mm.default: _grouped_product,
    }
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        return table
    int8 = torch.ops.bitsandbytes
    table[int8.int8_vectorwise_quant.default] = _no_outliers
    table[int8.int8_mixed_scaled_mm.default] = _int8_product
    return table


STAND_INS = _stand_ins()
