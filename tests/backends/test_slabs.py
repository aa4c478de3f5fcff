"""Slabs: written layer by layer, finished after a kill, checked by hash, of one base only, the original untouched."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from charkha.backends.torch.slabs import (
    DATA,
    INDEX,
    LAYER_ALIGNMENT,
    PIECE_ALIGNMENT,
    LinearShape,
    Slab,
    ensure_slab,
)
from charkha.errors import DoesNotFit, EnvironmentProblem
from charkha.store import durable

ROWS, COLUMNS = 48, 64


class Killed(Exception):
    pass


def layers(count: int = 3) -> list[list[LinearShape]]:
    return [[LinearShape(f"layers.{n}.{name}", ROWS, COLUMNS) for name in ("up", "down")] for n in range(count)]


@pytest.fixture
def base(tmp_path) -> Path:
    import torch
    from safetensors.torch import save_file

    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    torch.manual_seed(0)
    names = [f"{linear.name}.weight" for layer in layers() for linear in layer]
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


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "index"])
def test_damage_is_found_by_hash_and_made_again(base, damage, caplog):
    slab = make(base)
    good = slab.path.read_bytes()
    bad = bytearray(good)
    bad[slab.layers[1].offset + 7] ^= 1
    match damage:
        case "flip":
            slab.path.write_bytes(bad)
        case "cut":
            slab.path.write_bytes(good[: slab.layers[1].offset + 9])
        case "gone":
            slab.path.unlink()
        case "index":
            (slab.path.parent / INDEX).write_text('{"format": 1, "layers"')
    written: list[int] = []
    with caplog.at_level(logging.WARNING):
        mended = make(base, on_layer=lambda done, total: written.append(done))
    assert mended.path.read_bytes() == good
    assert written == {"flip": [2, 3], "cut": [2, 3], "gone": [1, 2, 3], "index": [1, 2, 3]}[damage]
    assert ("cannot be read" if damage == "index" else "does not match its hash") in caplog.text


def test_the_slab_of_another_base_is_refused(base):
    slab = make(base)
    index = json.loads((slab.path.parent / INDEX).read_text())
    index["key"]["fingerprint"] = "0" * 64
    (slab.path.parent / INDEX).write_text(json.dumps(index))
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
        make(base, layers=[[LinearShape("other", ROWS, COLUMNS)]])
    with pytest.raises(EnvironmentProblem, match=r"has shape \(48, 64\) in the files"):
        make(base, layers=[[LinearShape("layers.0.up", COLUMNS, ROWS)]])


def test_a_full_disk_is_told_before_anything_is_written(base, monkeypatch):
    monkeypatch.setattr(durable, "free_bytes", lambda path: 1000)
    with pytest.raises(DoesNotFit, match="are free"):
        make(base)
    assert not list((base.parent / "cache").glob(f"*/{INDEX}"))
