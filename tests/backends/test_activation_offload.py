"""Layer inputs moved to host memory: the same bits as without, nothing left behind on the device, no buffer lost."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import pytest
from streamed_steps import ALL_LINEAR, run_steps, same

pytest.importorskip("torch")

import torch

from charkha.backends.base import AdapterSpec, BaseModelSpec, Streaming
from charkha.backends.torch.activation_offload import InputChanged, copies_for, offload_activations
from charkha.backends.torch.host_copies import Buffers, HostCopies, PageableMemory
from charkha.backends.torch.streamed_model import decoder_layers
from charkha.errors import EnvironmentProblem

LAYERS = 4
FULL = AdapterSpec("full", 0, 0, 0.0, "all-linear")
WAYS = {"plain": {}, "reentrant": {"reentrant": True}, "selective": {"selective": True}}


@pytest.mark.parametrize(
    ("kind", "way"),
    [
        *((kind, "plain") for kind in ("llama", "qwen3", "gemma3_text", "falcon")),
        ("llama", "reentrant"),
        ("qwen3", "selective"),
    ],
)
def test_losses_gradients_and_weights_are_those_of_a_run_that_moves_nothing(model_folder, kind, way):
    folder = model_folder(kind, num_hidden_layers=LAYERS)
    plain = run_steps(folder, quantization="none", **WAYS[way])
    moved = run_steps(folder, quantization="none", offload=True, **WAYS[way])
    assert same(plain, moved)
    assert moved.offload.moved == 4 * (LAYERS - 1)  # four micro batches; the last layer's input stays


@pytest.mark.long
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3", "gemma3_text", "falcon", "gpt2", "mixtral"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", ["lora", "dora", "full"])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_family_method_and_way_of_checkpointing(model_folder, kind, way, method, quantization, dtype):
    if (method, quantization) == ("full", "nf4") or (kind in ("gpt2", "mixtral") and method == "dora"):
        pytest.skip("not trained")
    if kind == "mixtral" and (quantization, dtype) != ("none", "fp32"):
        pytest.skip("its tiny experts are not computed in 16 bits here")
    sizes = {} if kind == "gpt2" else {"num_hidden_layers": LAYERS}
    dropout = 0.0 if kind == "mixtral" else 0.1
    adapter = FULL if method == "full" else replace(ALL_LINEAR, method=method, lora_dropout=dropout)
    given = {"adapter": adapter, "quantization": quantization, "dtype": dtype, **WAYS[way]}
    moved = run_steps(model_folder(kind, **sizes), offload=True, **given)
    assert same(run_steps(model_folder(kind, **sizes), **given), moved)
    assert moved.offload.moved > 0


@pytest.mark.long
@pytest.mark.parametrize("streaming", [Streaming(2, 1), Streaming(3), Streaming(embedding_on_host=True)], ids=repr)
@pytest.mark.parametrize("way", WAYS)
def test_beside_a_streamed_base(model_folder, monkeypatch, tmp_path, streaming, way):
    monkeypatch.setenv("CHARKHA_CACHE", str(tmp_path / "cache"))
    folder = model_folder("llama", num_hidden_layers=6)
    streamed = run_steps(folder, streaming=streaming, offload=True, **WAYS[way])
    assert same(run_steps(folder, **WAYS[way]), streamed)


@pytest.fixture
def model(model_folder):
    """Makes a Llama in train mode with checkpointing, a LoRA adapter, and its inputs moved."""
    from charkha.backends.torch.adapters import attach_adapter
    from charkha.backends.torch.model import load_base

    def make(copies=None, *, offload=True):
        folder = model_folder("llama", num_hidden_layers=LAYERS)
        base = load_base(BaseModelSpec(folder, "fp32", "sdpa", "none", "cpu", None))
        model = attach_adapter(base, ALL_LINEAR, True)
        if offload:
            model.moving = offload_activations(model, copies or copies_for("cpu"))
        model.activation_checkpointing_enable({"use_reentrant": False})
        return model.train()

    return make


def loss_of(model, tokens=12):
    ids = torch.arange(2 * tokens).reshape(2, tokens) % 300 + 3
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def learn_something(model):
    """The same adapter, that is not nothing, in every model."""
    torch.manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.normal_(std=0.05)


class _Late(HostCopies):
    """Copies as late as a stream of their own may be, and memory that is written anew as soon as it may be."""

    def __init__(self):
        super().__init__()
        self._there, self._back = {}, {}

    def leave(self, tensor):
        copy = super().leave(tensor)
        copy.memory.tensor.fill_(0xFF)
        self._there[copy] = tensor
        return copy

    def left(self, copy):
        tensor = self._there.pop(copy)
        copy.content().copy_(tensor)
        tensor.data.fill_(torch.nan)  # past the count of versions

    def bring(self, copy):
        self._back[copy] = made = torch.empty_strided(copy.shape, copy.stride, dtype=copy.dtype).fill_(torch.nan)
        return made

    def arrived(self, copy):
        self._back.pop(copy).copy_(copy.content())


def test_nothing_is_read_before_it_arrived_or_after_it_left(model):
    found = []
    for copies in (None, _Late()):
        moving = model(copies, offload=copies is not None)
        learn_something(moving)
        torch.manual_seed(3)
        for _ in range(2):
            loss_of(moving).backward()
        found.append([parameter.grad for parameter in moving.parameters() if parameter.requires_grad])
    assert all(torch.equal(left, right) for left, right in zip(*found, strict=True))


class _Alive:
    """Which inputs of decoder layers are in the device's memory."""

    def __init__(self, model):
        self._seen = []
        for _name, layer in decoder_layers(model):
            layer.register_forward_pre_hook(lambda _layer, arguments: self.add(arguments[0]), prepend=True)

    def add(self, tensor):
        self._seen.append(weakref.ref(tensor.untyped_storage()))

    @property
    def count(self):
        return len({reference() for reference in self._seen} - {None})


