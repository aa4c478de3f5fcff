"""The live line of a run: step, loss, tokens/s, memory, time left; and notes as they come."""

from __future__ import annotations

import sys
import time
from typing import Any

from charkha.cli.terminal import note
from charkha.units import format_bytes, format_count, format_seconds

_PLAIN_SECONDS = 5.0  # between lines where the output is a file


class LiveLine:
    """Draws events on stderr: one line rewritten in place on a terminal, a line every few seconds elsewhere."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._open = False
        self._printed_at = 0.0
        self._rate: float | None = None
        self._seconds_per_step: float | None = None

    def __call__(self, event: dict[str, Any]) -> None:
        """Takes one event; see events.py."""
        draw = getattr(self, f"_on_{event['event']}", None)
        if draw is not None:
            draw(event)

    def close(self) -> None:
        """Leaves the cursor on a fresh line."""
        if self._open:
            sys.stderr.write("\n")
            self._open = False

    def _on_step(self, event: dict[str, Any]) -> None:
        self._rate = _smoothed(self._rate, event["tokens_per_second"])
        self._seconds_per_step = _smoothed(self._seconds_per_step, event["seconds"])
        left = (event["total_steps"] - event["step"]) * self._seconds_per_step
        text = (
            f"step {event['step']}/{event['total_steps']}  loss {event['loss']:.4f}  "
            f"{format_count(round(self._rate))} tokens/s  memory {format_bytes(event['memory_bytes'])}  "
            f"left {format_seconds(left)}"
        )
        if self._terminal:
            sys.stderr.write(f"\r\x1b[2K{text}")
            sys.stderr.flush()
            self._open = True
        elif event["step"] in (1, event["total_steps"]) or time.monotonic() - self._printed_at > _PLAIN_SECONDS:
            note(text)
            self._printed_at = time.monotonic()

    def _on_eval(self, event: dict[str, Any]) -> None:
        self._line(f"held-out loss at step {event['step']}: {event['eval_loss']:.4f} ({event['eval_tokens']} tokens)")

    def _on_checkpoint(self, event: dict[str, Any]) -> None:
        self._line(f"saved step {event['step']} ({format_bytes(event['bytes'])}, {format_seconds(event['seconds'])})")

    def _on_guard(self, event: dict[str, Any]) -> None:
        self._line(f"guard: {event['action']}" + (f" ({'; '.join(event['reasons'])})" if event["reasons"] else ""))

    def _on_status(self, event: dict[str, Any]) -> None:
        if event["status"] == "waiting":
            self._line(f"waiting at step {event['step']}: {event['reason']}")

    def _on_note(self, event: dict[str, Any]) -> None:
        self._line(event["text"])

    def _line(self, text: str) -> None:
        if self._terminal and self._open:
            sys.stderr.write("\r\x1b[2K")
            self._open = False
        note(text)


def _smoothed(before: float | None, now: float) -> float:
    """A moving mean over about ten steps."""
    return now if before is None else 0.9 * before + 0.1 * now
