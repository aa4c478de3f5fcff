"""A streamed base computes what a resident one does, bit for bit; what would break that ends the run."""

from __future__ import annotations

import random
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from streamed_steps import ALL_LINEAR, run_steps, same

from charkha.backends.base import AdapterSpec, BaseModelSpec, Streaming

LAYERS = 5


@pytest.fixture(scope="module", autouse=True)
def slab_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CHARKHA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def resident(model_folder):
    """`resident("llama", quantization=...)`: the steps of the resident base, once for each kind."""
    made: dict[str, Any] = {}

    def steps(kind: str = "llama", **settings: Any) -> Any:
        key = f"{kind} {settings}"
        if key not in made:
            made[key] = run_steps(model_folder(kind, num_hidden_layers=LAYERS), **settings)
        return made[key]

    return steps


def slow(engine: Any) -> None:
    """Makes every read take a random while, so that threads meet in other orders."""
    read, chance = engine.transfer._reader.read, random.Random(0)

    def late(number: int, target: Any) -> None:
        time.sleep(chance.random() * 0.004)
        read(number, target)

    engine.transfer._reader.read = late


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3", "gemma3_text", "falcon"])
def test_every_family_learns_the_same_streamed(model_folder, resident, kind):
    streamed = run_steps(model_folder(kind, num_hidden_layers=LAYERS), streaming=Streaming())
    assert same(resident(kind), streamed)


@pytest.mark.parametrize("streaming", [Streaming(slots=3), Streaming(hot_layers=2), Streaming(3, 1), Streaming(2, 5)])
def test_slots_hot_layers_and_slow_reads_change_no_number(model_folder, resident, streaming):
    folder = model_folder("llama", num_hidden_layers=LAYERS)
    late = slow if streaming.hot_layers < LAYERS else lambda engine: None
    assert same(resident(), run_steps(folder, streaming=streaming, prepare=late))


LONG = pytest.mark.long
WAYS = [
    pytest.param({"quantization": "none"}, id="whole-fp32"),
    pytest.param({"quantization": "none", "dtype": "bf16", "reentrant": True}, id="whole-bf16-reentrant"),
    pytest.param({"quantization": "fp4", "dtype": "bf16"}, id="fp4-bf16"),
    pytest.param({"adapter": replace(ALL_LINEAR, method="rslora"), "reentrant": True}, id="rslora", marks=LONG),
    pytest.param({"adapter": replace(ALL_LINEAR, method="dora", lora_dropout=0.0)}, id="dora", marks=LONG),
    pytest.param({"adapter": replace(ALL_LINEAR, method="dora"), "quantization": "none"}, id="dora-whole"),
    pytest.param({"adapter": replace(ALL_LINEAR, target_modules=("q_proj",))}, id="one-target"),
    pytest.param(
        {"adapter": replace(ALL_LINEAR, layers_to_transform=(1, 3), modules_to_save=("lm_head",))},
        id="few-layers",
        marks=LONG,
    ),
]


@pytest.mark.parametrize("settings", WAYS)
def test_every_way_to_train_is_the_same_streamed(model_folder, resident, settings):
    folder = model_folder("llama", num_hidden_layers=LAYERS)
    assert same(resident(**settings), run_steps(folder, streaming=Streaming(), **settings))


@pytest.mark.long
@pytest.mark.parametrize("kind", ["qwen2", "falcon", "phi"])
def test_biases_and_tied_heads_are_loaded_as_for_a_resident_base(model_folder, resident, kind):
    changes = {"bias": True} if kind == "falcon" else {}
    folder = model_folder(kind, num_hidden_layers=LAYERS, **changes)
    settings = {"quantization": "none", "dtype": "bf16"}
    assert same(run_steps(folder, **settings), run_steps(folder, streaming=Streaming(), **settings))


