"""Packed rows train what unpacked rows train; documents of a row do not see each other, or packing is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from charkha.data.packing import pack
from charkha.data.shards import Shard
from charkha.errors import ConfigError
from charkha.plan.packing_support import BY_MASK, KEEP_APART, LEAK, PackingLeaks
from charkha.store.runs import RunFolder

MakeProject = Callable[..., Any]
ModelFolder = Callable[..., Path]

# What small models of these types need beside the usual settings.
NEEDS: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "attn_layer_indices": [1]},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "sliding_window": 16},
    "gemma3_text": {"head_dim": 16, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt_oss": {"num_local_experts": 4, "head_dim": 16},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1},
    "mistral": {"sliding_window": 16},
    "mixtral": {"num_local_experts": 4},
    "qwen3": {"head_dim": 16},
    "qwen3_moe": {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
}
ONLY_EAGER = {"bloom", "gemma2", "gpt_oss", "falcon_mamba", "mamba", "mamba2", "mpt", "xglm"}


def small_model(kind: str, attention: str = "sdpa") -> Any:
    """Two layers with random weights large enough that a look at another document changes the logits."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {
        "vocab_size": 320, "hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
        "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
    }  # fmt: skip
    config = AutoConfig.for_model(kind, **{**settings, **NEEDS.get(kind, {})})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager" if kind in ONLY_EAGER else attention)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2 and "conv" not in name:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def some_shard(lengths: list[int], seed: int = 0) -> Shard:
    """Random documents whose later half, and for some every token, is trained."""
    random = np.random.default_rng(seed)
    ids = random.integers(3, 300, sum(lengths)).astype(np.int32)
    trained = np.concatenate([np.arange(length) >= (length // 2 if length % 3 else 0) for length in lengths])
    offsets = np.cumsum([0, *lengths]).astype(np.int64)
    return Shard(Path("train.safetensors"), ids, trained, offsets, np.arange(len(lengths), dtype=np.int32))


DOCUMENTS = some_shard([9, 17, 5, 30, 2, 24, 11, 40, 7, 13])


def loss_and_gradients(model: Any, batches: list[dict[str, Any]], way: str = "full") -> tuple[float, dict[str, Any]]:
    """Of one optimizer step over the micro batches, normalised by its trained tokens as the trainer does."""
    from charkha.backends.torch.batches import IGNORED
    from charkha.backends.torch.loss import training_loss

    count = sum(int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in batches)
    model.zero_grad()
    total = 0.0
    for batch in batches:
        loss = training_loss(model, batch, count, way)
        loss.backward()
        total += float(loss.detach())
    return total, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("way", ["own", "full", "chunked"])
@pytest.mark.parametrize(
    "kind", ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3"]
)
def test_a_packed_step_has_the_loss_and_gradients_of_the_same_documents_unpacked(kind: str, way: str) -> None:
    """fp32: the same numbers are added in another order, a few units of 2^-24 per operation."""
    import torch

    from charkha.backends.torch.batches import collate, collate_packed

    model = small_model(kind)
    shapes = pack(DOCUMENTS.lengths, 64)
    rows = shapes.deal(DOCUMENTS.lengths, seed=1, epoch=0, fingerprint="data")
    everything = np.arange(DOCUMENTS.rows)
    unpacked = loss_and_gradients(
        model, [collate(DOCUMENTS, everything[:6], 2), collate(DOCUMENTS, everything[6:], 2)], way
    )
    packed = loss_and_gradients(
        model,
        [
            collate_packed(DOCUMENTS, rows[:2], 2, one_row=False),
            collate_packed(DOCUMENTS, rows[2:], 2, one_row=False),
            collate_packed(DOCUMENTS, [], 2, one_row=False),
        ],
        way,
    )
    assert packed[0] == pytest.approx(unpacked[0], rel=1e-5)
    for name, gradient in unpacked[1].items():
        scale = float(gradient.abs().max())
        assert torch.allclose(packed[1][name], gradient, atol=2e-5 * max(scale, 1e-3), rtol=0), name


@pytest.mark.parametrize("one_row", [False, True])
@pytest.mark.parametrize("kind", sorted(KEEP_APART))
def test_architectures_on_the_list_keep_documents_of_a_row_apart(kind: str, one_row: bool) -> None:
    assert proof_of(small_model(kind), one_row=one_row).holds


@pytest.mark.parametrize("kind", sorted(KEEP_APART - ONLY_EAGER - BY_MASK))
def test_documents_are_apart_when_their_bounds_take_the_place_of_a_mask(kind: str) -> None:
    """Sliding windows are shorter than some of the documents."""
    from charkha.backends.torch.document_attention import use_document_attention

    model = small_model(kind)
    assert use_document_attention(model)
    proof = proof_of(model, one_row=True)
    assert proof.holds
    assert proof.difference < 1e-6


@pytest.mark.parametrize("kind", sorted(BY_MASK))
def test_where_the_bounds_get_lost_rows_stand_side_by_side_under_a_mask(kind: str) -> None:
    from charkha.backends.torch.packing_proof import choose_packed_layout

    model = small_model(kind)
    attention = model.config._attn_implementation
    one_row, proof = choose_packed_layout(model, DOCUMENTS, 2, dtype="fp32", quantization="none", attention=attention)
    assert (one_row, proof.holds, model.config._attn_implementation) == (False, True, attention)


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_a_step_over_bounds_has_the_gradients_of_the_same_documents_unpacked(kind: str) -> None:
    import torch

    from charkha.backends.torch.batches import collate, collate_packed
    from charkha.backends.torch.document_attention import use_document_attention

    model = small_model(kind)
    everything = np.arange(DOCUMENTS.rows)
    alone = loss_and_gradients(model, [collate(DOCUMENTS, everything[:6], 2), collate(DOCUMENTS, everything[6:], 2)])
    assert use_document_attention(model)
    rows = pack(DOCUMENTS.lengths, 64).deal(DOCUMENTS.lengths, seed=1, epoch=0, fingerprint="data")
    packed = loss_and_gradients(model, [collate_packed(DOCUMENTS, rows, 2, one_row=True)])
    assert packed[0] == pytest.approx(alone[0], rel=1e-5)
    for name, gradient in alone[1].items():
        scale = float(gradient.abs().max())
        assert torch.allclose(packed[1][name], gradient, atol=2e-5 * max(scale, 1e-3), rtol=0), name
    padded = loss_and_gradients(model, [collate(DOCUMENTS, everything, 2)])
    assert padded[0] == pytest.approx(alone[0], rel=1e-5), "padded rows, as evaluation has them, go on as before"


@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral", "phi3"])
def test_documents_are_apart_in_eager_attention_too(kind: str) -> None:
    assert proof_of(small_model(kind, "eager")).holds


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=pytest.mark.long) if kind == "granitemoehybrid" else kind for kind in sorted(LEAK)],
)
def test_architectures_on_the_other_list_let_documents_see_each_other(kind: str) -> None:
    proof = proof_of(small_model(kind))
    assert not proof.holds
    assert proof.difference > 0.01, "a leak, not rounding"


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_rounding_in_sixteen_bits_is_no_leak_and_a_leak_is_no_rounding(dtype: str) -> None:
    from charkha.backends.torch.base_config import torch_dtype

    assert proof_of(small_model("llama").to(torch_dtype(dtype)), dtype).holds
    assert not proof_of(small_model("falcon").to(torch_dtype(dtype)), dtype).holds


