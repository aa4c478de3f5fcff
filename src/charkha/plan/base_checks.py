"""Which base models can be trained, decided from `config.json` alone, before anything large is read or downloaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from charkha.errors import EnvironmentProblem

# Keys whose presence makes a model see or hear; their parts cannot be trained here and their text rows are not plain.
_SENSES = {
    "vision_config": "vision",
    "vision_tower": "vision",
    "mm_vision_tower": "vision",
    "audio_config": "audio",
    "audio_encoder_config": "audio",
    "speech_config": "audio",
    "thinker_config": "vision and audio",
}
_OTHER_TASKS = ("ForMaskedLM", "ForQuestionAnswering", "ForTokenClassification", "ForPreTraining", "ForMultipleChoice")

_KERNELS = frozenset({"eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention", "grouped_mm"})
_CODE_KEYS = frozenset({"trust_remote_code", "model_file", "custom_pipelines"})

# The causal language models that transformers brings itself (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES of 5.23); a model of
# such a type needs no code of its own, whatever its `auto_map` says.
KNOWN_MODEL_TYPES = frozenset(
    """
afmoe apertus arcee aria_text axk1 axk2 bailing_hybrid bamba bart beam bert bert-generation big_bird bigbird_pegasus
biogpt bitnet blenderbot blenderbot-small bloom blt camembert codegen cohere cohere2 cohere2_moe cohere_compass_text
cpmant ctrl cwm data2vec-text dbrx deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4 diffllama doge dots1 dots3_note
dots3_note_text electra emu3 ernie ernie4_5 ernie4_5_moe exaone4 exaone_moe falcon falcon_h1 falcon_mamba flex_olmo
flint fuyu gemma gemma2 gemma3 gemma3_text gemma3n gemma3n_text gemma4 gemma4_assistant gemma4_text gemma4_unified
gemma4_unified_assistant gemma4_unified_text git glm glm4 glm4_moe glm4_moe_lite glm_moe_dsa got_ocr2 gpt-sw3 gpt2
gpt_bigcode gpt_neo gpt_neox gpt_neox_japanese gpt_oss gptj granite granite_swa granitemoe granitemoe_swa
granitemoehybrid granitemoeshared helium hrm_text hunyuan_v1_dense hunyuan_v1_moe hy_v3 hy_v4 hyperclovax
inkling2_text inkling_text internlm3 iquestcoder jais2 jamba jetmoe kimi_linear kolibri1 laguna lfm2 lfm2_moe lfm3
llama llama4 llama4_text longcat_flash mamba mamba2 marian mbart megatron-bert mellum mimo_v2_flash minicpm3 minimax
minimax_m2 minimax_m3_vl_text ministral ministral3 mistral mixtral mllama modernbert-decoder moshi
moss_transcribe_diarize mpt musicgen musicgen_melody mvp nanochat nemotron nemotron_h olmo olmo2 olmo3 olmo_hybrid
olmoe openai-gpt opt pegasus persimmon phi phi3 phi4_multimodal phimoe plbart prophetnet qwen2 qwen2_moe qwen3 qwen3_5
qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next qwen4_exp qwen4_exp_text recurrent_gemma reformer
rembert roberta roberta-prelayernorm roc_bert roformer rwkv seed_oss smollm3 solar_open stablelm starcoder2 trocr
vaultgemma whisper xglm xlm xlm-roberta xlm-roberta-xl xlnet xlstm xmod youtu zamba zamba2 zaya
""".split()  # noqa: SIM905
)


def check_base_config(config: Mapping[str, Any], where: str) -> None:
    """Returns for a base model that can be trained. Raises EnvironmentProblem naming what it is and what works instead.

    `config` is the parsed config.json, `where` its file or hub id. Not covered: whether the installed transformers
    can build the architecture, and whether it fits; a model type that is unknown here passes if it brings no code.
    """
    _check_quantization(config, where)
    _check_senses(config, where)
    _check_task(config, where)
    _check_code(config, where)
    _check_hidden_instructions(config, where)


def _check_quantization(config: Mapping[str, Any], where: str) -> None:
    method = _quantization_method(config)
    if method in (None, "bitsandbytes"):
        return
    raise EnvironmentProblem(
        f"the model is quantized with {method}; only bitsandbytes (nf4, fp4, int8) can be trained on",
        where=where,
        remedy="take the unquantized (bf16) original or copy and set `model.quantization: nf4`",
    )


def _quantization_method(config: Mapping[str, Any]) -> str | None:
    settings = config.get("quantization_config") or config.get("compression_config")
    if settings is None and isinstance(config.get("text_config"), Mapping):
        settings = config["text_config"].get("quantization_config")
    if not settings:
        return None
    if not isinstance(settings, Mapping):
        return "an unknown method"
    method = settings.get("quant_method")
    if method is None and (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
        return "bitsandbytes"
    return str(method or "an unknown method").lower().removeprefix("quantizationmethod.")


def stored_quantization(config: Mapping[str, Any]) -> str | None:
    """nf4, fp4 or int8 where the base's files are stored so by bitsandbytes; None for whole weights."""
    settings = config.get("quantization_config")
    if not settings or _quantization_method(config) != "bitsandbytes":
        return None
    if settings.get("load_in_8bit"):
        return "int8"
    return str(settings.get("bnb_4bit_quant_type", "fp4"))


