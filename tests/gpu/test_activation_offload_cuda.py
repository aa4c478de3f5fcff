"""Layer inputs moved to pinned host memory on a CUDA GPU: the same bits, and the memory that the plan counts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("deterministic_cuda")]

LAYERS, HIDDEN, ROWS, TOKENS = 8, 256, 2, 1024
INPUT_BYTES = ROWS * TOKENS * HIDDEN * 2  # bf16


@pytest.fixture
def folder(model_folder) -> Path:
    made: Path = model_folder(
        "llama",
        num_hidden_layers=LAYERS,
        hidden_size=HIDDEN,
        intermediate_size=688,
        max_position_embeddings=TOKENS,
        dtype="bfloat16",
    )
    return made


def steps(
    folder: Path,
    *,
    offload: bool,
    streaming: Any = None,
    reentrant: bool = False,
    selective: bool = False,
    prepare: Callable[[Any], None] = lambda copies: None,
) -> tuple[list[Any], int]:
    """Losses and gradients of two steps of two micro batches of different lengths; and the peak in bytes."""
    import torch

    from charkha.backends.base import AdapterSpec, BaseModelSpec
    from charkha.backends.torch.activation_offload import copies_for, offload_activations
    from charkha.backends.torch.adapters import attach_adapter
    from charkha.backends.torch.model import load_base

    base = load_base(BaseModelSpec(folder, "bf16", "sdpa", "nf4", "cuda", streaming))
    torch.manual_seed(1)
    model = attach_adapter(base, AdapterSpec("lora", 4, 8, 0.1, "all-linear"), True)
    if offload:
        copies = copies_for("cuda")
        prepare(copies)
        offload_activations(model, copies)
    if selective:
        from trl.models.selective_activation_checkpointing import enable_selective_activation_checkpointing

        enable_selective_activation_checkpointing(model)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    torch.manual_seed(2)
    torch.cuda.reset_peak_memory_stats()
    found: list[Any] = []
    for _ in range(2):
        for tokens in (TOKENS, TOKENS // 2):
            ids = torch.randint(3, 300, (ROWS, tokens)).cuda()
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            found.append(loss.detach().cpu())
        found += [parameter.grad.cpu() for parameter in trained]
        optimizer.step()
        optimizer.zero_grad()
    return found, int(torch.cuda.max_memory_allocated())


def same(left: list[Any], right: list[Any]) -> bool:
    import torch

    return len(left) == len(right) and all(torch.equal(one, other) for one, other in zip(left, right, strict=True))


@pytest.mark.parametrize("way", [{}, {"reentrant": True}, {"selective": True}], ids=str)
@pytest.mark.parametrize("streamed", [False, True])
def test_the_same_bits_and_less_memory(folder, way, streamed):
    from charkha.backends.base import Streaming

    streaming = Streaming(2, 1, "ram") if streamed else None
    plain, usual = steps(folder, offload=False, streaming=streaming, **way)
    moved, peak = steps(folder, offload=True, streaming=streaming, **way)
    assert same(plain, moved)
    # All inputs but two are gone where a layer's gradients are taken; one is left where the loss is.
    assert (LAYERS - 3) * INPUT_BYTES <= usual - peak <= LAYERS * INPUT_BYTES + (2 << 20)


def test_copies_that_come_late_are_waited_for(folder):
    import torch

    def slow(copies: Any) -> None:
        move = copies._move

        def late(target: Any, source: Any) -> None:
            torch.cuda._sleep(20_000_000)  # about 10 ms on the copy stream, longer than a layer
            move(target, source)

        copies._move = late

    plain, _ = steps(folder, offload=False)
    moved, _ = steps(folder, offload=True, prepare=slow)
    assert same(plain, moved)


def test_memory_that_cannot_be_pinned_is_slower_and_as_good(folder, monkeypatch, caplog):
    from charkha.backends.torch import transfers
    from charkha.errors import EnvironmentProblem

    def refused(size: int) -> Any:
        raise EnvironmentProblem(f"{size} bytes of host memory could not be pinned", remedy="raise ulimit -l")

    monkeypatch.setattr(transfers, "PinnedMemory", refused)
    plain, _ = steps(folder, offload=False)
    moved, _ = steps(folder, offload=True)
    assert same(plain, moved)
    assert caplog.text.count("could not be pinned") == 1


def test_a_graph_that_is_dropped_leaves_no_memory_behind(folder):
    import gc

    import torch

    from charkha.backends.base import AdapterSpec, BaseModelSpec
    from charkha.backends.torch.activation_offload import copies_for, offload_activations
    from charkha.backends.torch.adapters import attach_adapter
    from charkha.backends.torch.model import load_base

    base = load_base(BaseModelSpec(folder, "bf16", "sdpa", "none", "cuda", None))
    model = attach_adapter(base, AdapterSpec("lora", 4, 8, 0.0, "all-linear"), True)
    offload = offload_activations(model, copies_for("cuda"))
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    ids = torch.ones(ROWS, TOKENS, dtype=torch.int64, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    held = torch.cuda.memory_allocated()
    del loss
    gc.collect()
    assert torch.cuda.memory_allocated() < held
    assert len(offload.copies.buffers._free) == LAYERS - 1