def test_a_head_that_transformers_renames_is_loaded_as_for_a_resident_base(model_folder):
    folder = model_folder("gpt_neox")
    streaming = Streaming(embedding_on_host=True, head_on_host=True)
    assert same(run_steps(folder, steps=1), run_steps(folder, streaming=streaming, steps=1))


@pytest.mark.parametrize("settings", [{}, pytest.param({"dtype": "bf16", "reentrant": True}, marks=LONG)])
def test_int8_is_the_same_streamed(model_folder, settings):
    folder = model_folder("llama", num_hidden_layers=LAYERS)
    settings = {"quantization": "int8", **settings}
    assert same(run_steps(folder, **settings), run_steps(folder, streaming=Streaming(), **settings))


STORED = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_compute_dtype": "bfloat16"},
    "int8": {"load_in_8bit": True},
}


@pytest.mark.parametrize("kind", ["nf4", pytest.param("fp4", marks=LONG), pytest.param("int8", marks=LONG)])
def test_a_base_stored_quantized_goes_through_as_it_is(model_folder, tmp_path, kind):
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    stored = tmp_path / "stored"
    quantized = AutoModelForCausalLM.from_pretrained(
        model_folder("llama", num_hidden_layers=LAYERS),
        quantization_config=BitsAndBytesConfig(**STORED[kind]),
        dtype=torch.bfloat16,
    )
    quantized.save_pretrained(str(stored))
    settings = {"quantization": kind, "dtype": "bf16"}
    streamed = run_steps(stored, streaming=Streaming(), **settings)
    assert same(run_steps(stored, **settings), streamed)
    held = streamed.model.get_base_model().streaming_engine.slab
    piece = next(piece for piece in held.layers[0].pieces if piece.part in ("packed", "int8"))
    begin = held.layers[0].offset + piece.offset
    in_slab = held.path.read_bytes()[begin : begin + piece.byte_count]
    in_file = load_file(stored / "model.safetensors")[f"{piece.module}.weight"]
    assert in_slab == in_file.view(torch.uint8).numpy().tobytes()


def test_what_lies_in_the_slots_at_a_turn_is_used_again(model_folder):
    from charkha.backends.torch.streamed_model import engine_of

    folder = model_folder("llama", num_hidden_layers=LAYERS)
    orders = []

    def forget(engine: Any) -> None:  # attaching an adapter asks every layer for its device
        engine.traffic.load_order.clear()
        orders.append(engine)

    run_steps(folder, streaming=Streaming(), steps=1, prepare=forget)
    engine = orders[0]
    assert engine_of(run_steps(folder, steps=1).model) is None
    order = engine.traffic.load_order
    assert order[:13] == [0, 1, 2, 3, 4, 2, 1, 0, 2, 3, 4, 2, 1], order


def test_buffers_take_the_slots_and_hot_layers_and_no_more(model_folder):
    from charkha.backends.torch.model import load_base, quantized_modules
    from charkha.backends.torch.streamed_model import engine_of

    folder = model_folder("llama", num_hidden_layers=LAYERS)
    base = BaseModelSpec(folder, "fp32", "sdpa", "nf4", "cpu")
    model = load_base(replace(base, streaming=Streaming(slots=2, hot_layers=1)))
    engine = engine_of(model)
    assert engine is not None
    assert engine.device_bytes == 3 * engine.slab.largest_layer_bytes
    assert quantized_modules(model) == quantized_modules(load_base(base))
    assert not [name for name in model.state_dict() if "proj" in name]  # views of slots are nobody's state


def test_a_layer_sent_for_too_early_ends_the_run(model_folder, monkeypatch):
    from charkha.backends.torch.expert_slots import WeightsOverwritten
    from charkha.backends.torch.streaming import Engine

    monkeypatch.setattr(Engine, "_upcoming", lambda self, position: [min(position + 2, len(self.cold) - 1)])
    with pytest.raises(WeightsOverwritten, match="was brought into the slot of layer"):
        run_steps(model_folder("llama", num_hidden_layers=LAYERS), streaming=Streaming())


