"""What must be the same for a run to go on, and the checkpoint from which it does."""

from __future__ import annotations

from typing import Any

from charkha.config_file import load_config
from charkha.errors import RunDamaged, RunOfAnotherConfig
from charkha.store.checkpoints import Checkpoint, CheckpointStore
from charkha.training.opening import Observer, Session
from charkha.training.provenance import base_fingerprint

# Changing these does not change which weights come out, so a run may go on with other values.
_FREE_KEYS = ("checkpoint", "guard", "cost", "report_to", "output")


def require_same_run(session: Session) -> None:
    """Raises RunOfAnotherConfig naming every key (or the data) that differs from the run in the folder."""
    run = session.run
    before = load_config(run.config_path).config.model_dump(mode="json")
    now = session.resolved.model_dump(mode="json")
    differences = [
        f"{name}: {old!r} in the run, {new!r} now"
        for name, old, new in _differences(before, now)
        if name.partition(".")[0] not in _FREE_KEYS
    ]
    manifest = run.read_manifest()
    if manifest["data"]["fingerprint"] != session.data.fingerprint:
        differences.append("the training data, tokenizer or template changed")
    if manifest["base"]["fingerprint"] != base_fingerprint_of(session):
        differences.append("the base model's files changed")
    if differences:
        raise RunOfAnotherConfig(
            "this folder holds a run with other settings:\n  " + "\n  ".join(differences),
            where=str(run.path),
            remedy="put the old values back to go on with that run, or choose another `output`",
        )


def base_fingerprint_of(session: Session) -> str:
    """The identity of the base model's files, as recorded in manifest.json."""
    return base_fingerprint(session.base.path)


def _differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    found: list[tuple[str, Any, Any]] = []
    for key in sorted({*before, *now}):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append((prefix + key, old, new))
    return found


def newest_checkpoint(store: CheckpointStore, session: Session, observe: Observer) -> Checkpoint | None:
    checkpoint, skipped = store.newest_verified()
    for bad in skipped:
        observe({"event": "note", "text": f"passed over {bad.path}: {bad.reason}"})
    if checkpoint is None and skipped:
        raise RunDamaged(
            "no checkpoint of this run can be used:\n  "
            + "\n  ".join(f"{bad.path.name}: {bad.reason}" for bad in skipped),
            where=str(session.run.path),
            remedy="copy the checkpoints back from a backup, or move the folder away to begin anew",
        )
    if checkpoint:
        observe({"event": "note", "text": f"goes on from step {checkpoint.step} of {session.plan.total_steps}"})
    else:
        observe({"event": "note", "text": "no checkpoint was reached before; begins at step 0"})
    return checkpoint
