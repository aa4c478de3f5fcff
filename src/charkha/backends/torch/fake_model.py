"""The run's own model on fake tensors: transformers' class from config.json, bitsandbytes' layers, PEFT's adapter.

Built on the meta device, where construction costs no memory, and then given a fake tensor for every parameter and
buffer. (Under FakeTensorMode itself it cannot be built: PEFT moves modules, and torch refuses to swap tensors that
something refers to weakly; bitsandbytes' parameter classes cannot wrap a fake tensor.)
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from charkha.backends.base import TraceRequest
from charkha.backends.torch.adapters import attach_adapter
from charkha.backends.torch.base_config import torch_dtype
from charkha.backends.torch.plain_linear import quantizable_class
from charkha.errors import EnvironmentProblem
from charkha.plan.base_checks import check_base_config

_BLOCK = 64  # weights that share one constant in bitsandbytes' 4-bit types
_NESTED_BLOCK = 256  # constants that share one, with double quantization
_BRANCHED_ON = (torch.int64, torch.int32, torch.bool)
_WHERE = "config.json"


def build_fake_model(request: TraceRequest, fake_mode: Any) -> Any:
    """The model as training holds it, in train mode, every tensor of it fake.

    Raises EnvironmentProblem when the installed transformers cannot build it, UsageError when the adapter does not fit.
    """
    with torch.device("meta"):
        model = _skeleton(request)
        if request.quantization != "none":
            _quantize(model, request)
        checkpointing = request.gradient_checkpointing != "none"
        model = attach_adapter(model, request.adapter, checkpointing)
        _set_trained_dtype(model, request)
    if checkpointing:
        _checkpoint(model, request.gradient_checkpointing)
    _materialize(model, fake_mode)
    return model.train()


def _skeleton(request: TraceRequest) -> Any:
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    check_base_config(request.config, _WHERE)
    kind = AutoModelForCausalLM
    if request.quantization != "none":
        kind = quantizable_class(request.config.get("model_type"))
    full = request.adapter.method == "full"
    dtype = torch_dtype(request.trainable_dtype if full else request.dtype)
    attention = "sdpa" if request.attention == "sdpa" else "eager"  # fake_attention.py then puts flash's stand-in
    try:
        values = {key: value for key, value in request.config.items() if key != "quantization_config"}
        config = CONFIG_MAPPING[request.config["model_type"]].from_dict(values)
        build = kind.from_config if kind is AutoModelForCausalLM else kind._from_config
        with no_init_weights():
            model = build(config, dtype=dtype, attn_implementation=attention)
    except (ValueError, KeyError, TypeError, AttributeError, ImportError, ZeroDivisionError) as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise EnvironmentProblem(
            f"the installed transformers cannot build this model: {first_line}",
            where=_WHERE,
            remedy="take a causal language model that transformers supports, or a newer transformers",
        ) from None
    model.tie_weights()  # which no_init_weights leaves out as well
    model.config.use_cache = False
    return model


def _quantize(model: Any, request: TraceRequest) -> None:
    """Puts bitsandbytes' layers, with constants of the right shapes, where the quantizer of transformers does."""
    import bitsandbytes
    from transformers import BitsAndBytesConfig
    from transformers.integrations import replace_with_bnb_linear
    from transformers.quantizers.base import HfQuantizer

    int8 = request.quantization == "int8"
    settings = BitsAndBytesConfig(
        load_in_8bit=int8,
        load_in_4bit=not int8,
        bnb_4bit_quant_type="nf4" if int8 else request.quantization,
        bnb_4bit_use_double_quant=request.double_quantization,
        bnb_4bit_compute_dtype=torch_dtype(request.dtype),
    )
    skipped = (request.config.get("quantization_config") or {}).get("llm_int8_skip_modules")
    whole = HfQuantizer.get_modules_to_not_convert(model, skipped, model._keep_in_fp32_modules)
    replace_with_bnb_linear(model, whole, settings)
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            _give_4bit_weight(module, request)
        elif isinstance(module, bitsandbytes.nn.Linear8bitLt):
            _give_int8_weight(module)
    model.is_loaded_in_8bit, model.is_loaded_in_4bit = int8, not int8
    model.is_quantized = True
    if request.upcast_unquantized:
        _upcast(model)


