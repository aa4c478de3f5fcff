"""Slabs: written layer by layer, finished after a kill, checked by hash, of one base only, the original untouched."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from charkha.backends.torch.slab_making import LayerShape, ensure_slab
from charkha.backends.torch.slab_parts import LinearShape, Rows
from charkha.backends.torch.slabs import (
    DATA,
    INDEX,
    LAYER_ALIGNMENT,
    PIECE_ALIGNMENT,
    Slab,
    SlabDamaged,
    locked,
    read_index,
    write_index,
)
from charkha.errors import DoesNotFit, EnvironmentProblem
from charkha.store import durable

ROWS, COLUMNS = 48, 64


class Killed(Exception):
    pass


def layers(count: int = 3) -> list[LayerShape]:
    return [
        LayerShape(tuple(LinearShape(f"layers.{n}.{name}", ROWS, COLUMNS) for name in ("up", "down")))
        for n in range(count)
    ]


@pytest.fixture
def base(tmp_path) -> Path:
    import torch
    from safetensors.torch import save_file

    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    torch.manual_seed(0)
    names = [f"{linear.name}.weight" for layer in layers() for linear in layer.linears]
    save_file({name: torch.randn(ROWS, COLUMNS) for name in names}, folder / "model.safetensors")
    return folder


def make(base: Path, **changes: Any) -> Slab:
    settings = {"quantization": "nf4", "dtype": "bf16", "device": "cpu", "cache": base.parent / "cache", **changes}
    return ensure_slab(base, settings.pop("layers", layers()), **settings)


def stop_after(count: int) -> Any:
    def told(done: int, total: int) -> None:
        if done == count:
            raise Killed

    return told


def test_a_slab_holds_what_bitsandbytes_makes_of_each_weight(base):
    import bitsandbytes.functional as bnb
    import torch
    from safetensors.torch import load_file

    slab = make(base)
    data, stored = slab.path.read_bytes(), load_file(base / "model.safetensors")
    assert slab.total_bytes == len(data)
    for layer in slab.layers:
        assert layer.offset % LAYER_ALIGNMENT == 0 == layer.byte_count % LAYER_ALIGNMENT
        for piece in layer.pieces:
            assert piece.offset % PIECE_ALIGNMENT == 0
            packed, state = bnb.quantize_4bit(
                stored[f"{piece.module}.weight"].bfloat16(), compress_statistics=True, quant_type="nf4"
            )
            wanted = {
                "packed": packed, "absmax": state.absmax, "nested_absmax": state.state2.absmax,
                "nested_offset": state.offset,
            }[piece.part]  # fmt: skip
            begin = layer.offset + piece.offset
            flat = torch.frombuffer(bytearray(data[begin : begin + piece.byte_count]), dtype=wanted.dtype)
            assert torch.equal(flat.reshape(piece.shape), wanted)


def test_it_is_made_once_and_the_base_stays_as_it_was(base):
    before = (base / "model.safetensors").read_bytes()
    written: list[int] = []
    first = make(base, on_layer=lambda done, total: written.append(done))
    assert make(base, on_layer=lambda done, total: written.append(done)) == first
    assert written == [1, 2, 3]
    assert (base / "model.safetensors").read_bytes() == before


def test_after_a_kill_finished_layers_are_kept(base, tmp_path):
    whole = make(base, cache=tmp_path / "undisturbed")
    with pytest.raises(Killed):
        make(base, on_layer=stop_after(2))
    (data,) = (base.parent / "cache").glob(f"*/{DATA}")
    with data.open("ab") as file:
        file.write(b"half a layer")
    written: list[int] = []
    resumed = make(base, on_layer=lambda done, total: written.append(done))
    assert written == [3]
    assert resumed.layers == whole.layers
    assert resumed.path.read_bytes() == whole.path.read_bytes()


def read(slab: Slab, number: int) -> Any:
    """A unit's bytes as a run reads them."""
    import torch

    from charkha.backends.torch.transfers import LayerReader

    target = torch.empty(slab.units[number].byte_count, dtype=torch.uint8)
    LayerReader(slab).read(number, target)
    return target


