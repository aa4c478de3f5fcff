"""The CPU's peak of live tensor bytes over a run's first two steps, measured while they train."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from charkha.backends.torch.memory import CpuPeak

# The optimizer's states exist from the second step on; the first step of an epoch holds the longest row.
_STEPS = 2


class PeakWindow(TrainerCallback):  # type: ignore[misc]  # transformers ships no types
    """Opens at the first step of this call and closes at the end of the second, before anything is evaluated there.

    Must stand before the callback that evaluates. The numbers of the run are the same with and without it.
    """

    def __init__(self) -> None:
        self._window: CpuPeak | None = None
        self._steps = 0

    @property
    def peak_bytes(self) -> int | None:
        """Peak live tensor bytes; None before the window has closed."""
        return None if self._window is None else self._window.peak_bytes

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._window is None:
            self._window = CpuPeak(kwargs["model"], kwargs["optimizer"])
            self._window.__enter__()

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._window is not None:
            self._window.cut()  # the profiler keeps some KiB an operator until then

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._steps += 1
        if self._steps == _STEPS:
            self.close()
        elif self._window is not None:
            self._window.cut()

    def close(self) -> None:
        """Ends the measurement, also of a run of one step or of one that failed."""
        if self._window is not None:
            self._window.close()
