"""A streamed base on a CUDA GPU, from pinned RAM and from the disk: the same bits as a resident one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("deterministic_cuda")]


def steps(
    folder: Path,
    streaming: Any,
    prepare: Callable[[Any], None] = lambda engine: None,
    *,
    quantization: str = "nf4",
    targets: Any = "all-linear",
    selective: bool = False,
) -> list[Any]:
    """Losses and gradients of three steps, and logits without gradients."""
    import torch
    from trl.models import enable_selective_activation_checkpointing

    from charkha.backends.base import AdapterSpec, BaseModelSpec
    from charkha.backends.torch.adapters import attach_adapter
    from charkha.backends.torch.model import load_base
    from charkha.backends.torch.streamed_model import engine_of

    base = load_base(BaseModelSpec(folder, "bf16", "sdpa", quantization, "cuda", streaming))
    if selective:
        enable_selective_activation_checkpointing(base)
    torch.manual_seed(1)
    model = attach_adapter(base, AdapterSpec("lora", 4, 8, 0.1, targets), True)
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    if streaming is not None:
        prepare(engine_of(model))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    torch.manual_seed(2)
    found: list[Any] = []
    for _ in range(3):
        ids = torch.randint(3, 300, (2, 64)).cuda()
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        found += [loss.detach().cpu(), *(parameter.grad.cpu() for parameter in trained)]
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        found.append(model(input_ids=ids, use_cache=False).logits.cpu())
    return found


@pytest.mark.parametrize("tier", ["ram", "disk"])
@pytest.mark.parametrize("slots", [2, 3])
@pytest.mark.parametrize("hot_layers", [0, 2])
def test_streamed_is_resident_bit_for_bit(model_folder, monkeypatch, tier, slots, hot_layers):
    import torch

    from charkha.backends.base import Streaming

    monkeypatch.setenv("CHARKHA_STREAMING_DEBUG", "1")  # a read that comes too early or too late sees NaN
    folder = model_folder("llama", num_hidden_layers=6, hidden_size=256, intermediate_size=688)
    resident = steps(folder, None)
    streamed = steps(folder, Streaming(slots, hot_layers, tier))
    assert len(resident) == len(streamed)
    assert all(torch.equal(left, right) for left, right in zip(resident, streamed, strict=True))


def test_copies_that_come_late_are_waited_for(model_folder):
    import torch

    from charkha.backends.base import Streaming

    def slow(engine: Any) -> None:
        move = engine.transfer._move

        def late(target: Any, source: Any) -> None:
            torch.cuda._sleep(20_000_000)  # about 10 ms on the copy stream
            move(target, source)

        engine.transfer._move = late

    folder = model_folder("llama", num_hidden_layers=6, hidden_size=256, intermediate_size=688)
    streamed = steps(folder, Streaming(2, 0, "ram"), slow)
    assert all(torch.equal(left, right) for left, right in zip(steps(folder, None), streamed, strict=True))


@pytest.mark.parametrize("quantization", ["int8", "none", "fp4"])
def test_every_storage_streams_bit_for_bit(model_folder, quantization):
    """int8 is where what is multiplied is made from two tensors of the slab, of which one is small."""
    from charkha.backends.base import Streaming

    folder = model_folder("llama", num_hidden_layers=6, hidden_size=256, intermediate_size=688)
    assert_same(steps(folder, None, quantization=quantization), steps(folder, Streaming(), quantization=quantization))


@pytest.mark.parametrize("expert_slots", [0, 2])
@pytest.mark.parametrize("tier", ["ram", "disk"])
def test_experts_stream_bit_for_bit(model_folder, monkeypatch, tier, expert_slots):
    from charkha.backends.base import Streaming

    monkeypatch.setenv("CHARKHA_STREAMING_DEBUG", "1")
    folder = model_folder("mixtral", num_hidden_layers=4, hidden_size=256, intermediate_size=176)
    targets = ("q_proj", "v_proj")
    assert_same(
        steps(folder, None, quantization="none", targets=targets),
        steps(folder, Streaming(2, 1, tier, expert_slots=expert_slots), quantization="none", targets=targets),
    )


def test_an_embedding_on_the_host_changes_no_bit_and_a_head_only_rounding(model_folder):
    import torch

    from charkha.backends.base import Streaming

    folder = model_folder("llama", num_hidden_layers=4, hidden_size=256, intermediate_size=688)
    resident = steps(folder, None)
    assert_same(resident, steps(folder, Streaming(embedding_on_host=True)))
    both = steps(folder, Streaming(embedding_on_host=True, head_on_host=True))
    assert all(torch.allclose(left, right, rtol=0.05, atol=0.05) for left, right in zip(resident, both, strict=True))


def test_selective_checkpointing_changes_no_bit(model_folder):
    from charkha.backends.base import Streaming

    folder = model_folder("llama", num_hidden_layers=4, hidden_size=256, intermediate_size=688)
    full = steps(folder, None)
    assert_same(full, steps(folder, None, selective=True))
    assert_same(full, steps(folder, Streaming(), selective=True))


def assert_same(left: list[Any], right: list[Any]) -> None:
    import torch

    assert len(left) == len(right)
    assert all(torch.equal(one, other) for one, other in zip(left, right, strict=True))


def test_memory_that_cannot_be_pinned_leaves_no_error_for_the_next_kernel(monkeypatch):
    import torch

    from charkha.backends.torch import transfers

    register = torch.cuda.cudart().cudaHostRegister

    class Twice:
        def cudaHostRegister(self, pointer: int, size: int, flags: int) -> Any:  # CUDA's name
            assert int(register(pointer, size, flags)) == 0
            return register(pointer, size, flags)  # registered already: an error that the runtime remembers

    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "cudart", Twice)
        with pytest.raises(transfers.CannotPin):
            transfers.PinnedMemory(1 << 20)
    assert float(torch.ones(3, device="cuda").sum()) == 3


def test_passes_of_a_head_on_the_host_keep_no_memory_of_their_own(tmp_path):
    import torch
    from safetensors.torch import save_file

    from charkha.backends.torch.host_tables import HostTable
    from charkha.backends.torch.tensor_files import tensors_of_file

    save_file({"head": torch.randn(4096, 1024)}, tmp_path / "model.safetensors")
    table = HostTable(tensors_of_file(tmp_path / "model.safetensors")[0], torch.float32)
    reserved = []
    for _ in range(6):
        total = sum(float(block.sum()) for _first, block in table.blocks(1024, torch.device("cuda", 0)))
        assert total == pytest.approx(float(table.tensor.double().sum()), rel=1e-3, abs=1)
        reserved.append(torch.cuda.memory_reserved())
    assert reserved[-1] == reserved[1]