def test_a_flipped_bit_is_found_before_it_is_used_and_its_layer_alone_made_again(base, caplog):
    slab = make(base)
    good = slab.path.read_bytes()
    bad = bytearray(good)
    bad[slab.layers[1].offset + 7] ^= 1
    slab.path.write_bytes(bad)
    assert make(base) == slab  # nothing is hashed at the start
    assert bytes(read(slab, 0)) == good[: slab.layers[0].byte_count]
    with pytest.raises(SlabDamaged, match=r"the bytes of layers\.1\.up and 1 further weights") as caught:
        read(slab, 1)
    assert caught.value.where == str(slab.path)
    assert slab.path.read_bytes() == bytes(bad)
    written: list[int] = []
    with caplog.at_level(logging.WARNING):
        mended = make(base, on_layer=lambda done, total: written.append(done))
    assert (written, mended) == ([], slab)
    assert mended.path.read_bytes() == good
    assert "layers.1.up was damaged; it is made anew" in caplog.text
    for number in range(3):
        read(mended, number)


def test_a_unit_is_compared_with_its_hash_once_a_run(base):
    import torch

    from charkha.backends.torch.transfers import LayerReader

    slab = make(base)
    reader, target = LayerReader(slab), torch.empty(slab.layers[0].byte_count, dtype=torch.uint8)
    reader.read(0, target)
    data = bytearray(slab.path.read_bytes())
    data[7] ^= 1
    slab.path.write_bytes(data)
    reader.read(0, target)
    with pytest.raises(SlabDamaged):
        read(slab, 0)


@pytest.mark.parametrize("damage", ["cut", "gone", "index", "format", "piece"])
def test_what_is_missing_is_made_again(base, damage, caplog):
    slab = make(base)
    good = slab.path.read_bytes()
    index = slab.path.parent / INDEX
    match damage:
        case "cut":
            slab.path.write_bytes(good[: slab.layers[1].offset + 9])
        case "gone":
            slab.path.unlink()
        case "index":
            index.write_text('{"format": 2, "layers"')
        case "format":
            index.write_text(json.dumps(json.loads(index.read_text()) | {"format": 1}))
        case "piece":  # another weight would be read in its place, and every unit still match its hash
            index.write_text(index.read_text().replace('"offset": 512', '"offset": 513'))
    written: list[int] = []
    with caplog.at_level(logging.WARNING):
        mended = make(base, on_layer=lambda done, total: written.append(done))
    assert mended.path.read_bytes() == good
    assert written == {"cut": [2, 3]}.get(damage, [1, 2, 3])
    told = {"cut": "ends before layer 1", "gone": "ends before layer 0"}
    assert told.get(damage, "cannot be read") in caplog.text


def test_experts_are_units_of_their_own_wherever_the_files_keep_them(tmp_path):
    import torch
    from safetensors.torch import save_file

    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    torch.manual_seed(0)
    fused, apart = torch.randn(2, 2 * ROWS, COLUMNS), torch.randn(ROWS, COLUMNS)
    stored = {"q.weight": apart, "experts.gate_up": fused, "w1": apart + 1, "w3": apart + 2}
    save_file(stored, base / "model.safetensors")
    experts = tuple(
        (LinearShape(f"experts.{n}.gate_up", 2 * ROWS, COLUMNS, (Rows("experts.gate_up", n * 2 * ROWS, 2 * ROWS),)),)
        for n in range(2)
    )
    joined = (LinearShape("experts.2.gate_up", 2 * ROWS, COLUMNS, (Rows("w1", 0, ROWS), Rows("w3", 0, ROWS))),)
    shape = LayerShape((LinearShape("q", ROWS, COLUMNS),), (*experts, joined))
    slab = make(base, quantization="none", dtype="fp32", layers=[shape, LayerShape(shape.linears)])
    assert (len(slab.layers), len(slab.units)) == (2, 5)
    assert (list(slab.expert_units(0)), list(slab.expert_units(1))) == ([2, 3, 4], [])
    found = [read(slab, unit)[: 2 * ROWS * COLUMNS * 4].view(torch.float32).view(-1, COLUMNS) for unit in (2, 3, 4)]
    assert torch.equal(torch.stack(found[:2]), fused)
    assert torch.equal(found[2], torch.cat([stored["w1"], stored["w3"]]))
    assert make(base, quantization="none", dtype="fp32", layers=[shape, LayerShape(shape.linears)]) == slab


