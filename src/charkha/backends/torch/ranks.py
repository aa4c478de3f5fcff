"""Several processes on one host that train one model: what they add up, agree on and gather.

Every process is a trainer of one device over its own micro batches; nothing wraps the model. At the end of a step the
gradients are added up in one go, as DistributedDataParallel does after gradient accumulation. Its wrapper is not used
because our losses call parts of the model (the head in chunks), past its `forward`, without which its reducer is not
told that a step has begun. Agreements go through gloo on the loopback interface, gradients on CUDA through NCCL.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from charkha.backends.base import PeerGone, Place

# Waiting is not a fault: the first process may wait days for mains or a disk. The supervisor looks for hangs, and the
# first process for the death of another.
_PATIENCE = timedelta(days=365)
_BUCKET_BYTES = 32 << 20  # of gradients added up in one call
_TEAR_DOWN_S = 10.0


class Ranks:
    """The processes of one run as seen by one of them. With a count of 1 every call is free and changes nothing.

    Every call but the first two raises PeerGone.
    """

    def __init__(self, place: Place) -> None:
        self.rank = place.rank
        self.count = place.count
        self._waits = place.waits

    @property
    def is_first(self) -> bool:
        """Whether this is the process that records, saves and is given orders."""
        return self.rank == 0

    def add_up_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Replaces every gradient by the sum over all processes.

        One that is missing in some of them counts as 0 there; one that is missing in all of them stays so, since to an
        optimizer that is not the same as 0.
        """
        if self.count == 1:
            return
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        somewhere = self.add_up(np.array([parameter.grad is not None for parameter in trained], dtype=np.int64))
        for bucket in _buckets([parameter for parameter, there in zip(trained, somewhere, strict=True) if there]):
            for parameter in bucket:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            flat = torch.cat([_grad(parameter).flatten() for parameter in bucket])
            with self._together():
                dist.all_reduce(flat)
            parts = flat.split([parameter.numel() for parameter in bucket])
            for parameter, part in zip(bucket, parts, strict=True):
                _grad(parameter).copy_(part.view_as(parameter))

    def take_from_first(self, tensors: Iterable[torch.Tensor]) -> None:
        """Gives every process the first one's values."""
        if self.count > 1:
            for tensor in tensors:
                with self._together():
                    dist.broadcast(tensor.detach(), src=0)

    def add_up(self, numbers: np.ndarray) -> np.ndarray:
        """The sum over all processes of each number; the same bits in each of them."""
        if self.count == 1:
            return numbers
        total = torch.from_numpy(np.ascontiguousarray(numbers)).clone()
        with self._together():
            dist.all_reduce(total)
        return np.asarray(total.numpy())

    def agree(self, value: Any) -> Any:
        """The first process's value (what JSON can hold); the others' is not looked at."""
        if self.count == 1:
            return value
        data = json.dumps(value).encode() if self.is_first else b""
        return json.loads(self.gather(data)[0])

    def gather(self, data: bytes) -> list[bytes]:
        """What each process gave, in order."""
        if self.count == 1:
            return [data]
        sizes = self.add_up(np.eye(self.count, dtype=np.int64)[self.rank] * len(data))
        mine = torch.zeros(max(int(sizes.max()), 1), dtype=torch.uint8)
        mine[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else mine[:0]
        everyones = [torch.empty_like(mine) for _ in range(self.count)]
        with self._together():
            dist.all_gather(everyones, mine)
        return [bytes(one.numpy()[:size]) for one, size in zip(everyones, sizes.tolist(), strict=True)]

    @contextmanager
    def _together(self) -> Iterator[None]:
        self._waits(True)
        try:
            yield
        except RuntimeError as error:  # dist.DistError is one
            raise PeerGone(str(error)) from error
        finally:
            self._waits(False)


ALONE = Ranks(Place())


@contextmanager
def joined(place: Place, device: str) -> Iterator[Ranks]:
    """Meets the other processes at `place.meeting`; returns from here once all of them are there.

    Threads and environment are as before afterwards.
    """
    if place.count == 1:
        yield ALONE
        return
    with _on_loopback(), _share_of_threads(device, place.count):
        store = dist.FileStore(str(place.meeting), place.count)
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        place.waits(True)
        dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.count, timeout=_PATIENCE)
        place.waits(False)
        try:
            yield Ranks(place)
        except BaseException as error:
            place.fails(error)  # before NCCL is torn down, which may wait for those that wait for this one
            _leave(device)
            raise
        dist.destroy_process_group()


def _leave(device: str) -> None:
    """Gives up the connection after an error; NCCL, which may never come back from that, is waited for a while only."""
    if device != "cuda":
        dist.destroy_process_group()
        return
    thread = threading.Thread(target=dist.destroy_process_group, daemon=True)
    thread.start()
    thread.join(_TEAR_DOWN_S)


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Nothing of a run on one host goes through its network card, unless the user says so."""
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if sys.platform.startswith("linux") else ()
    ours = [name for name in names if name not in os.environ]
    os.environ.update(dict.fromkeys(ours, "lo"))
    try:
        yield
    finally:
        for name in ours:
            del os.environ[name]


@contextmanager
def _share_of_threads(device: str, count: int) -> Iterator[None]:
    """A CPU's cores divided among the processes."""
    before = torch.get_num_threads()
    if device == "cpu":
        torch.set_num_threads(max(1, min(before, (os.cpu_count() or 1) // count)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _grad(parameter: torch.nn.Parameter) -> torch.Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _buckets(parameters: Sequence[torch.nn.Parameter]) -> Iterator[list[torch.nn.Parameter]]:
    """Parameters of one dtype, in order, up to the size of one call."""
    bucket: list[torch.nn.Parameter] = []
    size = 0
    for parameter in parameters:
        parameter_bytes = parameter.numel() * parameter.element_size()
        if bucket and (size + parameter_bytes > _BUCKET_BYTES or parameter.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += parameter_bytes
    if bucket:
        yield bucket
