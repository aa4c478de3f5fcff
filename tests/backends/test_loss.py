"""The three ways to the loss give one number and one gradient."""

from __future__ import annotations

import pytest
import torch

from charkha.backends.torch.batches import IGNORED
from charkha.backends.torch.loss import choose_loss, training_loss


def tiny(family: str, adapter: bool):
    import transformers
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    common = {
        "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 64, "max_position_embeddings": 64, "initializer_range": 0.2,
    }  # fmt: skip
    extra = {"Gemma2": {"head_dim": 8, "final_logit_softcapping": 3.0, "attn_implementation": "eager"},
             "Qwen2": {"tie_word_embeddings": True}}.get(family, {})  # fmt: skip
    config = getattr(transformers, f"{family}Config")(**common, **extra)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    return (
        get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
        if adapter
        else model
    )


def batch():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 97, (3, 20), generator=generator)
    labels = ids.clone()
    labels[:, :9] = IGNORED
    labels[1, 15:] = IGNORED
    mask = torch.ones_like(ids)
    mask[1, 15:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def loss_and_gradient(model, way):
    inputs = batch()
    count = (inputs["labels"][:, 1:] != IGNORED).sum()
    model.zero_grad()
    loss = training_loss(model, inputs, count, way)
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("adapter", [True, False])
@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Gemma2"])
@pytest.mark.parametrize("way", ["full", "chunked"])
def test_trained_positions_alone_give_the_models_own_loss_and_gradient(family, adapter, way, monkeypatch):
    monkeypatch.setattr("charkha.backends.torch.loss._CHUNK_BYTES", 4 * 97 * 5)  # chunks of five tokens
    model = tiny(family, adapter)
    own_loss, own_gradient = loss_and_gradient(model, "own")
    loss, gradient = loss_and_gradient(model, way)
    # fp32 sums in another order: a few units in the last place of the largest term.
    assert loss == pytest.approx(own_loss, rel=1e-6)
    assert torch.allclose(gradient, own_gradient, rtol=1e-4, atol=1e-6 * own_gradient.abs().max().item())
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("way", ["own", "full", "chunked"])
def test_a_micro_batch_without_a_trained_token_adds_nothing(way):
    model = tiny("Llama", True)
    inputs = batch()
    inputs["labels"][:] = IGNORED
    loss = training_loss(model, inputs, torch.tensor(7), way)
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_a_trained_head_takes_its_gradient_through_the_chunks():
    model = tiny("Llama", False)
    loss_and_gradient(model, "chunked")
    assert model.lm_head.weight.grad.abs().max() > 0


def test_models_with_terms_of_their_own_keep_their_own_loss():
    from transformers import MixtralConfig, MixtralForCausalLM

    mixtral = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=64, num_local_experts=2,
        )
    )  # fmt: skip
    assert choose_loss(mixtral, "chunked") == "own"
    assert choose_loss(tiny("Llama", True), "chunked") == "chunked"
    assert choose_loss(tiny("Llama", True), "full") == "full"


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("RecurrentGemma", {"lru_width": 32, "logits_soft_cap": 3.0, "head_dim": 8}),
        ("Cohere", {"logit_scale": 0.1}),
        ("Granite", {"logits_scaling": 7.0}),
    ],
)
def test_a_model_that_does_more_than_its_head_is_not_chunked(family, settings):
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=97, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, **settings,
    )  # fmt: skip
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)
    assert choose_loss(model, "chunked") == "full"
    plain = tiny("Llama", adapter=True).train()
    state = torch.get_rng_state()
    assert choose_loss(plain, "chunked") == "chunked"
    assert plain.training
    assert torch.equal(state, torch.get_rng_state()), "the trial must not move the random numbers"
