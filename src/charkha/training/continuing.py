"""What must be the same for a run to go on, what may differ when told so, and the checkpoint from which it goes on."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

from charkha.backends.torch.tensor_files import base_fingerprint
from charkha.config_file import load_config
from charkha.errors import RunDamaged, RunOfAnotherConfig
from charkha.hardware.probe import probe_host
from charkha.store.checkpoints import Checkpoint, CheckpointStore
from charkha.training.opening import Observer, Session
from charkha.training.provenance import package_versions

# Changing these does not change which weights come out, so a run may go on with other values.
_FREE_KEYS = ("checkpoint", "guard", "cost", "report_to", "output", "devices.offload", "devices.offload_to")
# Other values of these are another path from here on, but the state that was saved still fits.
_ACCEPTABLE = frozenset(
    {
        "training.epochs", "training.max_steps", "training.learning_rate", "training.lr_scheduler_type",
        "training.warmup_ratio", "training.weight_decay", "training.max_grad_norm", "training.micro_batch_size",
        "training.gradient_checkpointing", "training.loss_head", "training.fused_kernels", "training.eval_every",
        "training.early_stopping", "model.attention", "model.dtype", "model.placement", "model.host_tables",
        "adapter.lora_dropout", "devices.strategy", "devices.processes",
    }
)  # fmt: skip


@dataclass(frozen=True)
class Difference:
    """One thing that is not as it was; `acceptable` when the saved state fits all the same."""

    text: str
    acceptable: bool


def require_same_run(session: Session, *, accept_changes: bool = False) -> list[str]:
    """What differs from the run in the folder and was accepted; empty when nothing does.

    Raises RunOfAnotherConfig naming every key, file, library version and machine part that differs, unless
    `accept_changes` and the saved state fits all of them.
    """
    found = [*_settings(session), *_materials(session), *_surroundings(session)]
    hard = [difference for difference in found if not difference.acceptable]
    if not found or (accept_changes and not hard):
        return [difference.text for difference in found]
    remedy = "put the old values back to go on with that run, or choose another `output`"
    if not hard:
        remedy += "; `--accept-changes` goes on from here with what is listed above"
    raise RunOfAnotherConfig(
        "this folder holds a run under other conditions:\n  " + "\n  ".join(part.text for part in hard or found),
        where=str(session.run.path),
        remedy=remedy,
    )


def accepted_record(manifest: dict[str, Any], accepted: list[str], step: int, session: Session) -> dict[str, Any]:
    """The manifest of a run that goes on under other conditions: what they are now, and what changed at which step."""
    history = [*manifest.get("accepted", []), {"step": step, "time_unix_s": round(time.time()), "changes": accepted}]
    return manifest | surroundings(session) | {"accepted": history}


def surroundings(session: Session) -> dict[str, Any]:
    """Versions and machine, as the manifest records them: bits are the same only under the same."""
    return {
        "versions": package_versions(),
        "host": asdict(probe_host()),
        "device": session.base.device,
        "device_name": session.device_name,
    }


def base_fingerprint_of(session: Session) -> str:
    """The identity of the base model's files, as recorded in manifest.json."""
    return base_fingerprint(session.base.path)


def _settings(session: Session) -> list[Difference]:
    before = load_config(session.run.config_path).config.model_dump(mode="json")
    now = session.resolved.model_dump(mode="json")
    return [
        Difference(f"{name}: {old!r} in the run, {new!r} now", name in _ACCEPTABLE)
        for name, old, new in _differences(before, now)
        if not {name, name.partition(".")[0]} & {*_FREE_KEYS}
    ]


def _materials(session: Session) -> list[Difference]:
    manifest = session.run.read_manifest()
    found = []
    if manifest["data"]["fingerprint"] != session.data.fingerprint:
        found.append(Difference("the training data, tokenizer or template changed", acceptable=False))
    if manifest["base"]["fingerprint"] != base_fingerprint_of(session):
        found.append(Difference("the base model's files changed", acceptable=False))
    return found


def _surroundings(session: Session) -> list[Difference]:
    before, now = session.run.read_manifest(), surroundings(session)
    pairs = [("device", before.get("device"), now["device"]), ("device", before.get("device_name"), now["device_name"])]
    pairs.append(("processor", (before.get("host") or {}).get("processor"), now["host"]["processor"]))
    versions = before.get("versions") or {}
    pairs += [(name, versions.get(name), version) for name, version in now["versions"].items() if name != "charkha"]
    return [Difference(f"{name}: {old} in the run, {new} now", True) for name, old, new in pairs if old != new]


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
    """The checkpoint to go on from, None when none was reached. Raises RunDamaged when there are only damaged ones."""
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