def _check_senses(config: Mapping[str, Any], where: str) -> None:
    for key, sense in _SENSES.items():
        if config.get(key):
            raise EnvironmentProblem(
                f"{_name(config)} is a {sense} model (its config.json has `{key}`); only text models can be trained",
                where=where,
                remedy="take a text-only model of the family, whose architecture ends in ForCausalLM",
            )


def _check_task(config: Mapping[str, Any], where: str) -> None:
    architectures = _architectures(config)
    if config.get("is_encoder_decoder"):
        task = "an encoder-decoder"
    elif architectures and all(name.endswith(_OTHER_TASKS) for name in architectures):
        task = "an encoder or another task's model"
    else:
        return
    raise EnvironmentProblem(
        f"{_name(config)} is {task}, not a causal language model",
        where=where,
        remedy="take a model whose architecture ends in ForCausalLM, such as Qwen/Qwen2.5-0.5B-Instruct",
    )


def _check_code(config: Mapping[str, Any], where: str) -> None:
    model_type = config.get("model_type")
    if not isinstance(model_type, str) and not _architectures(config):
        raise EnvironmentProblem(
            "config.json names neither `model_type` nor `architectures`; this is no transformers model",
            where=where,
            remedy="take a model in the Hugging Face transformers layout",
        )
    if config.get("auto_map") and str(model_type) not in KNOWN_MODEL_TYPES:
        raise EnvironmentProblem(
            f"{_name(config)} runs Python code of its own (`auto_map` in config.json), which charkha never does",
            where=where,
            remedy="take a model that transformers supports itself; many authors publish one whose name ends in -hf",
        )


def _check_hidden_instructions(config: Mapping[str, Any], where: str, path: str = "") -> None:
    """Keys by which a model's own file would choose code to run, at any depth.

    transformers takes attention and expert kernels from such keys, and a name with a slash is fetched from a hub and
    run although remote code is off (CVE-2026-4372, CVE-2026-5241).
    """
    for key, value in config.items():
        if isinstance(value, Mapping):
            _check_hidden_instructions(value, where, f"{path}{key}.")
        chooses_kernel = key.strip("_").startswith(("attn_implementation", "experts_implementation"))
        if (chooses_kernel and isinstance(value, str) and value not in _KERNELS) or (key in _CODE_KEYS and value):
            raise EnvironmentProblem(
                f"config.json asks for code of its own: `{path}{key}: {value}`, which charkha never runs",
                where=where,
                remedy="take the model from a source you trust, or remove the key after looking at it",
            )


def _architectures(config: Mapping[str, Any]) -> list[str]:
    names = config.get("architectures")
    return [str(name) for name in names] if isinstance(names, list) else []


def _name(config: Mapping[str, Any]) -> str:
    """What the model calls itself: its first architecture, else its type."""
    return next(iter(_architectures(config)), str(config.get("model_type")))
