"""The plan of a streamed base against what was really written, moved and held."""

from __future__ import annotations

import json

import pytest

torch = pytest.importorskip("torch")

from streamed_steps import run_steps  # noqa: E402

from charkha.backends.base import BaseModelSpec, Streaming  # noqa: E402
from charkha.backends.torch.model import load_base  # noqa: E402
from charkha.backends.torch.streamed_model import engine_of  # noqa: E402
from charkha.plan.architecture import read_architecture  # noqa: E402
from charkha.plan.memory_settings import MemorySettings  # noqa: E402
from charkha.plan.streamed import buffer_bytes, hot_layers_of, moved_bytes, slab_bytes, slab_layer_bytes  # noqa: E402

LAYERS = 7
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "falcon", "phi3"]


@pytest.fixture(autouse=True)
def slab_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CHARKHA_CACHE", str(tmp_path / "cache"))


def settings(quantization: str, dtype: str, streaming: Streaming) -> MemorySettings:
    return MemorySettings(
        dtype=dtype,
        rows=2,
        tokens=12,
        quantization=quantization,
        gradient_checkpointing=True,
        device="cpu",
        streamed=True,
        streamed_slots=streaming.slots,
        streamed_resident_layers=streaming.hot_layers,
    )


def written_layers(folder, quantization, dtype):
    attention = "eager" if "gemma2" in folder.parts else "sdpa"
    model = load_base(BaseModelSpec(folder, dtype, attention, quantization, "cpu", Streaming()))
    return [layer.byte_count for layer in engine_of(model).slab.layers]


def require_same(folder, quantization, dtype):
    architecture = read_architecture(json.loads((folder / "config.json").read_text()))
    planned = settings(quantization, dtype, Streaming())
    written = written_layers(folder, quantization, dtype)
    assert written == [slab_layer_bytes(architecture, planned)] * architecture.layers
    assert sum(written) == slab_bytes(architecture, planned)


@pytest.mark.parametrize(("kind", "quantization", "dtype"), [("llama", "nf4", "bf16"), ("falcon", "none", "fp32")])
def test_a_slab_has_the_bytes_that_were_planned(model_folder, kind, quantization, dtype):
    require_same(model_folder(kind), quantization, dtype)


@pytest.mark.long
@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("quantization", ["nf4", "fp4", "none"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_so_has_that_of_every_family_and_storage(model_folder, kind, quantization, dtype):
    require_same(model_folder(kind), quantization, dtype)


@pytest.mark.parametrize(
    "streaming",
    [Streaming(2, 0), Streaming(3, 0), Streaming(2, 3), Streaming(3, 2), Streaming(2, 5), Streaming(2, LAYERS)],
)
def test_the_engine_moves_and_holds_what_was_planned(model_folder, streaming):
    folder = model_folder("llama", num_hidden_layers=LAYERS)
    architecture = read_architecture(json.loads((folder / "config.json").read_text()))
    planned = settings("nf4", "fp32", streaming)
    engines, moved = [], []
    for steps in (1, 2):
        run_steps(folder, streaming=streaming, prepare=engines.append, steps=steps)
        moved.append(engines[-1].traffic.bytes)
    engine = engines[-1]
    assert engine.device_bytes == buffer_bytes(architecture, planned)
    assert tuple(sorted(set(range(LAYERS)) - set(engine.cold))) == hot_layers_of(LAYERS, streaming.hot_layers)
    assert moved[1] - moved[0] == 2 * moved_bytes(architecture, planned)  # two micro batches a step