class _Seen(HostCopies):
    """Copies that tell what came back, and the most that was there at once."""

    def __init__(self):
        super().__init__()
        self.alive = None
        self.most = 0
        self.brought = 0

    def bring(self, copy):
        made = super().bring(copy)
        self.alive.add(made)
        self.brought += 1
        self.most = max(self.most, self.alive.count)
        return made


def test_the_device_holds_one_input_until_backward_and_two_in_it(model):
    plain = model(offload=False)
    alive = _Alive(plain)
    loss = loss_of(plain)
    assert alive.count == LAYERS
    copies = _Seen()
    moving = model(copies)
    copies.alive = _Alive(moving)
    loss = loss_of(moving)
    assert copies.alive.count == 1
    loss.backward()
    assert (copies.brought, copies.most) == (LAYERS - 1, 2)
    assert copies.alive.count == 0


def test_host_memory_is_what_is_planned_and_used_again(model):
    from charkha.plan.architecture import read_architecture
    from charkha.plan.device_memory import host_memory_bytes
    from charkha.plan.memory_settings import MemorySettings

    moving = model()
    buffers = moving.moving.copies.buffers
    for tokens in (12, 12, 20, 7):  # of which 20 need larger pieces, and 7 none of their own
        loss_of(moving, tokens).backward()
    settings = MemorySettings(dtype="fp32", rows=2, tokens=20, gradient_checkpointing=True, device="cpu")
    architecture = read_architecture(moving.config.to_dict())
    away = replace(settings, offload=frozenset({"activations"}))
    planned = host_memory_bytes(architecture, away, 0) - host_memory_bytes(architecture, settings, 0)
    assert buffers.byte_count == planned == (LAYERS - 1) * 2 * 20 * 64 * 4
    assert len(buffers._free) == LAYERS - 1


def test_a_graph_that_is_dropped_gives_its_buffers_back(model):
    moving = model()
    buffers = moving.moving.copies.buffers
    loss = loss_of(moving)
    assert len(buffers._free) == 0
    del loss
    gc.collect()
    assert len(buffers._free) == LAYERS - 1
    loss_of(moving).backward()
    assert len(buffers._free) == LAYERS - 1


