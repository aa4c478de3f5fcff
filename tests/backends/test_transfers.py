"""How layers come: what goes wrong on the way is told as what it is, and nothing that did not arrive is computed with.

What a GPU does with the copies is in tests/gpu/test_streaming_cuda.py.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
from types import SimpleNamespace
from typing import Any

import pytest

from charkha.backends.torch.slabs import Slab, SlabDamaged, SlabLayer
from charkha.errors import EnvironmentProblem

SIZE = 4096


@pytest.fixture
def slab(tmp_path) -> Slab:
    """Two layers of one block each, of zeros; the second is damaged."""
    path = tmp_path / "layers.slab"
    path.write_bytes(bytes(SIZE) + b"\1" + bytes(SIZE - 1))
    digest = hashlib.sha256(bytes(SIZE)).hexdigest()
    return Slab(path, tuple(SlabLayer(offset, SIZE, digest, ()) for offset in (0, SIZE)))


def test_a_layer_that_did_not_arrive_is_asked_for_again_and_never_taken_for_there(slab, monkeypatch):
    import torch

    from charkha.backends.torch import slabs
    from charkha.backends.torch.streaming import open_engine

    monkeypatch.setattr(slabs, "modules_of", lambda unit: ["q_proj"])
    engine = open_engine(slab, slots=2, hot_layers=0, tier="auto", device=torch.device("cpu"))
    engine.require(0)
    for _ in range(2):
        with pytest.raises(SlabDamaged, match="q_proj"):
            engine.require(1)


class Pins:
    """A CUDA runtime that registers nothing."""

    def cudaHostRegister(self, pointer: int, size: int, flags: int) -> int:  # CUDA's name
        return 2


def test_memory_that_cannot_be_pinned_is_told_and_its_error_cleared(monkeypatch):
    import torch

    from charkha.backends.torch import transfers

    cleared: list[None] = []
    monkeypatch.setattr(torch.cuda, "cudart", Pins)
    monkeypatch.setattr(transfers, "clear_cuda_error", lambda: cleared.append(None))
    with pytest.raises(transfers.CannotPin, match=r"4 KiB of host memory could not be pinned \(CUDA error 2\)"):
        transfers.PinnedMemory(1)
    assert len(cleared) == 1
    with pytest.raises(transfers.CannotPin, match="Cannot allocate memory"):
        transfers.PinnedMemory(1 << 60)


def test_only_what_cannot_be_pinned_sends_layers_from_the_disk(slab, monkeypatch, caplog):
    import torch

    from charkha.backends.torch import streaming
    from charkha.backends.torch.transfers import CannotPin, Traffic

    def pinning(error: Exception) -> Any:
        def fail(slab: Slab, traffic: Traffic) -> Any:
            raise error

        return fail

    from_disk = SimpleNamespace()
    monkeypatch.setattr(streaming, "DiskToDevice", lambda slab, traffic: from_disk)
    monkeypatch.setattr(streaming, "_fits_in_ram", lambda slab: True)
    make = streaming._transfer(slab, "auto", torch.device("cuda", 0))
    monkeypatch.setattr(streaming, "RamToDevice", pinning(CannotPin("2 GiB of host memory could not be pinned")))
    with caplog.at_level(logging.WARNING):
        assert make(slab, Traffic()) is from_disk
    assert "could not be pinned; layers are read from the disk in every step" in caplog.text
    for error in (SlabDamaged("the bytes of q_proj"), EnvironmentProblem("ended while it was read")):
        monkeypatch.setattr(streaming, "RamToDevice", pinning(error))
        with pytest.raises(type(error), match=error.message):
            make(slab, Traffic())


def whole(reader: Any) -> bytes:
    import torch

    target = torch.full((SIZE,), 7, dtype=torch.uint8)
    reader.read(0, target)
    return bytes(target)


def test_a_disk_that_takes_back_direct_reads_is_read_through_the_cache(slab, monkeypatch):
    from charkha.backends.torch import transfers

    real, asked = os.preadv, []

    def refuse_direct(descriptor: int, buffers: Any, position: int) -> int:
        asked.append(descriptor)
        if len(asked) == 1:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(descriptor, buffers, position)

    monkeypatch.setattr(transfers.os, "preadv", refuse_direct)
    reader = transfers.LayerReader(slab)
    reader.is_direct = True  # whatever the disk of these tests knows
    assert whole(reader) == bytes(SIZE)
    assert (reader.is_direct, len(asked)) == (False, 2)


@pytest.mark.parametrize(("cut", "told"), [(True, "ended while it was read"), (False, "cannot be read: Input/output")])
def test_a_file_that_cannot_be_read_to_its_end_is_told_with_what_to_do(slab, monkeypatch, cut, told):
    from charkha.backends.torch import transfers

    def broken(descriptor: int, buffers: Any, position: int) -> int:
        raise OSError(errno.EIO, "Input/output error")

    if cut:
        os.truncate(slab.path, 100)
    else:
        monkeypatch.setattr(transfers.os, "preadv", broken)
    with pytest.raises(EnvironmentProblem, match=told) as caught:
        whole(transfers.LayerReader(slab))
    assert "run the same command again" in (caught.value.remedy or "")
