"""The record vocabulary: one JSON object a line in events.jsonl, each with `event`, `version` and `time_unix_s`.

    step        step, total_steps, loss, learning_rate, grad_norm, tokens, seconds, tokens_per_second, memory_bytes,
                temperature_c, power_w (of the device that trains; null where they cannot be read)
    eval        step, eval_loss, eval_tokens, seconds
    checkpoint  step, path, bytes, seconds (until it was on the disk), blocked_seconds (in which training stood still)
    resume      from_step, path               readers pass over step and eval events beyond from_step that stand earlier
    status      status: running, waiting, restarting, paused, done, failed; reason; kind (of a failure)
    guard       action: run, pause, stop; save, pace (share of the time to idle), power_limit_w, temperature_c, power_w,
                reasons
    note        text                          a choice or a fact the user should see

Units are in the names. Keys may be added, never renamed.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Iterator
from typing import Any

VERSION = 1
NAMES = frozenset({"step", "eval", "checkpoint", "resume", "status", "guard", "note"})


def make_event(name: str, **fields: Any) -> dict[str, Any]:
    """An event record stamped with the time. Raises ValueError for a name outside the vocabulary."""
    if name not in NAMES:
        raise ValueError(f"{name!r} is not an event; known: {', '.join(sorted(NAMES))}")
    return {"event": name, "version": VERSION, "time_unix_s": round(time.time(), 3), **fields}


def to_line(event: dict[str, Any]) -> str:
    """One line of JSON. A number that is not finite becomes null with its text beside it (JSON has no NaN)."""
    safe: dict[str, Any] = {}
    for key, value in event.items():
        if isinstance(value, float) and not math.isfinite(value):
            safe[key], safe[f"{key}_text"] = None, str(value)
        else:
            safe[key] = value
    return json.dumps(safe, ensure_ascii=False, allow_nan=False)


def from_lines(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Events as written. A last line cut short by a power cut is passed over; a broken line elsewhere, too."""
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and "event" in event:
            yield event


def in_effect(events: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The events of the run as it stands: step and eval events undone by a later resume are left out."""
    kept: list[dict[str, Any]] = []
    for event in events:
        if event["event"] == "resume":
            from_step = event["from_step"]
            kept = [old for old in kept if old["event"] not in ("step", "eval") or old["step"] <= from_step]
        kept.append(event)
    return kept
