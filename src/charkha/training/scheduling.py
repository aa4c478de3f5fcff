"""The micro batches of an opened run, by shape."""

from __future__ import annotations

from charkha.plan.schedule import Schedule, schedule_of
from charkha.training.opening import Session


def run_schedule(session: Session) -> Schedule:
    """Every micro batch from the first step to the last."""
    plan = session.plan
    return schedule_of(
        session.data.train.lengths,
        batch_size=plan.batch_size,
        micro_batch_size=plan.micro_batch_size,
        total_steps=plan.total_steps,
        seed=plan.seed,
        fingerprint=session.data.fingerprint,
        packed_row_tokens=None if plan.packing is None else plan.packing.row_tokens,
    )
