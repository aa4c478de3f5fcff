"""The CPU's peak of live tensor bytes over the steps of a run that can hold it, measured while they train."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from charkha.backends.torch.memory import CpuPeak

# The optimizer's states exist from the second step on; the first step of an epoch holds the longest row.
_FIRST_STEPS = 2


class PeakWindow(TrainerCallback):  # type: ignore[misc]  # transformers ships no types
    """Open for the first two steps of this call, and for the step that has the longest row beside optimizer states.

    `later_step` is that one's number from 0, None where there is none. Each step is measured to its end, before
    anything is evaluated there, so this must stand before the callback that evaluates. The numbers of the run are the
    same with and without it.
    """

    def __init__(self, later_step: int | None = None) -> None:
        self._later_step = later_step
        self._window: CpuPeak | None = None
        self._peaks: list[int] = []
        self._steps = 0

    @property
    def peak_bytes(self) -> int | None:
        """Peak live tensor bytes so far; None before the first window has closed."""
        return max(self._peaks, default=None)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        due = self._steps == 0 or state.global_step == self._later_step
        if self._window is None and due:
            self._window = CpuPeak(kwargs["model"], kwargs["optimizer"])
            self._window.__enter__()

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._window is not None:
            self._window.cut()  # the profiler keeps some KiB an operator until then

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._steps += 1
        if self._steps >= _FIRST_STEPS:
            self.close()
        elif self._window is not None:
            self._window.cut()

    def close(self) -> None:
        """Ends a measurement, also of a run of one step or of one that failed."""
        if self._window is not None:
            self._window.close()
            if self._window.peak_bytes is not None:
                self._peaks.append(self._window.peak_bytes)
            self._window = None