def test_two_forward_passes_before_one_backward(model):
    """As preferences are learned: the chosen and the rejected answer in one loss."""
    plain, moving = model(offload=False), model()
    grads = []
    for one in (plain, moving):
        learn_something(one)
        torch.manual_seed(0)
        (loss_of(one, 12) - 0.5 * loss_of(one, 9)).sigmoid().backward()
        grads.append([parameter.grad for parameter in one.parameters() if parameter.requires_grad])
    assert all(torch.equal(left, right) for left, right in zip(*grads, strict=True))


def test_gradients_may_be_taken_twice(model):
    moving = model()
    loss = loss_of(moving)
    loss.backward(retain_graph=True)
    first = [parameter.grad.clone() for parameter in moving.parameters() if parameter.requires_grad]
    moving.zero_grad()
    loss.backward()
    second = [parameter.grad for parameter in moving.parameters() if parameter.requires_grad]
    assert all(torch.equal(left, right) for left, right in zip(first, second, strict=True))


def test_nothing_moves_without_gradients_or_checkpointing(model):
    moving = model()
    with torch.no_grad():
        loss_of(moving)
    loss_of(moving.eval())
    moving.train().gradient_checkpointing_disable()
    loss_of(moving).backward()
    assert moving.moving.moved == 0


def test_no_random_number_is_drawn(model):
    plain, moving = model(offload=False), model()
    states = []
    for one in (plain, moving):
        torch.manual_seed(3)
        loss_of(one).backward()
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_a_layer_that_changes_its_input_is_told(model):
    moving = model()
    _name, layer = decoder_layers(moving)[1]
    layer.input_layernorm.register_forward_pre_hook(lambda _norm, arguments: _in_place(arguments[0]))
    with pytest.raises(InputChanged, match="in place"):
        loss_of(moving)
    with torch.no_grad():
        loss_of(moving)  # hooks are gone after an error too


def _in_place(tensor):
    with torch.no_grad():
        tensor.add_(1)


def test_masks_and_positions_are_not_moved(model):
    copies, sizes = HostCopies(), []
    leave = copies.leave
    copies.leave = lambda tensor: (sizes.append(tuple(tensor.shape)), leave(tensor))[1]
    moving = model(copies)
    ids = torch.ones(2, 8, dtype=torch.int64)
    mask = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
    moving(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False).loss.backward()
    assert sizes == [(2, 8, 64)] * (LAYERS - 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 0, 2)])
def test_what_comes_back_is_the_same_tensor_bit_for_bit(dtype, order):
    numbers = torch.randint(-(2**15), 2**15, (3, 4, 5 * dtype.itemsize // 2), dtype=torch.int16).view(dtype)
    tensor = numbers.permute(order)  # NaN with every payload among them
    copies = HostCopies()
    copy = copies.leave(tensor)
    back = copies.bring(copy)
    copies.arrived(copy)
    assert (back.shape, back.stride(), back.dtype) == (tensor.shape, tensor.stride(), tensor.dtype)
    assert torch.equal(back.permute(*torch.tensor(order).argsort()).view(torch.int16), numbers.view(torch.int16))
    assert back.data_ptr() != tensor.data_ptr()


def test_memory_that_cannot_be_pinned_is_told_once(monkeypatch, caplog):
    from charkha.backends.torch import host_copies, transfers

    def refused(size):
        raise EnvironmentProblem(f"{size} bytes of host memory could not be pinned", remedy="raise ulimit -l")

    monkeypatch.setattr(transfers, "PinnedMemory", refused)
    make = host_copies._PinnedWherePossible()
    assert [make(size).tensor.numel() for size in (100, 200)] == [100, 200]
    assert caplog.text.count("could not be pinned") == 1
    assert "raise ulimit -l" in caplog.text


def test_buffers_are_no_larger_than_they_had_to_be():
    buffers = Buffers(PageableMemory)
    small, large = buffers.take(100), buffers.take(1000)
    buffers.give(large)
    buffers.give(small)
    assert buffers.take(50) is small
    assert buffers.take(200) is large
    buffers.give(small)
    assert buffers.take(400).tensor.numel() == 400  # in the place of the small one
    assert buffers.byte_count == 1400
