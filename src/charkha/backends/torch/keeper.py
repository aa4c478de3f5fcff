"""What happens at each step boundary: the step recorded, evaluation, saving, standing still, stopping.

On several processes the first one records, saves and is given orders; the others do as it says, and wait for it before
they compute again.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from transformers import TrainerCallback

from charkha.backends.base import HeldOutLoss, Order, Recorder, Steering, StepPlan
from charkha.backends.torch.batches import MicroBatchPlan
from charkha.backends.torch.held_out import held_out_loss
from charkha.backends.torch.memory import device_memory_bytes
from charkha.backends.torch.ranks import Ranks
from charkha.backends.torch.saving import Saver
from charkha.backends.torch.state import random_state, random_state_files
from charkha.data.shards import Shard
from charkha.store.checkpoints import CheckpointStore

_PAUSE_LOOK_S = 0.2  # between looks at the orders while the run stands still


class Keeper(TrainerCallback):  # type: ignore[misc]  # transformers ships no types
    """At each step boundary: records the step, evaluates, saves and stops, in this order, when they are due."""

    def __init__(
        self,
        trainer: Any,
        plan: StepPlan,
        micro_batches: MicroBatchPlan,
        train_shard: Shard,
        eval_shard: Shard | None,
        pad_id: int,
        store: CheckpointStore,
        steering: Steering,
        record: Recorder,
        ranks: Ranks,
    ) -> None:
        self._trainer = trainer
        self._plan = plan
        self._micro_batches = micro_batches
        self._lengths = train_shard.lengths
        self._eval_shard = eval_shard
        self._pad_id = pad_id
        self._steering = steering
        self._record = record
        self._ranks = ranks
        self._learning_rate = plan.learning_rate
        self._step_began = time.monotonic()
        self._saver = Saver(trainer, plan, store, record, steering)
        self._step_seconds = 0.0
        self.tokens = 0
        self.step_seconds_total = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self._evaluate(0)
        if self._ranks.is_first:
            self._saver.begin()
        self._step_began = time.monotonic()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._learning_rate = float(self._trainer.optimizer.param_groups[0]["lr"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = state.global_step
        if self._ranks.is_first:
            self._record_step(step)
            self._saver.collect()
        last = step >= self._plan.total_steps
        evaluated = None
        if last or (self._plan.eval_steps is not None and step % self._plan.eval_steps == 0):
            evaluated = self._evaluate(step)
        order, saving = self._agreed_order(step, last)
        if saving:
            self._save(step, evaluated, wait=last or order.stop or order.pause)
        if not last:
            order = self._stand_still(order)
        if order.stop:
            control.should_training_stop = True
        self._step_began = time.monotonic()

    def _agreed_order(self, step: int, last: bool) -> tuple[Order, bool]:
        """The order of now, and whether this step is saved."""
        order, saving = Order(), False
        if self._ranks.is_first:
            order = self._steering.order(self._step_seconds)
            saving = last or order.stop or order.pause or order.save or self._saver.due(step)
        agreed = self._ranks.agree({"order": dataclasses.asdict(order), "saving": saving})
        return Order(**agreed["order"]), agreed["saving"]

    def _save(self, step: int, evaluated: HeldOutLoss | None, *, wait: bool) -> None:
        """One process writes; each has random numbers of its own."""
        states = list(zip(*(self._ranks.gather(part) for part in random_state()), strict=True))
        if self._ranks.is_first:
            files = [file for rank, state in enumerate(states) for file in random_state_files(rank, *state)]
            self._saver.save(step, files, eval_loss=evaluated.loss if evaluated else None, wait=wait)

    def _stand_still(self, order: Order) -> Order:
        """Waits as long as the order says so; returns the one to go on with. All that is worth saving is saved."""
        step, paused = self._trainer.state.global_step, order.pause and not order.stop
        if not self._ranks.is_first:
            return Order(**self._ranks.agree(None)) if paused else order
        if paused:
            self._record("status", status="waiting", reason=order.reason, step=step)
        while order.pause and not order.stop:
            time.sleep(_PAUSE_LOOK_S)
            self._steering.beat()
            order = self._steering.order(0.0)
        if paused:
            self._ranks.agree(dataclasses.asdict(order))
        if paused and not order.stop:
            self._record("status", status="running", step=step)
        if order.idle_seconds > 0 and not order.stop:
            time.sleep(order.idle_seconds)
        return order

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._steering.beat()

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._steering.beat()

    def _record_step(self, step: int) -> None:
        seconds = self._step_seconds = time.monotonic() - self._step_began
        tokens = self._tokens_of(step - 1)
        self.tokens += tokens
        self.step_seconds_total += seconds
        self._record(
            "step",
            step=step,
            total_steps=self._plan.total_steps,
            loss=self._trainer.last_loss,
            learning_rate=self._learning_rate,
            grad_norm=self._trainer.grad_norm,
            tokens=tokens,
            seconds=round(seconds, 4),
            tokens_per_second=round(tokens / max(seconds, 1e-9), 1),
            memory_bytes=device_memory_bytes(),
        )

    def _tokens_of(self, step: int) -> int:
        """Tokens of real rows in the step, those of the other processes included, without padding."""
        count = self._micro_batches.micro_batches_per_step
        return sum(
            int(self._lengths[self._micro_batches.rows_of(step * count + place)].sum()) for place in range(count)
        )

    def _evaluate(self, step: int) -> HeldOutLoss | None:
        if self._eval_shard is None:
            return None
        result = held_out_loss(
            self._trainer.model,
            self._eval_shard,
            self._pad_id,
            self._steering.beat,
            self._ranks,
            way=self._trainer.loss_way,
        )
        self._record(
            "eval", step=step, eval_loss=result.loss, eval_tokens=result.tokens, seconds=round(result.seconds, 3)
        )
        return result

    def close(self) -> None:
        """Finishes a checkpoint that is being written."""
        self._saver.close()
