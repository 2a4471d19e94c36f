"""SIGINT, SIGTERM and SIGHUP end a run: at once while it starts, after the step at hand later.

Imports nothing heavy: the command line listens before it imports torch.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
TOGETHER = 1.0  # seconds in which a launcher may pass on a signal that all processes already got


class Interrupted(KeyboardInterrupt):
    """A signal came while the run was starting."""


class Interruption:
    """Whether a signal asked for the end, and which."""

    def __init__(self) -> None:
        self.number: int | None = None  # of the first signal
        self.deferred = False  # only note the signal, for the loop to read; else raise Interrupted
        self.before: dict[int, Any] = {}  # what handles a second signal
        self.since = 0.0

    @property
    def name(self) -> str:
        """Name of the signal."""
        return "" if self.number is None else signal.Signals(self.number).name

    def check(self) -> None:
        """Raises `Interrupted` where a signal came, also one whose exception got lost.

        Python drops what a signal handler raises within a destructor or an import's callback.
        """
        if self.number is not None:
            raise Interrupted

    def ask(self, number: int, _frame: FrameType | None) -> None:
        """The signal handler. The same signal again ends at once, as does any a second later."""
        if self.number is not None:
            if time.monotonic() - self.since > TOGETHER:
                signal.signal(number, self.before[number])
                os.kill(os.getpid(), number)
            return
        self.number, self.since = number, time.monotonic()
        if "WORLD_SIZE" not in os.environ:  # no launcher: nobody passes the same signal on
            signal.signal(number, self.before[number])
        if not self.deferred:
            raise Interrupted


_current: Interruption | None = None


@contextmanager
def listening(then: Any = None) -> Iterator[Interruption]:
    """Within, signals ask for an end; what handled them before does so again afterwards.

    Within another `listening` this is that one. A SIGHUP that is ignored, as under nohup, stays
    so. Python hands signals to the main thread alone; in another one nothing is listened to.

    Args:
        then: what a second signal does, such as signal.SIG_DFL; None: what the first would have
            done without this.
    """
    global _current
    if threading.current_thread() is not threading.main_thread():
        yield Interruption()
        return
    if _current is not None:
        yield _current
        return
    _current = asked = Interruption()
    before = {}
    try:
        for number in ENDING:
            handler = signal.getsignal(number)
            if number == signal.SIGHUP and handler == signal.SIG_IGN:
                continue
            before[number] = signal.SIG_DFL if handler is None else handler
            asked.before[number] = before[number] if then is None else then
            signal.signal(number, asked.ask)
        yield asked
    finally:
        _current = None
        for number, handler in before.items():
            signal.signal(number, handler)
