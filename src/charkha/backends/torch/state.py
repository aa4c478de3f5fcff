"""Training state as safetensors and JSON: adapter or model, optimizer by parameter name, scheduler, random numbers.

Nothing is pickled. A snapshot is made at a step boundary and written by the store, which knows bytes only; reading puts
everything back, and a round trip is bit for bit.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from charkha.backends.torch.tensor_files import header_of, stored_name, tensor_bytes
from charkha.errors import RunDamaged
from charkha.store.checkpoints import NewFile

if TYPE_CHECKING:
    import torch

OPTIMIZER_TENSORS = "optimizer.safetensors"
OPTIMIZER_JSON = "optimizer.json"
SCHEDULER_JSON = "scheduler.json"
SCALER_JSON = "scaler.json"
RNG_TENSORS = "rng.safetensors"
RNG_JSON = "rng.json"
MODEL_TENSORS = "model.safetensors"
ADAPTER_TENSORS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
TRAINER_JSON = "trainer_state.json"


def snapshot(trainer: Any, *, copy: bool) -> list[NewFile]:
    """Everything but random numbers that a run needs to go on from this step, as files to be written.

    With `copy` the tensors are copied to host memory now, so that training may go on while they are written; without,
    they are read as they are written, and must not change until then.
    """
    model, optimizer = trainer.model, trainer.optimizer
    files = [
        tensor_file(ADAPTER_TENSORS if is_peft(model) else MODEL_TENSORS, weights(model), copy=copy),
        *_optimizer_files(optimizer, model, copy=copy),
        json_file(SCHEDULER_JSON, _plain_state(trainer.lr_scheduler)),
        json_file(TRAINER_JSON, dataclasses.asdict(trainer.state)),
    ]
    if is_peft(model):
        files.append(bytes_file(ADAPTER_CONFIG, _adapter_config(model)))
    if trainer.accelerator.scaler is not None:
        files.append(json_file(SCALER_JSON, trainer.accelerator.scaler.state_dict()))
    return files


def snapshot_bytes(model: Any) -> int:
    """What a snapshot takes at most before the optimizer has states: weights and two moments of the trained ones."""
    return 3 * sum(int(parameter.numel() * parameter.element_size()) for _name, parameter in trainable(model))


def bytes_file(name: str, data: bytes) -> NewFile:
    """A small file whose bytes are there already."""
    return NewFile(name, len(data), lambda: [data])


def json_file(name: str, record: Any) -> NewFile:
    """A small JSON file; `record` may change afterwards."""
    return bytes_file(name, json.dumps(record).encode())


def tensor_file(name: str, tensors: dict[str, torch.Tensor], *, copy: bool) -> NewFile:
    """A safetensors file (see tensor_files.py for the format), tensor by tensor, never all of them in memory twice."""
    held = {key: _on_host(tensor, copy) for key, tensor in tensors.items()}
    head, size = header_of([(key, stored_name(tensor.dtype), tuple(tensor.shape)) for key, tensor in held.items()])

    def parts() -> Iterator[bytes | memoryview]:
        yield head
        for tensor in held.values():
            yield tensor_bytes(tensor)

    return NewFile(name, len(head) + size, parts)


def _on_host(tensor: torch.Tensor, copy: bool) -> torch.Tensor:
    host = tensor.detach().to("cpu", copy=copy)
    return host.contiguous()


def weights(model: Any) -> dict[str, torch.Tensor]:
    """The live trained weights by their names in files: an adapter's in PEFT layout, or a model's, tied ones once."""
    if is_peft(model):
        from peft import get_peft_model_state_dict

        named: dict[str, torch.Tensor] = _virtual_tokens(model) or get_peft_model_state_dict(model)
        return named
    seen: set[tuple[int, tuple[int, ...]]] = set()
    own: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        place = (tensor.data_ptr(), tuple(tensor.shape))
        if place not in seen:
            seen.add(place)
            own[name] = tensor
    return own


def _adapter_config(model: Any) -> bytes:
    """adapter_config.json as PEFT writes it."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        model.active_peft_config.save_pretrained(folder)
        return Path(folder, ADAPTER_CONFIG).read_bytes()


def load_weights(model: Any, folder: Path) -> None:
    """Copies the saved weights into the model, whose dtypes stay as they are.

    (PEFT's own loading upcasts bf16 adapters to fp32, after which the run would go on differently.)
    Raises RunDamaged when names or shapes do not match the model.
    """
    import torch
    from safetensors.torch import load_file

    saved = load_file(str(folder / (ADAPTER_TENSORS if is_peft(model) else MODEL_TENSORS)))
    current = weights(model)
    _require_same(set(current) - set(saved), set(saved) - set(current), folder)
    with torch.no_grad():
        for name, tensor in current.items():
            if tensor.shape != saved[name].shape:
                raise RunDamaged(
                    f"{name} has shape {tuple(saved[name].shape)}, the model {tuple(tensor.shape)}", where=str(folder)
                )
            tensor.copy_(saved[name])


def _virtual_tokens(model: Any) -> dict[str, torch.Tensor]:
    """Prompt tuning: the live parameter under its name in the file, of which PEFT's state dict holds a copy."""
    if not model.active_peft_config.is_prompt_learning:
        return {}
    return {"prompt_embeddings": model.prompt_encoder[model.active_adapter].embedding.weight}


def is_peft(model: Any) -> bool:
    """Whether an adapter is attached."""
    return hasattr(model, "peft_config")


