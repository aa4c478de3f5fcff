"""One run's optimizer steps through TRL's SFTTrainer: our batches, our loss call, our checkpoints, our records.

TRL and transformers are used through public arguments, one callback and this subclass. The subclass calls the
model's own loss (TRL's fused head costs 15-25 % on a CPU and never calls a streamed head), reads and writes state as
safetensors and JSON instead of pickles, and stops before an optimizer step whose gradient is not finite.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import logging
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from safetensors import SafetensorError
from transformers import PrinterCallback, set_seed
from trl import SFTTrainer
from trl.models import enable_selective_activation_checkpointing

from charkha.backends.base import (
    AdapterSpec,
    BaseModelSpec,
    Place,
    Recorder,
    Steering,
    StepPlan,
    TrainOutcome,
)
from charkha.backends.torch import state as saved_state
from charkha.backends.torch.adapters import attach_adapter
from charkha.backends.torch.batches import IGNORED, MicroBatchPlan, plan_micro_batches
from charkha.backends.torch.copy_watch import CopyWatch, where_layers_wait
from charkha.backends.torch.device_errors import device_errors_told
from charkha.backends.torch.keeper import Keeper
from charkha.backends.torch.loss import choose_loss, training_loss
from charkha.backends.torch.memory import peak_device_memory_bytes
from charkha.backends.torch.model import load_base, quantized_modules
from charkha.backends.torch.packing_proof import choose_packed_layout
from charkha.backends.torch.peak_window import PeakWindow
from charkha.backends.torch.ranks import ALONE, Ranks, joined
from charkha.backends.torch.streamed_model import engine_of
from charkha.backends.torch.streamed_tables import weights_on_host
from charkha.backends.torch.trl_arguments import placeholder_tokenizer, sft_arguments
from charkha.data.shards import Shard
from charkha.errors import DoesNotFit, TrainingFailed
from charkha.store.checkpoints import Checkpoint, CheckpointStore

logger = logging.getLogger(__name__)


def train(
    base: BaseModelSpec,
    adapter: AdapterSpec,
    plan: StepPlan,
    *,
    train_shard: Shard,
    eval_shard: Shard | None,
    fingerprint: str,
    pad_id: int,
    store: CheckpointStore,
    resume_from: Checkpoint | None,
    steering: Steering,
    record: Recorder,
    final_folder: Path,
    place: Place | None = None,
) -> TrainOutcome:
    """Trains to the end of `plan`, or to the step boundary at which `steering` orders a stop, and saves.

    `fingerprint` identifies the training data; with plan.seed it decides the order of rows. When the plan is done, the
    trained weights are in `final_folder` (adapter in PEFT layout; for `full` a whole model in Hugging Face layout).
    `place` makes this one of several processes, each called with the same arguments; the first alone records, saves and
    is given orders, and all end at the same step.
    Raises TrainingFailed for a loss or gradient that is not finite; the last checkpoint is then still good. Raises
    PackingLeaks before the first step when the plan packs rows and this model would not keep their documents apart.
    """
    with joined(place or Place(), base.device) as ranks:
        built = build(
            base,
            adapter,
            plan,
            train_shard=train_shard,
            fingerprint=fingerprint,
            pad_id=pad_id,
            staging=store.staging,
            record=record,
            ranks=ranks,
        )
        model, trainer, micro_batches = built.model, built.trainer, built.micro_batches
        keeper = Keeper(trainer, plan, micro_batches, train_shard, eval_shard, pad_id, store, steering, record, ranks)
        window = PeakWindow(micro_batches.largest_step_after_first(plan.total_steps))
        if base.device == "cpu" and ranks.is_first:
            trainer.add_callback(window)
        engine = engine_of(model)
        if engine is not None:
            record("note", text=where_layers_wait(engine))
            trainer.add_callback(CopyWatch(engine, record, base.streaming))
        trainer.add_callback(keeper)
        ranks.take_from_first(parameter for _name, parameter in saved_state.trainable(model))
        _draw_apart(plan.seed, ranks)
        with device_errors_told(), _full_disk_is_told(store.folder), closing(window), closing(keeper):
            trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from.path))
            done = trainer.state.global_step >= plan.total_steps
            if done and ranks.is_first:
                _save_final(model, final_folder)
    parameters = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return TrainOutcome(
        status="done" if done else "paused",
        step=trainer.state.global_step,
        trained_tokens=keeper.tokens,
        seconds=keeper.step_seconds_total,
        peak_memory_bytes=window.peak_bytes if base.device == "cpu" else peak_device_memory_bytes(base.device),
        trainable_parameters=sum(count for count, is_trained in parameters if is_trained),
        total_parameters=_unpacked_parameters(model),
        quantized_modules=quantized_modules(model),
    )


@dataclasses.dataclass(frozen=True)
class Built:
    """A loaded model with its adapter, and what trains it."""

    model: Any
    trainer: Any
    micro_batches: MicroBatchPlan


def build(
    base: BaseModelSpec,
    adapter: AdapterSpec,
    plan: StepPlan,
    *,
    train_shard: Shard,
    fingerprint: str,
    pad_id: int,
    staging: Path,
    record: Recorder,
    ranks: Ranks = ALONE,
    choose: Callable[[MicroBatchPlan], MicroBatchPlan] = lambda whole: whole,
) -> Built:
    """Loads the base, attaches the adapter and makes the trainer of the run's micro batches, or of those chosen of it.

    The trainer takes as many steps as `plan` says, or as there are chosen ones.
    """
    with device_errors_told(loading=True):
        model = load_base(_training_precision(base, adapter))
        # Before the adapter draws its first numbers, and after loading, which draws some for what it takes to be new.
        set_seed(plan.seed)
        if plan.selective:
            # On the model itself: TRL would put it on PEFT's wrapper, which transformers passes by.
            enable_selective_activation_checkpointing(model)
        model = attach_adapter(model, adapter, plan.gradient_checkpointing)
    with device_errors_told():
        one_row = plan.packing is not None and _lay_out_packed_rows(model, base, train_shard, pad_id, record)
    whole = plan_micro_batches(plan, train_shard, fingerprint, one_row=one_row, processes=ranks.count)
    micro_batches = choose(whole)
    if micro_batches is not whole:
        plan = dataclasses.replace(plan, total_steps=micro_batches.steps_per_epoch)
    trainer = _new_trainer(model, base, plan, micro_batches, pad_id, staging, ranks)
    _adapters_in_fp32(model, adapter)
    with device_errors_told():
        trainer.loss_way = choose_loss(model, plan.loss_head)
    trainer.loraplus_ratio = adapter.loraplus_ratio
    return Built(model, trainer, micro_batches)


def _new_trainer(
    model: Any,
    base: BaseModelSpec,
    plan: StepPlan,
    micro_batches: MicroBatchPlan,
    pad_id: int,
    staging: Path,
    ranks: Ranks,
) -> _Trainer:
    """TRL's trainer over this process's micro batches: every `ranks.count`-th one, of each step as many."""
    elements = range(ranks.rank, plan.total_steps * micro_batches.micro_batches_per_step, ranks.count)
    trainer = _Trainer(
        model=model,
        args=sft_arguments(base, plan, micro_batches.micro_batches_per_step // ranks.count, staging),
        train_dataset=datasets.Dataset.from_dict({"element": elements}),
        data_collator=lambda rows: micro_batches.batch_of(rows[0]["element"], pad_id),
        processing_class=placeholder_tokenizer(),
    )
    trainer.ranks = ranks
    trainer.remove_callback(PrinterCallback)  # it prints a dict at the end
    return trainer


def _draw_apart(seed: int, ranks: Ranks) -> None:
    """Has every process drop out other numbers than the first."""
    if ranks.rank:
        digest = hashlib.sha256(f"{seed} {ranks.rank}".encode()).digest()
        set_seed(int.from_bytes(digest[:4], "big"))


class NotFinite(TrainingFailed):
    """A loss or gradient is NaN or infinite."""

    kind = "not_finite"


class _Trainer(SFTTrainer):  # type: ignore[misc]  # TRL ships no types
    """SFTTrainer with the model's own loss, our state files, and a stop before a step that is not finite."""

    loss_is_scaled_for_ga = True  # divided by the tokens of the whole step, whichever loss the model has
    step_loss: torch.Tensor | None = None
    loss_way: str = "own"
    loraplus_ratio: float | None = None
    optimizer: Any
    grad_norm: float = math.nan
    last_loss: float = math.nan
    ranks: Ranks = ALONE

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """The step's micro batches of this process, and the trained tokens of those of all processes."""
        batches, _count = super().get_batch_samples(epoch_iterator, num_batches, device)
        trained = sum((batch["labels"][..., 1:] != IGNORED).sum() for batch in batches).to(device)
        if self.ranks.count > 1:  # waits for the device, as one process need not
            trained = torch.tensor(int(self.ranks.add_up(np.array([int(trained)]))[0]), device=device)
        return batches, trained

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One micro batch forward and backward; after the last one of a step, every process has the whole gradient."""
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:
            self.ranks.add_up_gradients(self.model.parameters())
        return loss

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        loss = training_loss(model, inputs, num_items_in_batch, self.loss_way)
        detached = loss.detach()
        self.step_loss = detached if self.step_loss is None else self.step_loss + detached
        return (loss, None) if return_outputs else loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        engine = engine_of(self.model)
        if engine is not None:
            engine.require_intact()  # the last layer read in this step; of the others it is asked as they are left
        # The one place where the host waits for the device in a step: both numbers are needed before the weights move.
        self.grad_norm = float(norm)
        assert self.step_loss is not None
        self.last_loss = float(self.ranks.add_up(np.array([float(self.step_loss)]))[0])
        self.step_loss = None
        self._require_finite()
        return norm

    def _require_finite(self) -> None:
        scaled = getattr(self.accelerator, "scaler", None) is not None  # fp16: the scaler itself skips such a step
        if math.isfinite(self.last_loss) and (scaled or math.isfinite(self.grad_norm)):
            return
        what = "loss" if not math.isfinite(self.last_loss) else "gradient"
        raise NotFinite(
            f"the {what} of step {self.state.global_step + 1} is not finite "
            f"(loss {self.last_loss:g}, gradient norm {self.grad_norm:g}); the weights were not updated with it",
            remedy="lower training.learning_rate, use dtype bf16 or fp32 instead of fp16, or look at this step's rows",
        )

    def create_optimizer(self, model: Any = None) -> Any:
        """With LoRA+ (https://arxiv.org/abs/2402.12354) the B matrices learn faster; else transformers' groups."""
        if self.optimizer is not None or self.loraplus_ratio is None:
            return super().create_optimizer(model)
        from peft.optimizers import create_loraplus_optimizer

        kind, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        self.optimizer = create_loraplus_optimizer(
            self.model,
            kind,
            loraplus_lr_ratio=self.loraplus_ratio,
            loraplus_weight_decay=self.args.weight_decay,
            **settings,
        )
        return self.optimizer

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # transformers would count parameters again for every micro batch; nobody reads the sum

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        saved_state.load_weights(self.model if model is None else model, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            saved_state.load_optimizer(self.optimizer, self.model, Path(checkpoint))
            saved_state.load_scheduler(self.lr_scheduler, Path(checkpoint))

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            saved_state.load_scaler(self.accelerator.scaler, Path(checkpoint))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None and saved_state.has_random_state(Path(checkpoint), self.ranks.rank):
            saved_state.load_rng(Path(checkpoint), self.ranks.rank)


def _training_precision(base: BaseModelSpec, adapter: AdapterSpec) -> BaseModelSpec:
    """Full fine-tuning keeps fp32 master weights and computes in the asked dtype through autocast."""
    return dataclasses.replace(base, dtype="fp32") if adapter.method == "full" else base


def _lay_out_packed_rows(model: Any, base: BaseModelSpec, shard: Shard, pad_id: int, record: Recorder) -> bool:
    one_row, proof = choose_packed_layout(
        model, shard, pad_id, dtype=base.dtype, quantization=base.quantization, attention=base.attention
    )
    text = (
        f"documents of a packed row do not see each other: logits as of each alone, to {proof.difference:.1e} of the "
        f"largest (rounding is up to {proof.tolerance:g})"
    )
    record("note", text=text)
    return one_row


def _adapters_in_fp32(model: Any, adapter: AdapterSpec) -> None:
    """TRL casts the adapters of a quantized base to bf16, where small updates round away; they stay fp32 here."""
    if adapter.method == "full":
        return
    for _name, parameter in saved_state.trainable(model):
        parameter.data = parameter.data.to(torch.float32)


def _save_final(model: Any, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if saved_state.is_peft(model):
        model.save_pretrained(str(folder), safe_serialization=True)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
    else:
        model.config.use_cache = (
            True  # was off for training only; written into config.json it would slow its users down
        )
        model.save_pretrained(str(folder), safe_serialization=True)


@contextmanager
def _full_disk_is_told(folder: Path) -> Iterator[None]:
    """Turns "no space left" from any writer into one message; every other error goes on as it is."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if getattr(error, "errno", None) != errno.ENOSPC and "No space left" not in str(error):
            raise
        raise DoesNotFit(
            "the disk is full",
            where=str(folder),
            remedy="make room on this disk and run the same command again; it goes on from the last checkpoint",
        ) from error


def _unpacked_parameters(model: Any) -> int:
    """Parameters of a 4-bit model: bitsandbytes stores two in one byte, so `numel` counts half of them."""
    total = 0
    for parameter in model.parameters():
        packed = type(parameter).__name__ == "Params4bit" and parameter.dtype == torch.uint8
        total += parameter.numel() * (2 if packed else 1)
    return total + weights_on_host(model)