def test_a_model_that_answers_with_nan_proves_nothing() -> None:
    import torch

    model = small_model("llama")
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    assert not proof_of(model).holds


def test_the_proof_leaves_the_model_training_and_the_random_numbers_as_they_were() -> None:
    import torch

    model = small_model("llama").train()
    before = torch.get_rng_state()
    proof_of(model)
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)


def proof_of(model: Any, dtype: str = "fp32", *, one_row: bool = False) -> Any:
    from charkha.backends.torch.packing_proof import prove_packing

    return prove_packing(model, DOCUMENTS, 2, dtype=dtype, quantization="none", one_row=one_row)


def test_a_packed_batch_holds_each_document_from_position_zero_and_its_first_token_is_not_learned() -> None:
    from charkha.backends.torch.batches import IGNORED, collate_packed

    shard = some_shard([3, 4, 2])  # every token of the first is trained
    batch = collate_packed(shard, [[0, 2], [1]], 99, one_row=False)
    assert set(batch) == {"input_ids", "labels", "position_ids"}, "a mask would let documents see each other"
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 0]]
    assert batch["input_ids"][1].tolist() == [*shard.input_ids(1).tolist(), 99]
    first = shard.input_ids(0).tolist()
    assert batch["labels"][0, :3].tolist() == [IGNORED, *first[1:]]
    assert batch["labels"][1, 4] == IGNORED
    flat = collate_packed(shard, [[0, 2], [1]], 99, one_row=True)
    assert flat["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2, 3]]
    assert flat["cu_seq_lens_q"].tolist() == flat["cu_seq_lens_k"].tolist() == [0, 3, 5, 9]
    assert flat["max_length_q"] == flat["max_length_k"] == 4


def test_flash_attention_is_given_the_bounds_of_every_document(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashAttention's variable-length kernel by its contract, in torch, under what transformers does around it.

    Its plain kernel must not run: that one knows no documents.
    """
    import functools

    import torch
    from transformers import modeling_flash_attention_utils as flash

    seen: list[list[int]] = []

    def variable_length(q: Any, k: Any, v: Any, *, cu_seqlens_q: Any, softmax_scale: float, **rest: Any) -> Any:
        assert rest["causal"]
        seen.append(cu_seqlens_q.tolist())
        parts = [
            torch.nn.functional.scaled_dot_product_attention(
                *(part[a:b].transpose(0, 1)[None] for part in (q, k, v)), is_causal=True, scale=softmax_scale,
                enable_gqa=True,
            )[0].transpose(0, 1)
            for a, b in zip(cu_seqlens_q[:-1].tolist(), cu_seqlens_q[1:].tolist(), strict=True)
        ]  # fmt: skip
        return torch.cat(parts)

    def plain(q: Any, *args: Any, **rest: Any) -> Any:
        length = q.shape[1]
        bounds = torch.arange(0, q.shape[0] * length + 1, length)
        flat = [part.reshape(-1, *part.shape[2:]) for part in (q, *args)]
        return variable_length(*flat, cu_seqlens_q=bounds, **rest).view(q.shape)

    kwargs = functools.partial(
        flash._process_flash_attention_kwargs,
        supports_mapping=dict.fromkeys(("dropout_p", "window_size", "max_seqlen_q", "max_seqlen_k"), True)
        | dict.fromkeys(("deterministic", "softcap", "s_aux", "learnable_sink", "block_table", "cache_seqlens"), False),
    )
    kernels = ((plain, variable_length, None, None, None), (kwargs, None))
    monkeypatch.setattr(flash, "lazy_import_flash_attention", lambda *args, **rest: kernels)
    model = small_model("llama")
    model.config._attn_implementation = "flash_attention_2"
    assert proof_of(model, one_row=True).holds
    assert len(seen[0]) == 5, "four documents in one row"


def test_a_packed_run_learns_and_says_what_was_packed(project: MakeProject) -> None:
    work = project(**PACKED, training={"max_steps": 6, "batch_size": 2, "micro_batch_size": 1, "eval_every": 3})
    result, events = work.train()
    assert result.eval_loss_after < result.eval_loss_before
    manifest = RunFolder(work.run_folder()).read_manifest()
    packing = manifest["plan"]["packing"]
    assert packing["row_tokens"] == 128
    assert packing["documents"] == manifest["data"]["train_rows"] == 32
    assert packing["rows"] == -(-manifest["data"]["train_tokens"] // 128)
    assert packing["fill_rate"] == pytest.approx(manifest["data"]["train_tokens"] / packing["rows"] / 128, abs=1e-4)
    assert manifest["plan"]["steps_per_epoch"] == -(-packing["rows"] // 2)
    notes = [event["text"] for event in events if event["event"] == "note"]
    assert any(note.startswith(f"packed 32 rows into {packing['rows']} of 128 tokens") for note in notes)
    assert any("do not see each other" in note for note in notes)


def test_an_epoch_counts_every_token_once_and_no_padding(project: MakeProject) -> None:
    work = project(**PACKED, training={"max_steps": None, "epochs": 2, "batch_size": 3, "micro_batch_size": 2})
    result, _ = work.train()
    assert result.tokens == 2 * RunFolder(work.run_folder()).read_manifest()["data"]["train_tokens"]


def test_a_run_of_one_packed_step_equals_the_same_documents_unpacked(project: MakeProject) -> None:
    """All 32 rows in one step of either kind; the second step shows that the first moved the weights alike."""
    settings: dict[str, Any] = {"max_steps": 2, "batch_size": 32, "micro_batch_size": 4, "max_grad_norm": 1e6}
    work = project(adapter={"lora_dropout": 0.0}, training=settings)
    _, unpacked = work.train(output="unpacked")
    _, packed = work.train("data.packing=true", "training.micro_batch_size=1", output="packed")
    for one, other in zip(steps_of(unpacked), steps_of(packed), strict=True):
        assert other["tokens"] == one["tokens"]
        assert other["loss"] == pytest.approx(one["loss"], abs=1e-5)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)


def test_packed_micro_batches_of_one_make_the_step_of_two(project: MakeProject) -> None:
    work = project(data={"packing": True, "max_length": 64}, adapter={"lora_dropout": 0.0}, training={"batch_size": 4})
    _, ones = work.train("training.micro_batch_size=1", output="ones")
    _, twos = work.train("training.micro_batch_size=2", output="twos")
    assert [step["loss"] for step in steps_of(ones)] == pytest.approx([s["loss"] for s in steps_of(twos)], abs=1e-5)


@pytest.mark.parametrize(
    "kind",
    ["nf4 with gradient checkpointing", *(pytest.param(kind, marks=pytest.mark.long) for kind in ("lora", "full"))],
)
def test_a_packed_run_that_was_stopped_ends_as_if_it_had_not_been(project: MakeProject, kind: str) -> None:
    """Several epochs; the cut falls within the second, whose rows hold other documents than the first."""
    import torch

    sections: dict[str, Any] = {
        "lora": {},
        "nf4 with gradient checkpointing": {"model": {"quantization": "nf4"}},
        "full": {"adapter": {"method": "full"}},
    }[kind]
    training = {"max_steps": None, "epochs": 3, "batch_size": 2, "micro_batch_size": 1, "eval_every": 2}
    training["gradient_checkpointing"] = "nf4" in kind
    work = project(**PACKED, training=training, **sections)
    whole, _ = work.train(output="whole")
    per_epoch = RunFolder(work.run_folder("whole")).read_manifest()["plan"]["steps_per_epoch"]
    assert per_epoch > 1
    work.train(output="cut", stop_at=1)
    work.train(output="cut", stop_at=per_epoch + 1)
    resumed, _ = work.train(output="cut")
    assert (resumed.status, resumed.resumes, resumed.steps) == ("done", 2, 3 * per_epoch)
    assert resumed.tokens == whole.tokens
    for left, right in ((work.weights("cut"), work.weights("whole")),
                        (work.checkpoint_tensors("cut"), work.checkpoint_tensors("whole"))):  # fmt: skip
        assert left.keys() == right.keys()
        assert all(torch.equal(tensor, right[name]) for name, tensor in left.items())


def steps_of(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [event for event in events if event["event"] == "step"]


PACKED: dict[str, Any] = {"data": {"packing": True}}


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The base's weights must not be read."""
    from charkha.backends.torch import trainer

    def load(*args: object) -> None:
        raise AssertionError("the base was loaded")

    monkeypatch.setattr(trainer, "load_base", load)


@pytest.mark.usefixtures("unloaded")
def test_true_is_refused_by_name_before_the_model_is_loaded(project: MakeProject) -> None:
    with pytest.raises(ConfigError, match=r"data\.packing: true cannot be used here: .*falcon") as caught:
        project("falcon", **PACKED).train()
    assert caught.value.exit_code == 2


@pytest.mark.usefixtures("unloaded")
def test_true_is_refused_with_prompt_tuning(project: MakeProject) -> None:
    with pytest.raises(ConfigError, match="prompt_tuning"):
        project(**PACKED, adapter={"method": "prompt_tuning"}).train()


def test_true_is_refused_when_the_loaded_model_leaks(project: MakeProject, leaking: None) -> None:
    work = project(**PACKED)
    with pytest.raises(PackingLeaks, match="see each other") as caught:
        work.train()
    assert caught.value.exit_code == 2


@pytest.fixture
def leaking(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose type is on no list, and which leaks."""
    from charkha.backends.torch import packing_proof

    monkeypatch.setattr(packing_proof, "prove_packing", lambda *args, **rest: packing_proof.PackingProof(4, 0.5, 1e-4))


def test_auto_is_off_on_a_cpu_and_says_why(project: MakeProject) -> None:
    work = project(training={"max_steps": 1})
    work.train()
    (choice,) = packing_choices(work)
    assert choice["value"] is False
    assert "on a CPU that is nearly as fast" in choice["reason"]


@pytest.fixture
def worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which `auto` packs."""
    from charkha.training import packing_choice

    monkeypatch.setattr(packing_choice, "_not_worth_it", lambda *args: None)
    monkeypatch.setattr(packing_choice, "FEWEST_STEPS", 1)


def packing_choices(work: Any) -> list[dict[str, Any]]:
    choices = RunFolder(work.run_folder()).read_manifest()["choices"]
    return [choice for choice in choices if choice["key"] == "data.packing"]


@pytest.mark.usefixtures("worth_it")
def test_auto_packs_where_it_is_worth_it(project: MakeProject) -> None:
    work = project(training={"max_steps": 2, "micro_batch_size": 1})
    work.train()
    assert packing_choices(work)[0]["value"] is True
    assert RunFolder(work.run_folder()).read_manifest()["plan"]["packing"]["row_tokens"] == 128


@pytest.mark.usefixtures("worth_it", "leaking")
def test_auto_gives_up_packing_when_the_loaded_model_leaks_and_stays_with_it(project: MakeProject) -> None:
    work = project(training={"max_steps": 3})
    paused, _ = work.train(stop_at=2)
    assert (paused.status, paused.resumes) == ("paused", 0)
    (choice,) = packing_choices(work)
    assert choice["value"] is False
    assert "see each other" in choice["reason"]
    assert RunFolder(work.run_folder()).read_manifest()["plan"]["packing"] is None
    resumed, _ = work.train()
    assert (resumed.status, resumed.resumes, resumed.steps) == ("done", 1, 3)


@pytest.mark.parametrize(
    ("model_type", "attention", "against"),
    [
        ("llama", "sdpa", None),
        ("llama", "flash_attention_2", None),
        ("llama", "eager", "square of its length"),
        ("stablelm", "sdpa", "square of its length"),
        ("unheard_of", "sdpa", "not measured"),
    ],
)
def test_on_a_gpu_auto_packs_where_the_kernel_is_given_the_documents_bounds(
    model_type: str, attention: str, against: str | None
) -> None:
    from charkha.training.packing_choice import _not_worth_it

    reason = _not_worth_it(model_type, "cuda", attention)
    assert reason is None if against is None else against in str(reason)


def test_auto_leaves_enough_optimizer_steps(project: MakeProject, monkeypatch: pytest.MonkeyPatch) -> None:
    from charkha.training import packing_choice

    monkeypatch.setattr(packing_choice, "_not_worth_it", lambda *args: None)
    work = project(training={"max_steps": None, "epochs": 1, "batch_size": 8})
    work.train()
    assert "leaves 1 optimizer steps" in packing_choices(work)[0]["reason"]
