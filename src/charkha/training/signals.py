"""Ctrl-C, SIGTERM and SIGHUP as a wish to stop that the training loop reads at its next step boundary."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopFlag:
    """Set by a signal; read by the loop. `reason` names the first signal."""

    def __init__(self) -> None:
        self._set = False  # a plain flag: a lock could be held by the very thread that a signal interrupts
        self.reason = ""

    def set(self, reason: str) -> None:
        """Asks for a stop at the next step boundary."""
        self.reason = self.reason or reason
        self._set = True

    def is_set(self) -> bool:
        """Whether a stop was asked for."""
        return self._set


@contextmanager
def stop_on_signals(flag: StopFlag) -> Iterator[None]:
    """Sets `flag` on the first signal; a second Ctrl-C raises KeyboardInterrupt at once.

    Only the main thread can take signals; elsewhere nothing is installed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def on_signal(number: int, _frame: FrameType | None) -> None:
        if flag.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        flag.set(signal.Signals(number).name)

    numbers = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
    before = {number: signal.signal(number, on_signal) for number in numbers if not under_nohup(number)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def under_nohup(number: int) -> bool:
    """Whether this is SIGHUP and was ignored when we were started. (Shells ignore SIGINT for every background job.)"""
    return number == getattr(signal, "SIGHUP", None) and signal.getsignal(number) is signal.SIG_IGN


def end_with_parent(parent: int, number: int = signal.SIGTERM) -> None:
    """Has the system send a signal to this process when `parent` dies: no run goes on without its supervisor.

    `parent` is the process id of the one that started this (not always the present one: it may be dead already; and in
    a container its number may be 1). Linux only; elsewhere a worker whose supervisor was killed trains to its end.
    """
    if not sys.platform.startswith("linux"):
        return
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
    ctypes.CDLL(None, use_errno=True).prctl(set_parent_death_signal, number)
    if os.getppid() != parent:
        os.kill(os.getpid(), number)  # it died before the call
