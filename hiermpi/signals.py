"""Requests to stop early come from signals on any rank, and from the STOP file and the time limit on the root.

Signals that come while the program is still being loaded are remembered; without this they would end it.
"""

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

FILE_CHECK_SECONDS = 0.5
STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)

received: list[int] = []
"""The numbers of the signals that came since :func:`listen` was called."""


def listen() -> None:
    """Remember the signals that ask a training run to stop, until :class:`StopRequests` takes over."""
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, remember)


def remember(number: int, frame: FrameType | None) -> None:
    """Handle a signal by keeping its number."""
    received.append(number)


class StopRequests:
    """A collector of this rank's reasons to stop; the ranks agree on them in the messages of each step.

    The constructor installs handlers for the signals that ask for a stop; the end of its context restores the old ones.

    Args:
        stop_file_exists: The function that looks for the STOP file, called at most every half second on the root.
        seconds: The time limit from now in seconds.
    """

    def __init__(
        self, stop_file_exists: Callable[[], bool] = lambda: False, seconds: float = float("inf")
    ) -> None:
        self.reason = signal.Signals(received[0]).name if received else ""
        received.clear()
        self._stop_file_exists = stop_file_exists
        self._deadline = time.monotonic() + seconds
        self._next_check = 0.0
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():  # Python allows signal handlers in no other
            self._before = {number: signal.signal(number, self._on_signal) for number in STOP_SIGNALS}

    def __enter__(self) -> "StopRequests":
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._before = {}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.reason:
            raise KeyboardInterrupt  # the second Ctrl-C ends the process at once
        self.reason = signal.Signals(number).name

    def requested(self) -> bool:
        """Return whether this rank knows of a reason to stop."""
        now = time.monotonic()
        if not self.reason and now > self._deadline:
            self.reason = "run.time_limit"
        if not self.reason and now > self._next_check:
            self._next_check = now + FILE_CHECK_SECONDS
            if self._stop_file_exists():
                self.reason = "the STOP file"
        return bool(self.reason)


class NeverStop(StopRequests):
    """A replacement that never asks for a stop and handles no signal, for work without a run such as an evaluation."""

    def __init__(self) -> None:
        self.reason = ""
        self._before = {}

    def requested(self) -> bool:
        return False