def test_the_slab_of_another_base_is_refused(base):
    slab = make(base)
    index = read_index(slab.path.parent)
    assert index is not None
    write_index(slab.path.parent, replace(index, key=replace(index.key, fingerprint="0" * 64)))
    with pytest.raises(EnvironmentProblem, match="is of another base") as caught:
        make(base)
    assert caught.value.where == str(slab.path.parent)
    assert slab.path.exists()


def test_each_quantization_and_dtype_has_its_own(base):
    import torch
    from safetensors.torch import load_file

    made = [make(base, quantization=q, dtype=d) for q in ("nf4", "fp4", "none") for d in ("bf16", "fp32")]
    assert len({slab.path for slab in made}) == 6
    piece = made[4].layers[0].pieces[0]
    flat = torch.frombuffer(bytearray(made[4].path.read_bytes()[: piece.byte_count]), dtype=torch.bfloat16)
    assert torch.equal(
        flat.reshape(ROWS, COLUMNS), load_file(base / "model.safetensors")["layers.0.up.weight"].bfloat16()
    )


def test_a_weight_under_another_name_or_of_another_shape_is_told(base):
    with pytest.raises(EnvironmentProblem, match=r"other\.weight under another name"):
        make(base, layers=[LayerShape((LinearShape("other", ROWS, COLUMNS),))])
    with pytest.raises(EnvironmentProblem, match=r"has shape \(48, 64\) in the files"):
        make(base, layers=[LayerShape((LinearShape("layers.0.up", COLUMNS, ROWS),))])


def test_a_full_disk_is_told_before_anything_is_written(base, monkeypatch):
    monkeypatch.setattr(durable, "free_bytes", lambda path: 1000)
    with pytest.raises(DoesNotFit, match="are free"):
        make(base)
    assert not list((base.parent / "cache").glob(f"*/{INDEX}"))


class FullAfter(durable.Disk):
    """A disk that takes some writes and then is full."""

    def __init__(self, writes: int) -> None:
        self.left = writes

    def write(self, file: Any, data: Any) -> None:
        self.left -= 1
        if self.left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        super().write(file, data)


def test_a_disk_that_fills_up_meanwhile_is_told_and_finished_layers_are_kept(base):
    with durable.use_disk(FullAfter(25)), pytest.raises(DoesNotFit, match="the disk is full; the layers") as caught:
        make(base)
    assert "CHARKHA_CACHE" in (caught.value.remedy or "")
    written: list[int] = []
    make(base, on_layer=lambda done, total: written.append(done))
    assert written == [2, 3]


@pytest.fixture
def read_only(monkeypatch):
    """After a call, every slab folder is on a disk that is mounted read-only (root may write to any folder)."""
    real = os.open

    def refuse(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        if flags & os.O_RDWR:
            raise OSError(errno.EROFS, "Read-only file system")
        return real(path, flags, *rest, **named)

    return lambda: monkeypatch.setattr(os, "open", refuse)


def test_a_whole_slab_is_used_from_a_folder_that_may_not_be_written_to(base, read_only):
    slab = make(base)
    read_only()
    assert make(base) == slab
    with pytest.raises(EnvironmentProblem, match="cannot be written: Read-only"):
        make(base, quantization="fp4")


def test_damage_is_told_as_such_where_it_cannot_be_marked(base, read_only):
    slab = make(base)
    slab.path.write_bytes(b"\1" + slab.path.read_bytes()[1:])
    read_only()
    with pytest.raises(SlabDamaged, match=r"layers\.0\.up") as caught:
        read(slab, 0)
    assert (caught.value.remedy or "").startswith("remove this file's folder")


def test_a_second_process_waits_says_so_and_finds_the_slab(base):
    slab = make(base)
    held = os.open(slab.path.parent / ".lock", os.O_RDWR)
    fcntl.flock(held, fcntl.LOCK_EX)
    waited: list[None] = []

    def on_wait() -> None:
        waited.append(None)
        fcntl.flock(held, fcntl.LOCK_UN)

    try:
        assert make(base, on_wait=on_wait, on_layer=stop_after(1)) == slab
    finally:
        os.close(held)
    assert len(waited) == 1
    with locked(slab.path.parent):
        pass