def _optimizer_files(optimizer: Any, model: torch.nn.Module, *, copy: bool) -> list[NewFile]:
    """Optimizer state as `parameter name|key` tensors, other values and the groups' settings as JSON."""
    import torch

    state = optimizer.state_dict()["state"]
    names = _names_in_order(optimizer, model)
    tensors: dict[str, torch.Tensor] = {}
    values: dict[str, Any] = {}
    for index, entries in state.items():
        for key, value in _flat(entries):
            if isinstance(value, torch.Tensor):
                tensors[f"{names[index]}|{key}"] = value
            else:
                values[f"{names[index]}|{key}"] = value
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    return [
        tensor_file(OPTIMIZER_TENSORS, tensors, copy=copy),
        json_file(OPTIMIZER_JSON, {"names": names, "values": values, "groups": groups}),
    ]


def _flat(entries: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """One parameter's state; bitsandbytes hands out its 8-bit part as a dict inside, and takes it back without."""
    for key, value in entries.items():
        if isinstance(value, dict):
            yield from value.items()
        else:
            yield key, value


def load_optimizer(optimizer: Any, model: torch.nn.Module, folder: Path) -> None:
    """Puts saved state back by parameter name. Raises RunDamaged when the parameters differ."""
    from safetensors.torch import load_file

    record = _read_json(folder / OPTIMIZER_JSON)
    names = _names_in_order(optimizer, model)
    _require_same(set(names) - set(record["names"]), set(record["names"]) - set(names), folder)
    index_of = {name: index for index, name in enumerate(names)}
    state: dict[int, dict[str, Any]] = {}
    for joined, value in (load_file(str(folder / OPTIMIZER_TENSORS)) | record["values"]).items():
        name, _, key = joined.rpartition("|")
        state.setdefault(index_of[name], {})[key] = value
    blank = optimizer.state_dict()["param_groups"]
    groups = [{**group, "params": own["params"]} for group, own in zip(record["groups"], blank, strict=True)]
    optimizer.load_state_dict({"state": state, "param_groups": _tuples_again(groups, blank)})


def _plain_state(scheduler: Any) -> dict[str, Any]:
    """The scheduler's counters (its shape is made anew from the plan)."""
    return {key: value for key, value in scheduler.state_dict().items() if _is_plain(value)}


def load_scheduler(scheduler: Any, folder: Path) -> None:
    """Puts the counters back."""
    scheduler.load_state_dict({**scheduler.state_dict(), **_read_json(folder / SCHEDULER_JSON)})


def load_scaler(scaler: Any, folder: Path) -> None:
    """Puts the fp16 loss scale back."""
    if scaler is not None and (folder / SCALER_JSON).exists():
        scaler.load_state_dict(_read_json(folder / SCALER_JSON))


def random_state() -> tuple[bytes, bytes]:
    """States of the Python, NumPy and torch random generators (CPU, and each CUDA device) as safetensors and JSON."""
    import numpy as np
    import torch
    from safetensors.torch import save

    tensors = {"torch_cpu": torch.random.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {f"torch_cuda_{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    tensors["numpy_keys"] = torch.from_numpy(np.asarray(keys, dtype=np.int64))
    version, numbers, gauss = random.getstate()
    record = {
        "python": [version, list(numbers), gauss],
        "numpy": [str(kind), int(position), int(has_gauss), float(cached)],
    }
    return save(tensors), json.dumps(record).encode()


def random_state_files(rank: int, tensors: bytes, record: bytes) -> list[NewFile]:
    """The `random_state` of one process as files of a checkpoint."""
    return [bytes_file(_of_rank(RNG_TENSORS, rank), tensors), bytes_file(_of_rank(RNG_JSON, rank), record)]


def has_random_state(folder: Path, rank: int) -> bool:
    """Whether a checkpoint holds random numbers of this process: one of fewer processes does not."""
    return (folder / _of_rank(RNG_JSON, rank)).exists()


def _of_rank(name: str, rank: int) -> str:
    stem, dot, ending = name.partition(".")
    return name if rank == 0 else f"{stem}-{rank}{dot}{ending}"


def load_rng(folder: Path, rank: int = 0) -> None:
    """Puts the random generators of one process back."""
    import numpy as np
    import torch
    from safetensors.torch import load_file

    tensors = load_file(str(folder / _of_rank(RNG_TENSORS, rank)))
    record = _read_json(folder / _of_rank(RNG_JSON, rank))
    version, numbers, gauss = record["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, position, has_gauss, cached = record["numpy"]
    np.random.set_state((kind, tensors["numpy_keys"].numpy().astype(np.uint32), position, has_gauss, cached))
    torch.random.set_rng_state(tensors["torch_cpu"])
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            if f"torch_cuda_{index}" in tensors:
                torch.cuda.set_rng_state(tensors[f"torch_cuda_{index}"], index)


def _names_in_order(optimizer: Any, model: torch.nn.Module) -> list[str]:
    """Parameter names in the order in which `optimizer.state_dict()` numbers them."""
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    return [name_of[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def _tuples_again(groups: list[dict[str, Any]], blank: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """JSON turns tuples (Adam's betas) into lists; they become tuples again where the optimizer has tuples."""
    return [
        {key: tuple(value) if isinstance(own.get(key), tuple) else value for key, value in group.items()}
        for group, own in zip(groups, blank, strict=True)
    ]


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str))


def _require_same(missing: Any, unexpected: Any, folder: Path) -> None:
    for names, what in ((missing, "are missing from"), (unexpected, "are unknown to this model in")):
        if names:
            raise RunDamaged(
                f"{len(names)} weights {what} the checkpoint (the first: {sorted(names)[0]})", where=str(folder)
            )


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunDamaged(f"{path.name} cannot be read: {error}", where=str(path.parent)) from None


def trainable(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Named parameters that are trained."""
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
