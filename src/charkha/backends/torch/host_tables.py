"""Embedding and head of a streamed base that stay on the host: only the rows of a micro batch's tokens, and blocks of
the head in turn, go to the device.

A table is a map of the base's own file, so it costs page cache and no memory of the process; reading a row reads the
file. Both modules are the model's own classes without a weight among their parameters. An embedding gives the same
bits as on the device. A head in blocks of the vocabulary adds up in another order than a whole one: see `head_loss.py`.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch.nn import functional

from charkha.backends.torch.slab_parts import Weights, as_matrix
from charkha.backends.torch.tensor_files import StoredTensor, torch_dtype_of
from charkha.errors import EnvironmentProblem

_BLOCK_BYTES = 128 << 20  # of the head on the device at once, and as much again on its way


class HostTable:
    """A matrix [rows, columns] in the base's file, given out in `dtype`."""

    def __init__(self, stored: StoredTensor, dtype: torch.dtype) -> None:
        matrix = as_matrix(stored)
        begin = stored.start - stored.start % mmap.ALLOCATIONGRANULARITY
        with stored.file.open("rb") as file:
            # Private: torch wants memory that may be written to, and the base must stay as it is. Of the table alone:
            # the system promises memory for such a map, and a file may be larger than all there is.
            self._map = mmap.mmap(
                file.fileno(),
                stored.end - begin,
                flags=mmap.MAP_PRIVATE,
                prot=mmap.PROT_READ | mmap.PROT_WRITE,
                offset=begin,
            )
        kind = torch_dtype_of(stored.dtype)
        count = matrix.shape[0] * matrix.shape[1]
        flat = torch.frombuffer(self._map, dtype=kind, count=count, offset=stored.start - begin)
        self.tensor = flat.view(matrix.shape)
        self.dtype = dtype

    @property
    def shape(self) -> tuple[int, int]:
        return self.tensor.shape[0], self.tensor.shape[1]

    def rows(self, ids: torch.Tensor, device: torch.device) -> torch.Tensor:
        """[n, columns] of the rows `ids` [n]; waits for the device when the ids are there."""
        return self.tensor.index_select(0, ids.cpu()).to(self.dtype).to(device)

    def blocks(self, rows: int, device: torch.device) -> Iterator[tuple[int, torch.Tensor]]:
        """(first row, block [some rows, columns]) of the whole table in turn; the next is on its way meanwhile."""
        copies = _copy_stream(device) if device.type == "cuda" else None
        starts = range(0, self.shape[0], rows)
        ahead = self._sent(starts[0], rows, device, copies)
        for number, first in enumerate(starts):
            block, arrived = ahead
            if number + 1 < len(starts):
                ahead = self._sent(starts[number + 1], rows, device, copies)
            if arrived is not None:
                torch.cuda.current_stream().wait_event(arrived)
                block.record_stream(torch.cuda.current_stream())
            yield first, block

    def _sent(self, first: int, rows: int, device: torch.device, copies: Any) -> tuple[torch.Tensor, Any]:
        part = self.tensor[first : first + rows].to(self.dtype)
        if copies is None:
            return part.to(device), None
        with torch.cuda.stream(copies):
            block = part.pin_memory().to(device, non_blocking=True)
            return block, copies.record_event()


@cache
def _copy_stream(device: torch.device) -> Any:
    """One for all tables and passes: the caching allocator keeps what was freed for the stream it was made on."""
    return torch.cuda.Stream(device)


class _OnHost(torch.nn.Module):  # type: ignore[misc]  # torch is not typed here
    """Put before a model's own class, which then has no weight among its parameters."""

    table: HostTable | None = None
    device: torch.device = torch.device("cpu")
    _gathered: torch.Tensor | None = None

    @property
    def weight(self) -> Any:
        """The whole table on the host; while the model's own class computes, the rows it was given instead."""
        if self._gathered is not None:
            return self._gathered
        if self.table is None:
            return torch.empty(1, 1)  # transformers fills what it thinks is new, and Gemma's scale beside it
        return self.table.tensor


class HostEmbedding(_OnHost):
    """An embedding of which the rows in use are brought; what its class does beside (Gemma's scale) it still does."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """[rows, tokens] -> [rows, tokens, hidden]."""
        assert self.table is not None
        rows = self.table.rows(ids.reshape(-1), self.device)
        self._gathered = rows
        try:
            places = torch.arange(len(rows), device=self.device).view(ids.shape)
            answer: torch.Tensor = super().forward(places)
            return answer
        finally:
            self._gathered = None


class HostHead(_OnHost):
    """A head whose weight comes block by block."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., hidden] -> [..., vocabulary]."""
        logits: torch.Tensor = _Product.apply(hidden, self)
        return logits

    def blocks(self, rows: int | None = None) -> Iterator[tuple[int, torch.Tensor, torch.Tensor | None]]:
        """(first row, weight [some rows, hidden], bias [some rows]); about `_BLOCK_BYTES` where `rows` is None."""
        assert self.table is not None
        columns = self.table.shape[1] * self.table.dtype.itemsize
        for first, block in self.table.blocks(rows or max(1, _BLOCK_BYTES // columns), self.device):
            bias = self._parameters.get("bias")
            yield first, block, None if bias is None else bias[first : first + len(block)]


class _Product(torch.autograd.Function):  # type: ignore[misc]  # torch is not typed here
    """Logits of every position, the weight in blocks forward and again backward."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, head: HostHead) -> torch.Tensor:
        ctx.head = head
        return torch.cat([functional.linear(hidden, weight, bias) for _first, weight, bias in head.blocks()], dim=-1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (grad,) = grads
        total: torch.Tensor | None = None
        for first, weight, _bias in ctx.head.blocks():
            part = (grad[..., first : first + len(weight)] @ weight).float()
            total = part if total is None else total + part
        assert total is not None
        return total.to(grad.dtype), None


def keep_on_host(module: Any, kind: type[_OnHost]) -> None:
    """Makes an embedding or head one without a weight, so that loading the model passes over it in the files."""
    own = type(module)
    del module._parameters["weight"]
    if hasattr(module, "padding_idx"):
        module.padding_idx = None  # says whose gradient is zero; rows that were gathered have other numbers
    module.__class__ = type(own.__name__, (kind, own), {"forward": kind.forward})


def open_table(weights: Weights, names: list[str], dtype: torch.dtype, base: str) -> HostTable:
    """The first of these stored tensors. Raises EnvironmentProblem when the files have none of them."""
    found = next((weights[name] for name in names if name in weights), None)
    if found is None:
        raise EnvironmentProblem(
            f"this base stores {names[0]} under another name, so it cannot be kept on the host",
            where=base,
            remedy="use model.host_tables none",
        )
    return HostTable(found, dtype)
