"""Orders for a run from wherever they come: signals, the control file in its folder, the guard."""

from __future__ import annotations

from collections.abc import Callable

from charkha.backends.base import Order
from charkha.store.control import Control
from charkha.training.signals import StopFlag

NO_ORDER = Order()


class RunSteering:
    """Merges the orders: a stop goes before a pause, a pause before anything else; what saves is not forgotten."""

    def __init__(
        self, flag: StopFlag, control: Control, guard: Callable[[float], Order] = lambda step_seconds: NO_ORDER
    ) -> None:
        self.flag = flag
        self.control = control
        self._guard = guard
        self.stop_reason: str | None = None  # of the stop that was ordered

    def order(self, step_seconds: float) -> Order:
        """The order of now."""
        order = self._merged(step_seconds)
        if order.stop:
            self.stop_reason = order.reason
        return order

    def _merged(self, step_seconds: float) -> Order:
        if self.flag.is_set():
            return Order(stop=True, reason=self.flag.reason)
        guarded = self._guard(step_seconds)
        wish = self.control.wish()
        if wish == "stop":
            return Order(stop=True, reason="`charkha stop`")
        if wish == "pause" and not guarded.stop:
            return Order(pause=True, reason="`charkha pause`; `charkha resume` goes on")
        return guarded

    def beat(self) -> None:
        """Shows that the run gets on."""
        self.control.beat()
