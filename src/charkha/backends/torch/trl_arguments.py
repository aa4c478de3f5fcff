"""What TRL's SFTTrainer is told: one device, finished tokens, and no saving, logging or evaluating of its own."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast
from trl import SFTConfig

from charkha.backends.base import BaseModelSpec, StepPlan
from charkha.errors import ConfigError, ConfigProblem

# Arguments that SFTConfig knows but that would be ignored, or would undo an exact resume; a user must not believe them.
_WITHOUT_EFFECT_BEGIN = (
    "eval_", "save_", "logging_", "hub_", "push_to_hub", "dataset_", "dataloader_", "ddp_", "fsdp", "deepspeed",
    "gradient_checkpointing", "load_best", "metric_for", "include_", "prediction_", "per_device_eval", "per_gpu",
    "restore_", "tpu", "packing_",
)  # fmt: skip
_WITHOUT_EFFECT = frozenset(
    {
        "assistant_only_loss", "auto_find_batch_size", "average_tokens_across_devices", "batch_eval_metrics",
        "bf16_full_eval", "chat_template_path", "completion_only_loss", "do_eval", "do_predict", "do_train",
        "enable_jit_checkpoint", "eos_token", "fp16_full_eval", "greater_is_better", "group_by_length",
        "ignore_data_skip", "label_names", "label_smoothing_factor", "length_column_name", "loss_type", "log_level",
        "model_init_kwargs", "pad_to_multiple_of", "pad_token", "parallelism_config", "project",
        "resume_from_checkpoint", "run_name", "shuffle_dataset", "skip_memory_metrics", "trackio_space_id",
        "truncation_mode", "trust_remote_code", "warmup_ratio",
    }
)  # fmt: skip


class _OneDevice(SFTConfig):  # type: ignore[misc]  # TRL ships no types
    """SFTConfig for one device: with a second GPU in the machine transformers would wrap the model in DataParallel."""

    @property
    def n_gpu(self) -> int:
        return 1


def sft_arguments(base: BaseModelSpec, plan: StepPlan, accumulation: int, staging: Path) -> SFTConfig:
    """Every argument that charkha decides, and those of `plan.trainer`. Raises ConfigError for a wrong one of those."""
    ours: dict[str, Any] = {
        "output_dir": str(staging),
        "max_steps": plan.total_steps,
        "num_train_epochs": 1,  # the dataset is the whole run: one flat list of planned micro batches
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": accumulation,
        "train_sampling_strategy": "sequential",
        "learning_rate": plan.learning_rate,
        "lr_scheduler_type": plan.lr_scheduler_type,
        "warmup_steps": plan.warmup_steps,
        "weight_decay": plan.weight_decay,
        "max_grad_norm": plan.max_grad_norm,
        "optim": plan.optimizer,
        "seed": plan.seed,
        "data_seed": plan.seed,
        "bf16": base.dtype == "bf16",
        "fp16": base.dtype == "fp16",
        "use_cpu": base.device == "cpu",
        "activation_checkpointing": plan.gradient_checkpointing,
        "activation_checkpointing_kwargs": {"use_reentrant": False} if plan.gradient_checkpointing else None,
        "activation_offloading": False,  # devices.offload; TRL's moves more than checkpointing keeps
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "remove_unused_columns": False,
        "packing": False,
        "padding_free": False,
        "max_length": None,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": base.device == "cuda",
        "eval_strategy": "no",
        "save_strategy": "no",
        "logging_strategy": "no",
        "logging_nan_inf_filter": False,
        "report_to": "none",
        "disable_tqdm": True,
        "push_to_hub": False,
    }
    return _OneDevice(**ours, **_checked(plan.trainer, ours))


def _checked(extra: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """`trainer:` of the config, if every key is one of SFTConfig's that takes effect here."""
    known = {field.name for field in dataclasses.fields(SFTConfig) if field.init}
    problems = []
    for key in extra:
        name = f"trainer.{key}"
        if key not in known:
            problems.append(ConfigProblem(name, "is not an argument of TRL's SFTConfig"))
        elif key in ours:
            remedy = "use the key of the training, data or devices section"
            problems.append(ConfigProblem(name, "is set by charkha", remedy=remedy))
        elif key in _WITHOUT_EFFECT or key.startswith(_WITHOUT_EFFECT_BEGIN):
            reason = (
                "would not take effect: charkha itself reads the data, calls the loss, evaluates, records and saves"
            )
            problems.append(ConfigProblem(name, reason, remedy="leave it out"))
    if problems:
        raise ConfigError("trainer", problems)
    return extra


def placeholder_tokenizer() -> PreTrainedTokenizerFast:
    """TRL asks for a tokenizer although every row is finished tokens; this one has nothing in it."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    vocabulary = WordLevel({"<unk>": 0}, unk_token="<unk>")
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(vocabulary), unk_token="<unk>", pad_token="<unk>", eos_token="<unk>"
    )
