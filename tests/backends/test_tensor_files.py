"""Our safetensors reading and writing against the reference package."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from charkha.backends.torch.tensor_files import (
    BYTES_OF,
    INDEX,
    TensorFileWriter,
    read_bytes,
    read_rows,
    row_blocks,
    tensors_of_file,
    tensors_of_folder,
    torch_dtype_of,
)
from charkha.errors import EnvironmentProblem

SHAPES = [(3, 5), (7,), (), (0, 4), (4, 0), (2, 3, 4), (1,)]


def random_tensors(dtype: str):
    import torch

    generator = torch.Generator().manual_seed(1)
    kind = torch_dtype_of(dtype)
    tensors = {}
    for number, shape in enumerate(SHAPES):
        values = torch.randint(0, 100, shape, generator=generator)
        tensors[f"t{number}"] = (values % 2).to(kind) if dtype == "BOOL" else values.to(kind)
    return tensors


@pytest.mark.parametrize("dtype", sorted(BYTES_OF))
def test_what_we_write_is_read_back_by_the_safetensors_package_bit_for_bit(tmp_path: Path, dtype: str) -> None:
    import torch
    from safetensors.torch import load_file

    tensors = random_tensors(dtype)
    path = tmp_path / "model.safetensors"
    with TensorFileWriter(path, [(name, dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]) as writer:
        for tensor in tensors.values():
            writer.write_tensor(tensor)
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].shape == tensor.shape
        assert torch.equal(loaded[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("dtype", sorted(BYTES_OF))
def test_what_the_safetensors_package_writes_is_read_by_rows_bit_for_bit(tmp_path: Path, dtype: str) -> None:
    import torch
    from safetensors.torch import save_file

    tensors = random_tensors(dtype)
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    for stored in tensors_of_file(path):
        tensor = tensors[stored.name]
        assert stored.shape == tuple(tensor.shape)
        assert stored.byte_count == tensor.numel() * tensor.element_size()
        assert len(read_bytes(stored, 0, stored.byte_count)) == stored.byte_count
        if not stored.shape:
            continue
        blocks = [read_rows(stored, first, count) for first, count in row_blocks(stored, 16)]
        whole = torch.cat(blocks) if blocks else torch.empty(stored.shape, dtype=tensor.dtype)
        assert torch.equal(whole.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_a_file_with_fewer_bytes_than_declared_is_not_passed_off_as_done(tmp_path: Path) -> None:
    with (
        pytest.raises(AssertionError, match="declared"),
        TensorFileWriter(tmp_path / "x", [("a", "F32", (4,))]) as writer,
    ):
        writer.write(b"\0" * 8)


def file_with(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
BROKEN = {
    "empty": b"",
    "short": b"\1\0\0",
    "a header longer than the file": struct.pack("<Q", 1 << 40) + b"{}",
    "a header that is no JSON": file_with(b"{nonsense"),
    "a header that is a list": file_with(b"[]"),
    "a header that is a number": file_with(b"7"),
    "bytes missing": file_with(json.dumps({"a": ENTRY}).encode(), b"\0" * 7),
    "an unknown type": file_with(json.dumps({"a": {**ENTRY, "dtype": "Q7"}}).encode(), b"\0" * 8),
    "a shape of another size": file_with(json.dumps({"a": {**ENTRY, "shape": [3]}}).encode(), b"\0" * 8),
    "an offset before the data": file_with(json.dumps({"a": {**ENTRY, "data_offsets": [-8, 0]}}).encode(), b"\0" * 8),
    "one offset": file_with(json.dumps({"a": {**ENTRY, "data_offsets": [0]}}).encode(), b"\0" * 8),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_an_environment_problem_that_names_it(tmp_path: Path, name: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(BROKEN[name])
    with pytest.raises(EnvironmentProblem) as caught:
        tensors_of_file(path)
    assert caught.value.where == str(path)


@pytest.mark.parametrize(
    "index",
    [b"", b"[]", b'{"weight_map": []}', b'{"weight_map": {"a": "../../elsewhere.safetensors"}}',
     b'{"weight_map": {"a": "/etc/passwd"}}', b'{"weight_map": {"a": "pytorch_model.bin"}}',
     b'{"weight_map": {"a": null}}'],
)  # fmt: skip
def test_an_index_that_is_broken_or_leads_out_of_the_folder_is_refused(tmp_path: Path, index: bytes) -> None:
    (tmp_path / INDEX).write_bytes(index)
    with pytest.raises(EnvironmentProblem) as caught:
        tensors_of_folder(tmp_path)
    assert caught.value.exit_code == 5


def test_one_whole_file_goes_before_an_index_as_in_transformers(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(file_with(json.dumps({"a": ENTRY}).encode(), b"\0" * 8))
    (tmp_path / INDEX).write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    assert list(tensors_of_folder(tmp_path)) == ["model.safetensors"]
