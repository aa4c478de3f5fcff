"""Says how far the making of a slab is, shows that the run gets on meanwhile, and stops between two layers when asked.

Making the slab of a large base takes as long as hundreds of training steps: half an hour for a 70B on a CPU.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from charkha.backends.base import Recorder, Steering
from charkha.units import format_seconds

logger = logging.getLogger(__name__)
_FIRST_S, _EVERY_S = 5.0, 30.0  # a base that is made sooner is not spoken of
_BEAT_S = 10.0


class SlabProgress:
    """What `ensure_slab` tells of a layer that was made, and while it waits for another process that makes them."""

    def __init__(
        self, say: Callable[[str], object] = logger.warning, steering: Steering | None = None, first_s: float = _FIRST_S
    ) -> None:
        """`first_s` are the seconds before anything is said."""
        self._say = say
        self._steering = steering
        self._began = self._beaten = time.monotonic()
        self._due = self._began + first_s
        self._made = 0

    @classmethod
    def of_run(cls, record: Recorder, steering: Steering | None) -> SlabProgress:
        """Told as notes of the run."""
        return cls(lambda text: record("note", text=text), steering)

    def layer(self, done: int, total: int) -> None:
        """`done` of `total` layers are on the disk. Raises KeyboardInterrupt where a stop was ordered."""
        now, self._made = time.monotonic(), self._made + 1
        if now >= self._due and done < total:
            self._due = now + _EVERY_S
            left = format_seconds((now - self._began) / self._made * (total - done))
            self._say(f"making the streamed base, once for all runs: {done} of {total} layers, about {left} to go")
        self._get_on()

    def waiting(self) -> None:
        """Another process makes this base. Raises KeyboardInterrupt where a stop was ordered."""
        now = time.monotonic()
        if now >= self._due:
            self._due = now + _EVERY_S
            waited = format_seconds(now - self._began)
            self._say(f"waiting for another process that makes this streamed base ({waited} so far)")
        if now >= self._beaten + _BEAT_S:
            self._beaten = now
            self._get_on()

    def _get_on(self) -> None:
        if self._steering is None:
            return
        self._steering.beat()
        if self._steering.order(0.0).stop:
            raise KeyboardInterrupt  # as a second Ctrl-C: nothing of this run is lost, and finished layers are kept