def test_without_the_guard_that_fault_would_train_on_with_wrong_numbers(model_folder, resident, monkeypatch):
    from charkha.backends.torch.streaming import Engine

    monkeypatch.setattr(Engine, "_upcoming", lambda self, position: [min(position + 2, len(self.cold) - 1)])
    monkeypatch.setattr(Engine, "require_intact", lambda self: None)
    wrong = run_steps(model_folder("llama", num_hidden_layers=LAYERS), streaming=Streaming(), steps=1)
    assert wrong.losses != resident().losses[:2]


def test_poison_shows_a_late_reader_and_no_other(model_folder, resident, monkeypatch):
    monkeypatch.setenv("CHARKHA_STREAMING_DEBUG", "1")
    folder = model_folder("llama", num_hidden_layers=LAYERS)
    settings = {"quantization": "none"}
    found = {}

    def look(engine: Any) -> None:
        assert engine._poison
        found["weight"] = engine.view(0, engine.slab.layers[0].pieces[0])
        engine.transfer.wait = lambda slot: None  # a reader that does not wait
        slow(engine)

    assert same(resident(**settings), run_steps(folder, streaming=Streaming(), **settings))
    hasty = run_steps(folder, streaming=Streaming(), steps=1, prepare=look, **settings)
    assert hasty.losses[0] != hasty.losses[0]  # NaN


def test_an_unreadable_slab_is_told_where_the_layer_is_needed(model_folder):
    from charkha.errors import EnvironmentProblem

    def cut(engine: Any) -> None:
        def short(number: int, target: Any) -> None:
            raise EnvironmentProblem("ended while it was read", where=str(engine.slab.path))

        engine.transfer._reader.read = short

    with pytest.raises(EnvironmentProblem, match="ended while it was read"):
        run_steps(model_folder("llama", num_hidden_layers=LAYERS), streaming=Streaming(), prepare=cut)


@pytest.mark.parametrize(
    ("kind", "base", "adapter", "processes", "reason"),
    [
        ("llama", {"quantization": "none"}, {"method": "full"}, 1, "method full trains every weight"),
        ("llama", {}, {"method": "ia3"}, 1, "has not been tried"),
        ("llama", {}, {}, 2, "2 processes would each stream"),
        ("llama", {"device": "mps"}, {}, 1, "shares its memory"),
        ("llama", {"quantization": "int8"}, {"method": "dora"}, 1, "DoRA on a streamed int8 base"),
        ("llama", {}, {"modules_to_save": ("mlp",)}, 1, "'mlp' would train model.layers.0.mlp"),
        ("mixtral", {}, {}, 1, "'all-linear' adapts the experts"),
        ("mixtral", {}, {"target_modules": ("q_proj", "down_proj")}, 1, "'down_proj' adapts the experts"),
        ("mixtral", {"quantization": "int8"}, {"target_modules": ("q_proj",)}, 1, "experts of int8"),
        ("gpt2", {"quantization": "none"}, {}, 1, "is no plain linear layer"),
    ],
)
def test_what_cannot_be_streamed_is_refused_with_the_reason(model_folder, kind, base, adapter, processes, reason):
    from charkha.backends.torch.skeleton import build_skeleton
    from charkha.backends.torch.streamed_model import require_streamable
    from charkha.errors import UsageError

    changes = {"n_layer": 2, "n_embd": 64, "n_head": 4} if kind == "gpt2" else {}
    folder: Path = model_folder(kind, **changes)
    wish = replace(BaseModelSpec(folder, "fp32", "sdpa", "nf4", "cpu", Streaming()), **base)
    with pytest.raises(UsageError, match=reason) as caught:
        require_streamable(build_skeleton(folder), wish, replace(_lora(), **adapter), processes)
    assert caught.value.where == "model.placement"


def _lora() -> AdapterSpec:
    return ALL_LINEAR
