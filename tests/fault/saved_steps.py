"""What the checkpoints of these tests hold: three files of known bytes for every step."""

from __future__ import annotations

import random
from functools import cache

from charkha.store.checkpoints import Checkpoint, CheckpointStore, NewFile

SIZES = {"weights.safetensors": 9000, "optimizer.safetensors": 5000, "inner/state.json": 700}


@cache
def bytes_of(step: int) -> dict[str, bytes]:
    """Name -> bytes; no two files and no two steps have the same."""
    return {name: random.Random(f"{step} {name}").randbytes(size) for name, size in SIZES.items()}


def commit(store: CheckpointStore, step: int, eval_loss: float | None = None) -> Checkpoint:
    """Saves the step, every file in two parts."""
    files = [
        NewFile(name, len(data), lambda data=data: [data[: len(data) // 2], data[len(data) // 2 :]])
        for name, data in bytes_of(step).items()
    ]
    return store.save(step, files, eval_loss=eval_loss)


def is_as_saved(checkpoint: Checkpoint) -> bool:
    """Whether the files hold, byte for byte, what was saved for the step that the checkpoint says it is."""
    saved = bytes_of(checkpoint.step)
    return set(checkpoint.files) == set(saved) and all(
        (checkpoint.path / name).read_bytes() == data for name, data in saved.items()
    )


def left_over(store: CheckpointStore) -> list[str]:
    """Names of what a save, a removal or a reservation left lying about."""
    run = store.folder.parent
    found = [*store.staging.rglob("*"), *store.folder.glob(".*"), *run.glob(".room*")]
    return sorted(str(path.relative_to(run)) for path in found)
