"""Training state as safetensors and JSON: adapter or model, optimizer by parameter name, scheduler, random numbers.

Nothing is pickled. Writing and reading are mirror images; a round trip is bit for bit.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from charkha.errors import RunDamaged

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


def save_weights(model: Any, folder: Path) -> None:
    """The trained weights: the adapter in PEFT layout, or for full fine-tuning every weight by name."""
    if is_peft(model):
        model.save_pretrained(str(folder), safe_serialization=True)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
        return
    from safetensors.torch import save_model

    save_model(model, str(folder / MODEL_TENSORS))  # stores tied weights once


def load_weights(model: Any, folder: Path) -> None:
    """Copies the saved weights into the model, whose dtypes stay as they are.

    (PEFT's own loading upcasts bf16 adapters to fp32, after which the run would go on differently.)
    Raises RunDamaged when names or shapes do not match the model.
    """
    from safetensors.torch import load_file, load_model

    if not is_peft(model):
        missing, unexpected = load_model(model, str(folder / MODEL_TENSORS), strict=False)
        _require_same(missing, unexpected, folder)
        return
    import torch
    from peft import get_peft_model_state_dict

    saved = load_file(str(folder / ADAPTER_TENSORS))
    current = _virtual_tokens(model) or get_peft_model_state_dict(model)
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


def save_optimizer(optimizer: Any, model: torch.nn.Module, folder: Path) -> None:
    """Optimizer state as `parameter name|key` tensors, other values and the groups' settings as JSON."""
    import torch
    from safetensors.torch import save_file

    state = optimizer.state_dict()["state"]
    names = _names_in_order(optimizer, model)
    tensors: dict[str, torch.Tensor] = {}
    values: dict[str, Any] = {}
    for index, entries in state.items():
        for key, value in _flat(entries):
            if isinstance(value, torch.Tensor):
                tensors[f"{names[index]}|{key}"] = value.detach().cpu().clone().contiguous()
            else:
                values[f"{names[index]}|{key}"] = value
    save_file(tensors, str(folder / OPTIMIZER_TENSORS))
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    _write_json(folder / OPTIMIZER_JSON, {"names": names, "values": values, "groups": groups})


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


def save_scheduler(scheduler: Any, folder: Path) -> None:
    """The scheduler's counters (its shape is made anew from the plan)."""
    state = {key: value for key, value in scheduler.state_dict().items() if _is_plain(value)}
    _write_json(folder / SCHEDULER_JSON, state)


def load_scheduler(scheduler: Any, folder: Path) -> None:
    """Puts the counters back."""
    scheduler.load_state_dict({**scheduler.state_dict(), **_read_json(folder / SCHEDULER_JSON)})


def save_scaler(scaler: Any, folder: Path) -> None:
    """The fp16 loss scale; nothing where there is no scaler."""
    if scaler is not None:
        _write_json(folder / SCALER_JSON, scaler.state_dict())


def load_scaler(scaler: Any, folder: Path) -> None:
    """Puts the fp16 loss scale back."""
    if scaler is not None and (folder / SCALER_JSON).exists():
        scaler.load_state_dict(_read_json(folder / SCALER_JSON))


def save_rng(folder: Path) -> None:
    """States of the Python, NumPy and torch random generators (CPU, and each CUDA device)."""
    import numpy as np
    import torch
    from safetensors.torch import save_file

    tensors = {"torch_cpu": torch.random.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {f"torch_cuda_{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    tensors["numpy_keys"] = torch.from_numpy(np.asarray(keys, dtype=np.int64))
    save_file(tensors, str(folder / RNG_TENSORS))
    version, numbers, gauss = random.getstate()
    record = {
        "python": [version, list(numbers), gauss],
        "numpy": [str(kind), int(position), int(has_gauss), float(cached)],
    }
    _write_json(folder / RNG_JSON, record)


def load_rng(folder: Path) -> None:
    """Puts the random generators back."""
    import numpy as np
    import torch
    from safetensors.torch import load_file

    tensors = load_file(str(folder / RNG_TENSORS))
    record = _read_json(folder / RNG_JSON)
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


def _write_json(path: Path, record: Any) -> None:
    path.write_text(json.dumps(record), encoding="utf-8")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunDamaged(f"{path.name} cannot be read: {error}", where=str(path.parent)) from None


def trainable(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Named parameters that are trained."""
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