def _give_4bit_weight(module: Any, request: TraceRequest) -> None:
    """Two weights a byte and a constant a block: fp32, or a byte with a nested fp32 constant and a common offset."""
    import bitsandbytes
    from bitsandbytes.functional import QuantState

    count = module.in_features * module.out_features
    blocks = -(-count // _BLOCK)
    nested = None
    if request.double_quantization:
        nested = QuantState(
            absmax=torch.empty(-(-blocks // _NESTED_BLOCK), dtype=torch.float32),
            code=torch.empty(256, dtype=torch.float32),
            blocksize=_NESTED_BLOCK,
            dtype=torch.float32,
        )
    state = QuantState(
        absmax=torch.empty(blocks, dtype=torch.uint8 if nested else torch.float32),
        shape=torch.Size((module.out_features, module.in_features)),
        code=torch.empty(16, dtype=torch.float32),
        blocksize=_BLOCK,
        quant_type=request.quantization,
        dtype=torch_dtype(request.dtype),
        offset=torch.empty((), dtype=torch.float32) if nested else None,
        state2=nested,
    )
    module.weight = bitsandbytes.nn.Params4bit(
        torch.empty(-(-count // 2), 1, dtype=torch.uint8),
        requires_grad=False,
        quant_state=state,
        blocksize=_BLOCK,
        compress_statistics=request.double_quantization,
        quant_type=request.quantization,
        quant_storage=torch.uint8,
        module=module,
        bnb_quantized=True,
    )
    module.quant_state = state
    module.support_avx512bf16_for_cpu = False  # as model.keep_4bit_weights_as_they_are does


def _give_int8_weight(module: Any) -> None:
    """A byte a weight and an fp32 scale a row."""
    import bitsandbytes

    weight = torch.empty(module.out_features, module.in_features, dtype=torch.int8)
    scales = torch.empty(module.out_features, dtype=torch.float32)
    module.weight = bitsandbytes.nn.Int8Params(weight, requires_grad=False, CB=weight, SCB=scales)
    module.init_8bit_state()


def _upcast(model: Any) -> None:
    for parameter in model.parameters():
        if parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.to(torch.float32)


def _set_trained_dtype(model: Any, request: TraceRequest) -> None:
    if request.adapter.method == "full":
        return  # the skeleton was built in it
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch_dtype(request.trainable_dtype))


def _checkpoint(model: Any, kind: str) -> None:
    """As TRL's trainer asks for it."""
    if kind == "selective":
        from trl.models.selective_activation_checkpointing import enable_selective_activation_checkpointing

        enable_selective_activation_checkpointing(model)
        model.gradient_checkpointing_enable()
    else:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})


# PEFT tells packed weights by the names of their classes, which cannot wrap a fake tensor.
_Params4bit = type("Params4bit", (FakeTensor,), {})
_Int8Params = type("Int8Params", (FakeTensor,), {})


class _Conversion:
    """Fake tensors for meta ones, the same for the same, so that tied weights stay tied."""

    def __init__(self, fake_mode: Any) -> None:
        self._fake_mode = fake_mode
        self._made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # the meta tensor is kept: its id stays its own

    def tensor(self, meta: torch.Tensor) -> torch.Tensor:
        """A fake tensor; numbers of positions and masks become real zeros, since models branch on them."""
        if id(meta) not in self._made:
            with nullcontext() if meta.dtype in _BRANCHED_ON else self._fake_mode:
                made = torch.empty_strided(meta.shape, meta.stride(), dtype=meta.dtype)
            self._made[id(meta)] = (made.zero_() if meta.dtype in _BRANCHED_ON else made, meta)
        return self._made[id(meta)][0]

    def parameter(self, meta: nn.Parameter) -> nn.Parameter:
        if id(meta) in self._made:
            return self._made[id(meta)][0]
        with self._fake_mode:
            fake = torch.empty_strided(meta.shape, meta.stride(), dtype=meta.dtype)
            parameter = nn.Parameter(fake, requires_grad=meta.requires_grad)
        state = getattr(meta, "quant_state", None)
        if state is not None:
            self.attributes(state)
            parameter.quant_state, parameter.bnb_quantized = state, True
            parameter.__class__ = _Params4bit
        if hasattr(meta, "CB"):
            parameter.CB = parameter.SCB = None
            parameter.__class__ = _Int8Params
        self._made[id(meta)] = (parameter, meta)
        return parameter

    def attributes(self, owner: Any) -> None:
        """Replaces the meta tensors that are plain attributes of an object, and of its nested quantization state."""
        for name, value in list(vars(owner).items()):
            if isinstance(value, torch.Tensor) and value.is_meta:
                setattr(owner, name, self.tensor(value))
            elif name == "prompt_tokens":  # PEFT's, by name of the adapter
                owner.prompt_tokens = {adapter: self.tensor(tokens) for adapter, tokens in value.items()}
        nested = getattr(owner, "state2", None)
        if nested is not None:
            self.attributes(nested)


def _materialize(model: nn.Module, fake_mode: Any) -> None:
    conversion = _Conversion(fake_mode)
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                module._parameters[name] = conversion.parameter(parameter)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = conversion.tensor(buffer)
        conversion.attributes(module)
        if _is_int8(module):
            state: Any = module.state
            state.CB, state.SCB = module.weight.data, conversion.tensor(state.SCB)


def weight_tensors(model: Any) -> list[tuple[str, torch.Tensor]]:
    """(kind, tensor) of everything the model holds before the first step, in the order of its modules."""
    held: list[tuple[str, torch.Tensor]] = []
    for parameter in model.parameters():
        trained = parameter.requires_grad and hasattr(model, "peft_config")
        held.append(("adapter_weights" if trained else "base_weights", parameter.data))
        for state in _states(getattr(parameter, "quant_state", None)):
            held += [("base_weights", value) for value in vars(state).values() if isinstance(value, torch.Tensor)]
    held += [("base_weights", buffer) for buffer in model.buffers()]
    scales = (getattr(module.state, "SCB", None) for module in model.modules() if _is_int8(module))
    held += [("base_weights", scale) for scale in scales if scale is not None]
    return held


def _is_int8(module: Any) -> bool:
    return type(getattr(module, "state", None)).__name__ == "MatmulLtState"


def _states(state: Any) -> list[Any]:
    return [part for part in (state, getattr(state, "state2", None)) if part is not None]
