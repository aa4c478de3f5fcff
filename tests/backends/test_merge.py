"""Adapter into base: the right numbers, in little memory, complete or absent."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from charkha.errors import DoesNotFit, EnvironmentProblem, UsageError
from charkha.store import durable

NAMES = {
    "model.embed_tokens.weight": (11, 6),
    "model.layers.0.self_attn.q_proj.weight": (6, 6),
    "model.layers.0.mlp.up_proj.weight": (9, 6),
    "model.norm.weight": (6,),
}
ADAPTED = "model.layers.0.mlp.up_proj"


def write_base(folder: Path, *, dtype: Any = None, files: int = 1, shapes: dict[str, tuple[int, ...]] = NAMES) -> Path:
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(shape, generator=generator).to(dtype or torch.float32) for name, shape in shapes.items()
    }
    (folder / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    (folder / "tokenizer.json").write_text("{}")
    if files == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = list(tensors)
    weight_map = {}
    for number in range(files):
        file = f"model-{number + 1:05}-of-{files:05}.safetensors"
        part = {name: tensors[name] for name in names[number::files]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def write_adapter(folder: Path, out: int = 9, inner: int = 6, **settings: Any) -> Path:
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    generator = torch.Generator().manual_seed(1)
    prefix = f"base_model.model.{settings.pop('module', ADAPTED)}.lora_"
    tensors = {
        f"{prefix}A.weight": torch.randn(2, inner, generator=generator),
        f"{prefix}B.weight": torch.randn(out, 2, generator=generator),
    }
    save_file(settings.pop("tensors", tensors), folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "bias": "none", **settings}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def loaded(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("files", [1, 2])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16"])
def test_the_adapted_weight_is_the_rounded_sum_and_every_other_is_untouched(
    tmp_path: Path, kind: str, files: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from charkha.backends.torch import merge

    monkeypatch.setattr(merge, "BLOCK_BYTES", 64)  # several blocks for every tensor
    dtype = getattr(torch, kind)
    base = write_base(tmp_path / "base", dtype=dtype, files=files)
    adapter = write_adapter(tmp_path / "adapter")
    told: list[tuple[str, int, int]] = []
    merged = merge.merge_adapter(base, adapter, tmp_path / "out", on_tensor=lambda *progress: told.append(progress))
    before, after, pair = loaded(base), loaded(tmp_path / "out"), loaded(adapter)
    a, b = (pair[f"base_model.model.{ADAPTED}.lora_{half}.weight"] for half in "AB")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == dtype
        if name == f"{ADAPTED}.weight":
            exact = tensor.double() + 6 / 2 * (b.double() @ a.double())
            assert torch.allclose(after[name].double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)
            assert not torch.equal(after[name], tensor)
        else:
            assert torch.equal(after[name], tensor), name
    assert merged.note is None
    assert merged.bytes == sum(tensor.numel() * tensor.element_size() for tensor in after.values())
    assert [number for _, number, _ in told] == [1, 2, 3, 4]
    assert {path.name for path in (tmp_path / "out").glob("*.safetensors")} == {
        path.name for path in base.glob("*.safetensors")
    }
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert not list(tmp_path.glob(".*")), "nothing half made is left"


def test_rank_stabilised_scaling_is_followed(tmp_path: Path) -> None:
    import torch

    from charkha.backends.torch.merge import merge_adapter

    base = write_base(tmp_path / "base")
    adapter = write_adapter(tmp_path / "adapter", use_rslora=True)
    merge_adapter(base, adapter, tmp_path / "out")
    pair = loaded(adapter)
    a, b = (pair[f"base_model.model.{ADAPTED}.lora_{half}.weight"] for half in "AB")
    expected = loaded(base)[f"{ADAPTED}.weight"] + 6 / 2**0.5 * (b @ a)
    assert torch.allclose(loaded(tmp_path / "out")[f"{ADAPTED}.weight"], expected, atol=1e-5)


def test_one_numbered_file_gets_an_index_so_that_transformers_finds_it(tmp_path: Path) -> None:
    from charkha.backends.torch.merge import merge_adapter

    base = write_base(tmp_path / "base")
    (base / "model.safetensors").rename(base / "model-00001-of-00001.safetensors")
    merge_adapter(base, write_adapter(tmp_path / "adapter"), tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {"model-00001-of-00001.safetensors"}


REFUSED: dict[str, dict[str, Any]] = {
    "virtual tokens": {"peft_type": "PROMPT_TUNING"},
    "another kind": {"peft_type": "LOHA"},
    "another base": {"out": 10},
    "a layer that is not there": {"module": "model.layers.7.mlp.up_proj"},
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_adapter_that_would_be_merged_wrongly_is_refused_and_nothing_is_written(tmp_path: Path, name: str) -> None:
    from charkha.backends.torch.merge import merge_adapter

    base = write_base(tmp_path / "base")
    adapter = write_adapter(tmp_path / "adapter", **REFUSED[name])
    with pytest.raises(UsageError):
        merge_adapter(base, adapter, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_adapters_of_embeddings_and_halves_of_adapters_are_refused(tmp_path: Path) -> None:
    import torch

    from charkha.backends.torch.updates import read_updates

    embedding = {"base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(2, 11)}
    with pytest.raises(UsageError, match="embed_tokens"):
        read_updates(write_adapter(tmp_path / "one", tensors=embedding), [])
    half = {f"base_model.model.{ADAPTED}.lora_A.weight": torch.zeros(2, 6)}
    with pytest.raises(EnvironmentProblem, match="half"):
        read_updates(write_adapter(tmp_path / "two", tensors=half), [])


def test_a_disk_too_small_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from charkha.backends.torch.merge import merge_adapter

    base, adapter = write_base(tmp_path / "base"), write_adapter(tmp_path / "adapter")
    monkeypatch.setattr(durable, "free_bytes", lambda path: 100)
    with pytest.raises(DoesNotFit) as caught:
        merge_adapter(base, adapter, tmp_path / "out")
    assert caught.value.exit_code == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_a_folder_with_something_else_in_it_is_never_replaced(tmp_path: Path) -> None:
    from charkha.backends.torch.merge import merge_adapter

    base, adapter = write_base(tmp_path / "base"), write_adapter(tmp_path / "adapter")
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("years of work")
    file = tmp_path / "a-file"
    file.write_text("x")
    for target in (precious, file, base, adapter):
        with pytest.raises(UsageError, match="left as it is"):
            merge_adapter(base, adapter, target)
    assert (precious / "thesis.tex").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    for target in (tmp_path / "empty", tmp_path / "new", tmp_path / "new"):
        merge_adapter(base, adapter, target)
        assert loaded(target)


def test_a_merge_that_breaks_off_leaves_the_earlier_one(tmp_path: Path) -> None:
    from charkha.backends.torch.merge import merge_adapter

    base, adapter = write_base(tmp_path / "base"), write_adapter(tmp_path / "adapter")
    merge_adapter(base, adapter, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def cut(name: str, done: int, total: int) -> None:
        if done == 2:
            raise OSError(5, "Input/output error")

    with pytest.raises(OSError, match="Input/output"):
        merge_adapter(base, adapter, tmp_path / "out", on_tensor=cut)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


MEASURE = """
import resource, sys
from pathlib import Path
import torch
from charkha.backends.torch.merge import merge_adapter
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
(torch.randn(64, 64) @ torch.randn(64, 64)).to(torch.bfloat16)
folder = Path(sys.argv[1])
before = peak()
for name in ("whole", "sharded"):
    merge_adapter(folder / name, folder / "adapter", folder / f"merged-{name}")
print(peak() - before)
"""


def test_memory_follows_neither_model_nor_largest_tensor(tmp_path: Path) -> None:
    """The promise is three times the largest tensor above the imports; blocks of 8 MiB need far less."""
    import torch

    out, inner = 131072, 256  # 64 MiB in bf16
    shapes = {**NAMES, f"{ADAPTED}.weight": (out, inner)}
    write_base(tmp_path / "whole", dtype=torch.bfloat16, shapes=shapes)
    write_base(tmp_path / "sharded", dtype=torch.bfloat16, shapes=shapes, files=2)
    write_adapter(tmp_path / "adapter", out=out, inner=inner)
    command = [sys.executable, "-c", MEASURE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    largest = out * inner * 2
    assert largest == 64 << 20
    grown = int(done.stdout)
    assert grown <= 3 * largest
    assert grown <= 1.5 * largest, f"{grown / 2**20:.0f} MiB: something holds whole tensors"
