"""Writes docs/claims.md: well-known claims about fine-tuning, each asked of the planner, with its inputs.

Run: make claims      (python tools/claims.py; a second or two, no network, no GPU)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from charkha.hardware.catalog import find_gpu
from charkha.hardware.machine import Machine
from charkha.plan.architecture import Architecture, read_architecture
from charkha.plan.device_memory import host_memory_bytes
from charkha.plan.memory_settings import MemorySettings
from charkha.plan.popular_models import popular_config
from charkha.plan.search import Candidate, evaluate
from charkha.plan.weights import base_weight_bytes, trainable_parameters

PAGE = Path(__file__).resolve().parents[1] / "docs/claims.md"
GIB = 2**30
QLORA = MemorySettings(
    dtype="bf16", quantization="nf4", rows=1, tokens=2048, gradient_checkpointing=True, loss_head="chunked",
    padded=False, attention="flash_attention_2",
)  # fmt: skip


@dataclass(frozen=True)
class Claim:
    """What is said, what the planner says, and whether that is the same."""

    said: str
    verdict: str
    inputs: str
    table: tuple[tuple[str, ...], ...]  # the first row is the head


def model(name: str) -> Architecture:
    config = popular_config(name)
    assert config is not None, name
    return read_architecture(config)


def machine(card: str, count: int = 1) -> Machine:
    return Machine(card, (find_gpu(card),) * count, None)


def gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"


def fewer_parameters() -> Claim:
    llama = model("meta-llama/Llama-3.1-8B")
    cases = {"r 8 on query and value": (8, ("q_proj", "v_proj")), "r 16 on every linear layer": (16, "all-linear"),
             "r 64 on every linear layer": (64, "all-linear")}  # fmt: skip
    rows = [("adapter", "trained parameters", "fewer by")]
    for name, (r, targets) in cases.items():
        count = trainable_parameters(llama, replace(QLORA, r=r, target_modules=targets))
        rows.append((name, f"{count:,}", f"{1 - count / llama.parameters:.2%}"))
    return Claim(
        "LoRA trains up to 99.9 % fewer parameters.",
        "True for small ranks on two matrices; 99.5 % on every linear layer at rank 16, where most people start.",
        "Llama-3.1-8B, 8,030,261,248 parameters.",
        tuple(rows),
    )


def large_on_48_gb() -> Claim:
    shape = {"model_type": "llama", "num_hidden_layers": 80, "hidden_size": 8192, "num_attention_heads": 64,
             "intermediate_size": 22016, "vocab_size": 32000, "tie_word_embeddings": False}  # fmt: skip
    llama, card = read_architecture(shape), machine("RTX A6000")
    rows = [("length", "optimizer", "needs at least", "of", "fits")]
    for tokens in (512, 1024, 2048):
        for optimizer in ("adamw_torch_fused", "paged_adamw_8bit"):
            found = evaluate(llama, replace(QLORA, r=64, tokens=tokens, optimizer=optimizer), card)
            rows.append((str(tokens), optimizer, gib(found.memory.least), gib(found.limit_bytes), yes(found.fits)))
    return Claim(
        "A 65B model can be fine-tuned with QLoRA on one 48 GB card.",
        "True with one row at a time, checkpointing and a paged optimizer, at lengths that the table shows.",
        f"Llama-65B ({llama.parameters:,} parameters), r 64 on every linear layer, one row, chunked loss, RTX A6000.",
        tuple(rows),
    )


def seven_billion_in_12_gb() -> Claim:
    llama, card = model("meta-llama/Llama-2-7b-hf"), machine("RTX 3060")
    rows = [("rows", "length", "checkpointing", "loss", "needs at least", "in 12 GB")]
    for count, tokens, checkpointing, head in (
        (1, 512, False, "full"), (1, 1024, False, "full"), (1, 2048, True, "full"), (4, 1024, True, "full"),
        (4, 2048, True, "chunked"), (5, 2048, True, "chunked"), (8, 2048, True, "chunked"), (4, 2048, False, "chunked"),
    ):  # fmt: skip
        settings = replace(QLORA, rows=count, tokens=tokens, gradient_checkpointing=checkpointing, loss_head=head)
        found = evaluate(llama, settings, card)
        words = (str(count), str(tokens), "full" if checkpointing else "none", head)
        rows.append((*words, gib(found.memory.least), yes(found.fits)))
    return Claim(
        "QLoRA of a 7B model takes 10 to 12 GB.",
        "It depends on rows, length and checkpointing, from 6 GiB to 59: 10 to 12 GB are one row of some 1,000 tokens "
        "without checkpointing, or five rows of 2,048 with it.",
        "Llama-2-7B, r 16 on every linear layer, FlashAttention; the card is an RTX 3060 with 12 GB.",
        tuple(rows),
    )


def checkpointing() -> Claim:
    card = machine("RTX 4090")
    rows = [("model", "method", "rows x length", "saves", "takes longer by")]
    for name, method, count, tokens in (
        ("Llama-3.1-8B", "QLoRA", 2, 1024), ("Llama-3.1-8B", "QLoRA", 4, 2048), ("Llama-3.2-3B", "LoRA", 4, 512),
        ("Llama-3.2-1B", "full", 8, 1024),
    ):  # fmt: skip
        shared = replace(
            QLORA,
            rows=count,
            tokens=tokens,
            method="full" if method == "full" else "lora",
            quantization="nf4" if method == "QLoRA" else "none",
        )
        off = evaluate(model(f"meta-llama/{name}"), replace(shared, gradient_checkpointing=False), card)
        on = evaluate(model(f"meta-llama/{name}"), shared, card)
        saved = 1 - on.memory.allocated / off.memory.allocated
        longer = on.time.step_seconds(1) / off.time.step_seconds(1) - 1
        rows.append((name, method, f"{count} x {tokens}", f"{saved:.0%}", f"{longer:.0%}"))
    return Claim(
        "Gradient checkpointing saves 30 to 50 % of memory for about 20 % more time.",
        "It saves more than that where activations dominate, and costs a third to two fifths more time beside frozen "
        "weights (two passes of matrix products become three), a quarter to a third in full training.",
        "RTX 4090, chunked loss, FlashAttention, live tensor bytes at the peak.",
        tuple(rows),
    )


def what_24_gb_hold() -> Claim:
    card = machine("RTX 4090")
    rows = [("model", "base", "weights", "needs at least", "tokens/s", "in 24 GB")]
    for name, storage in (("meta-llama/Llama-2-7b-hf", "nf4"), ("meta-llama/Llama-2-13b-hf", "nf4"),
                          ("Qwen/Qwen2.5-32B", "nf4"), ("meta-llama/Llama-3.1-70B", "nf4"),
                          ("meta-llama/Llama-3.1-70B", "streamed")):  # fmt: skip
        settings = replace(QLORA, streamed=storage == "streamed")
        found = evaluate(model(name), settings, card)
        weights = base_weight_bytes(model(name), replace(settings, streamed=False))
        rate = f"{found.tokens_per_second:,.0f}" if found.fits else "-"
        rows.append((name.partition("/")[2], storage, gib(weights), gib(found.memory.least), rate, yes(found.fits)))
    return Claim(
        "A 24 GB card fine-tunes 7B and 13B models with ease, and 70B with QLoRA.",
        "7B to 13B: true, and 32B just about. 70B: false with the base on the card: its 4-bit weights alone are more "
        "than 36 GiB. Popular guides give 18.9 GB for them, which would be 2.1 bits a weight. It takes a 48 GB card at "
        "best, or a base that is streamed from host memory layer by layer.",
        "One row of 2048 tokens, r 16 on every linear layer, checkpointing, chunked loss, RTX 4090 (23.6 GiB).",
        tuple(rows),
    )


def hours_on_a_4090() -> Claim:
    llama, card = model("meta-llama/Llama-2-7b-hf"), machine("RTX 4090")
    rows = [("examples", "tokens each", "epochs", "hours")]
    for examples in (1000, 5000):
        for tokens in (256, 512, 1024):
            found = evaluate(llama, replace(QLORA, rows=max(1, 4096 // tokens), tokens=tokens), card)
            hours = examples * tokens * 3 / found.tokens_per_second / 3600
            rows.append((f"{examples:,}", str(tokens), "3", f"{hours:.1f}"))
    return Claim(
        "1,000 to 5,000 examples on a 7B model and an RTX 4090 take 1 to 4 hours.",
        "Right in size: minutes for a thousand short rows, an hour or two for five thousand long ones.",
        "Llama-2-7B in NF4, r 16 on every linear layer, checkpointing, about 4,096 tokens a micro batch, no padding.",
        tuple(rows),
    )


def cards_for_full_70b() -> Claim:
    llama = model("meta-llama/Llama-3.1-70B")
    rows = [("weights and states", "optimizer", "80 GB cards", "each needs at least")]
    for dtype, optimizer in (("fp32", "adamw_torch_fused"), ("bf16", "adamw_torch_fused"), ("bf16", "adamw_8bit")):
        for count in (4, 6, 8, 10, 12, 16, 20, 24, 32):
            found = _full(llama, dtype, optimizer, count)
            if found.fits:
                rows.append((dtype, optimizer, str(count), gib(found.memory.least)))
                break
    return Claim(
        "Full fine-tuning of a 70B model needs eight 80 GB cards.",
        "Eight hold it only with 16-bit weights and states; with fp32 weights and states, which train more surely, it "
        "takes about twice as many.",
        "Llama-3.1-70B, FSDP, one row of 2048 tokens a card, checkpointing, chunked loss, H100 80GB.",
        tuple(rows),
    )


def _full(llama: Architecture, dtype: str, optimizer: str, count: int) -> Candidate:
    settings = replace(
        QLORA,
        method="full",
        quantization="none",
        optimizer=optimizer,
        trained_dtype="bf16" if dtype == "bf16" else "fp32",
        mixed_precision=dtype == "fp32",
        strategy="fsdp",
        processes=count,
    )
    return evaluate(llama, settings, machine("H100", count))


def host_memory() -> Claim:
    rows = [("run", "card memory", "host memory", "host / card")]
    cases = (
        ("7B QLoRA on an RTX 4090", "meta-llama/Llama-2-7b-hf", QLORA),
        ("70B QLoRA, streamed, on an RTX 4090", "meta-llama/Llama-3.1-70B", replace(QLORA, streamed=True)),
        ("8B full, optimizer offloaded, on an RTX 4090", "meta-llama/Llama-3.1-8B",
         replace(QLORA, method="full", quantization="none", offload=frozenset({"optimizer", "parameters"}))),
    )  # fmt: skip
    memory = find_gpu("RTX 4090").memory_bytes
    for name, base, settings in cases:
        needed = host_memory_bytes(model(base), settings, 5_000_000)
        rows.append((name, gib(memory), gib(needed), f"{needed / memory:.1f}"))
    return Claim(
        "A machine needs 2 to 4 times as much RAM as VRAM.",
        "More than a resident QLoRA needs, right for a streamed base; full training with offloaded states needs more.",
        "Host memory of the training processes alone: the system and other programs come on top.",
        tuple(rows),
    )


def yes(fits: bool) -> str:
    return "yes" if fits else "no"


def claims() -> Iterator[Claim]:
    """Every claim, in the order of the page."""
    for claim in (fewer_parameters, large_on_48_gb, seven_billion_in_12_gb, checkpointing, what_24_gb_hold,
                  hours_on_a_4090, cards_for_full_70b, host_memory):  # fmt: skip
        yield claim()


def page() -> str:
    """The whole page."""
    parts = [
        "# Well-known claims, asked of the planner",
        "Written by `make claims` from the closed form of `charkha plan`; a test holds that it is up to date. How far "
        "off the closed form is stands in plan-accuracy.md. Memory is what a card must have at the least, the CUDA "
        "context included.",
    ]
    for claim in claims():
        lines = [" | ".join(row) for row in claim.table]
        rule = "|".join(["---"] * len(claim.table[0]))
        table = "\n".join([f"| {lines[0]} |", f"|{rule}|", *(f"| {line} |" for line in lines[1:])])
        parts += [f"## {claim.said}", claim.verdict, claim.inputs, table]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
