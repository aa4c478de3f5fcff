"""Small models trained for two steps by the real trainer, and the same runs traced: for tests and benchmarks."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from charkha.backends.base import AdapterSpec, BaseModelSpec, Order, StepPlan, TraceRequest
from charkha.data.shards import Shard
from charkha.store.checkpoints import CheckpointStore

SHAPES: dict[str, dict[str, int]] = {
    "1M": {
        "hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 2048,
    },
    "16M": {
        "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 6,
        "num_key_value_heads": 2, "vocab_size": 8000,
    },
    "55M": {
        "hidden_size": 640, "intermediate_size": 1728, "num_hidden_layers": 8, "num_attention_heads": 10,
        "num_key_value_heads": 2, "vocab_size": 16000,
    },
}  # fmt: skip


@dataclass(frozen=True)
class PlannedRun:
    """A base model of random weights and how it is trained; `lengths` are the rows of one micro batch."""

    shape: str = "1M"
    kind: str = "llama"
    lengths: tuple[int, ...] = (96, 96)
    method: str = "lora"
    quantization: str = "none"
    dtype: str = "bf16"
    checkpointing: str = "none"
    accumulation: int = 1
    loss_head: str = "full"
    optimizer: str = "adamw_torch_fused"
    attention: str = "sdpa"
    lora_dropout: float = 0.0
    settings: dict[str, Any] = field(default_factory=dict)  # of the model's config

    @property
    def adapter(self) -> AdapterSpec:
        return AdapterSpec(self.method, 8, 16, self.lora_dropout, "all-linear", num_virtual_tokens=8)

    def base(self, folder: Path) -> Path:
        """The model's folder inside `folder`, made once."""
        from transformers import AutoConfig, AutoModelForCausalLM

        name = "-".join([self.kind, self.shape, *(f"{key}={value}" for key, value in self.settings.items())])
        path = folder / "".join(char if char.isalnum() or char in "-=" else "_" for char in name)
        if not path.exists():
            common = {"max_position_embeddings": 1024, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
            config = AutoConfig.for_model(self.kind, **{**SHAPES[self.shape], **common, **self.settings})
            AutoModelForCausalLM.from_config(config).float().save_pretrained(path)
        return path

    def request(self, base: Path, **changes: Any) -> TraceRequest:
        request = TraceRequest(
            json.loads((base / "config.json").read_text(encoding="utf-8")),
            self.adapter,
            micro_batch_size=len(self.lengths),
            sequence_length=max(self.lengths),
            dtype=self.dtype,
            attention=self.attention,
            quantization=self.quantization,
            row_lengths=self.lengths,
            accumulation_steps=self.accumulation,
            gradient_checkpointing=self.checkpointing,
            loss_head=self.loss_head,
            optimizer=self.optimizer,
            device="cpu",
        )
        return dataclasses.replace(request, **changes)

    def measured_bytes(self, base: Path, work: Path, device: str = "cpu") -> int:
        """Peak bytes of two steps of the real trainer, by the device's own allocator."""
        outcome = self.trained(base, work, device, held_out=())
        assert outcome.peak_memory_bytes is not None
        return outcome.peak_memory_bytes

    def measured_held_out_bytes(self, base: Path, work: Path, lengths: tuple[int, ...]) -> int:
        """Peak bytes on a CPU while the real trainer takes the held-out loss of such rows after its second step."""
        from charkha.backends.torch import keeper, trainer
        from charkha.backends.torch.memory import CpuPeak

        built: list[Any] = []
        peaks: list[int | None] = []
        build, held_out_loss = trainer.build, keeper.held_out_loss

        def kept(*given: Any, **named: Any) -> Any:
            built.append(build(*given, **named))
            return built[0]

        def measured(model: Any, *given: Any, **named: Any) -> Any:
            with CpuPeak(model, built[0].trainer.optimizer) as peak:
                result = held_out_loss(model, *given, **named)
            peaks.append(peak.peak_bytes)
            return result

        with mock.patch.object(trainer, "build", kept), mock.patch.object(keeper, "held_out_loss", measured):
            self.trained(base, work, "cpu", held_out=lengths)
        assert len(peaks) == 2  # before the first step, and after the last
        assert peaks[1] is not None
        return peaks[1]

    def trained(self, base: Path, work: Path, device: str, *, held_out: tuple[int, ...]) -> Any:
        """What the real trainer says of two steps, with the held-out loss of such rows before and after."""
        from charkha.backends.torch import trainer

        vocabulary = json.loads((base / "config.json").read_text(encoding="utf-8"))["vocab_size"]
        return trainer.train(
            BaseModelSpec(base, self.dtype, self.attention, self.quantization, device),
            self.adapter,
            self._plan(),
            train_shard=shard_of(self.lengths * self.accumulation, vocabulary),
            eval_shard=shard_of(held_out, vocabulary) if held_out else None,
            fingerprint="x",
            pad_id=0,
            store=CheckpointStore(work),
            resume_from=None,
            steering=_LeftAlone(),
            record=lambda name, **fields: None,
            final_folder=work / "final",
        )

    def _plan(self) -> StepPlan:
        return StepPlan(
            total_steps=2,
            steps_per_epoch=1,
            warmup_steps=0,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=1.0,
            batch_size=len(self.lengths) * self.accumulation,
            micro_batch_size=len(self.lengths),
            gradient_checkpointing=self.checkpointing != "none",
            selective=self.checkpointing == "selective",
            loss_head=self.loss_head,
            optimizer=self.optimizer,
            seed=1,
            eval_steps=None,
            checkpoint_seconds=None,
            checkpoint_steps=None,
            checkpoints_kept=1,
            trainer={},
        )


class _LeftAlone:
    """Steering that orders nothing."""

    def order(self, step_seconds: float) -> Order:
        return Order()

    def beat(self) -> None:
        return


def shard_of(lengths: tuple[int, ...], vocabulary: int) -> Shard:
    """Rows of random tokens, all of them trained."""
    offsets = np.cumsum([0, *lengths])
    ids = np.random.default_rng(0).integers(0, vocabulary, offsets[-1]).astype(np.int32)
    lines = np.zeros(len(lengths), np.int32)
    return Shard(Path("x-0123456789abcdef.safetensors"), ids, np.ones(offsets[-1], bool), offsets, lines)
