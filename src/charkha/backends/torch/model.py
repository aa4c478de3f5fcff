"""Loads the base model as asked; what the stack would silently leave undone is an error."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from charkha.backends.base import BaseModelSpec
from charkha.backends.torch.base_config import read_base_config, torch_dtype
from charkha.backends.torch.device_errors import device_errors_told
from charkha.backends.torch.plain_linear import quantizable_class
from charkha.backends.torch.quiet import quiet_libraries
from charkha.backends.torch.slab_progress import SlabProgress
from charkha.errors import EnvironmentProblem
from charkha.plan.base_checks import check_base_config

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


def load_base(spec: BaseModelSpec, kind: Any = None, progress: SlabProgress | None = None) -> PreTrainedModel:
    """The base model on its device, frozen as nothing yet, in the dtype and quantization of `spec`.

    `kind` is another class to load the files into than the architecture's own; `progress` is told of the making of a
    streamed base.

    Raises EnvironmentProblem for a folder that is not a usable base, and when a base asked for in 4 or 8 bits would not
    be quantized (transformers replaces only plain `nn.Linear` and says nothing otherwise).
    """
    quiet_libraries()
    from transformers import AutoModelForCausalLM

    config = read_base_config(spec.path)
    if kind is None:
        kind = AutoModelForCausalLM if spec.quantization == "none" else quantizable_class(config.get("model_type"))
    check_base_config(config, str(spec.path))
    kwargs: dict[str, Any] = {"dtype": torch_dtype(spec.dtype), "attn_implementation": spec.attention}
    if spec.quantization != "none" and "quantization_config" not in config:
        kwargs["quantization_config"] = _bitsandbytes_config(spec)
    if spec.device == "cuda":
        kwargs["device_map"] = {"": 0}  # straight to the card: host RAM need not hold the model

    def load(kind: Any) -> Any:
        model, loading = kind.from_pretrained(
            spec.path,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # _require_complete tells of them, with names and shapes
            **kwargs,
        )
        _require_complete(loading, spec)
        return model

    with _quiet_transformers(), _only_safetensors(spec.path), device_errors_told(loading=True):
        if spec.streaming is None:
            model = load(kind)
        else:
            from charkha.backends.torch.streamed_model import load_streamed

            model = load_streamed(spec, load, progress)
    if spec.quantization != "none":
        _require_quantized(model, spec)
    keep_4bit_weights_as_they_are(model)
    if spec.device == "mps":
        model = model.to("mps")
    model.config.use_cache = False  # a cache object also switches off document boundaries in packed rows
    return model


def load_adapter(model: PreTrainedModel, folder: Path) -> Any:
    """The model with a trained adapter for inference."""
    from peft import PeftModel

    peft_model = PeftModel.from_pretrained(model, str(folder), is_trainable=False, local_files_only=True)
    _keep_types_of_scaled_int8_layers(peft_model)
    return peft_model


def _keep_types_of_scaled_int8_layers(model: torch.nn.Module) -> None:
    """PEFT's IA3 on an int8 layer answers in fp32 where autocast is off; the next layer expects the model's type."""
    for module in model.modules():
        if type(module).__module__ == "peft.tuners.ia3.bnb":
            module.register_forward_hook(lambda _module, inputs, output: output.to(inputs[0].dtype))


def quantized_modules(model: torch.nn.Module) -> tuple[str, ...]:
    """Names of the 4-bit and 8-bit linear layers, as they are called in the base model."""
    if not _has_bitsandbytes_layers(model):
        return ()
    import bitsandbytes

    kinds = (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)
    names = (name for name, module in model.named_modules() if isinstance(module, kinds))
    return tuple(name.removeprefix("base_model.model.").removesuffix(".base_layer") for name in names)


def keep_4bit_weights_as_they_are(model: torch.nn.Module) -> None:
    """Stops bitsandbytes from repacking 4-bit weights on CPUs with AVX512-BF16.

    The first forward pass in eval mode would otherwise rewrite them for good: afterwards the gradient with respect to
    the input is None and logits differ, so one evaluation in the middle would quietly end the training.
    """
    if not _has_bitsandbytes_layers(model):
        return
    import bitsandbytes

    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit) and hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _has_bitsandbytes_layers(model: torch.nn.Module) -> bool:
    return any(
        kind.__module__.startswith(("bitsandbytes.", "peft.tuners.lora.bnb"))
        for found in {type(module) for module in model.modules()}
        for kind in found.__mro__  # a streamed layer is a subclass
    )


def _bitsandbytes_config(spec: BaseModelSpec) -> Any:
    from transformers import BitsAndBytesConfig

    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise EnvironmentProblem(
            f"model.quantization {spec.quantization} needs bitsandbytes, which is not installed",
            remedy="pip install 'bitsandbytes>=0.50.2'",
        ) from None
    if spec.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=spec.quantization,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch_dtype(spec.dtype),
    )


def _require_complete(loading: dict[str, Any], spec: BaseModelSpec) -> None:
    """Transformers fills weights that the files lack with random numbers and goes on; here that is an error."""
    mismatched = sorted(loading.get("mismatched_keys") or ())
    if mismatched:
        name, stored, expected = mismatched[0]
        raise EnvironmentProblem(
            f"{len(mismatched)} weights have another shape than config.json says (the first: {name}, "
            f"{tuple(stored)} in the files, {tuple(expected)} by the config)",
            where=str(spec.path),
            remedy="fetch or copy the model again; config.json and the weights belong to different models",
        )
    missing = sorted(loading.get("missing_keys") or ())
    if missing:
        raise EnvironmentProblem(
            f"{len(missing)} weights of this architecture are not in the files (the first: {missing[0]})",
            where=str(spec.path),
            remedy="fetch or copy the model again; config.json and the weights may belong to different models",
        )


def _require_quantized(model: torch.nn.Module, spec: BaseModelSpec) -> None:
    import torch

    whole = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module.weight.dtype.is_floating_point and not _is_head(name)
    ]
    if whole:
        raise EnvironmentProblem(
            f"model.quantization {spec.quantization} was asked for, but {len(whole)} linear layers of this model "
            f"stay in {spec.dtype} (the first: {whole[0]}, {type(model.get_submodule(whole[0])).__name__})",
            where=str(spec.path),
            remedy="use model.quantization none with this architecture",
        )


def _is_head(name: str) -> bool:
    return name.rpartition(".")[2] in ("lm_head", "embed_out", "score")


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Loading reports go to the log, not to the terminal, and no progress bars are drawn."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    yield


@contextmanager
def _only_safetensors(folder: Path) -> Iterator[None]:
    """Turns the many ways in which weights can be missing or cut short into one message."""
    if not any(folder.glob("*.safetensors")):
        raise EnvironmentProblem(
            "has no *.safetensors weights",
            where=str(folder),
            remedy="pickled weights (.bin, .pt) are not read; convert them with the model's own tools first",
        )
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, OSError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise EnvironmentProblem(
            f"the weights cannot be loaded: {first_line}",
            where=str(folder),
            remedy="fetch or copy the model again",
        ) from None
