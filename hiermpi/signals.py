"""Requests to stop early: signals on any rank; the STOP file and the time limit on the root.

Signals that come while the program is still being loaded are remembered, where they would otherwise kill.
"""

import signal
import time
from collections.abc import Callable
from types import FrameType

FILE_CHECK_SECONDS = 0.5
STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)

received: list[int] = []
"""Numbers of the signals that came since :func:`listen`."""


def listen() -> None:
    """Remember the signals that ask a training run to stop, until :class:`StopRequests` takes over."""
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, remember)


def remember(number: int, frame: FrameType | None) -> None:
    """Handle a signal by keeping its number."""
    received.append(number)


class StopRequests:
    """Collects this rank's reasons to stop; the ranks agree on them in the step's own exchange.

    Args:
        stop_file_exists: asked at most every half second (root only).
        seconds: time limit from now.
    """

    def __init__(
        self, stop_file_exists: Callable[[], bool] = lambda: False, seconds: float = float("inf")
    ) -> None:
        self.reason = signal.Signals(received[0]).name if received else ""
        received.clear()
        self._stop_file_exists = stop_file_exists
        self._deadline = time.monotonic() + seconds
        self._next_check = 0.0
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.reason:
            raise KeyboardInterrupt  # the second Ctrl-C means now
        self.reason = signal.Signals(number).name

    def requested(self) -> bool:
        """Whether this rank knows of a reason to stop."""
        now = time.monotonic()
        if not self.reason and now > self._deadline:
            self.reason = "run.time_limit"
        if not self.reason and now > self._next_check:
            self._next_check = now + FILE_CHECK_SECONDS
            if self._stop_file_exists():
                self.reason = "the STOP file"
        return bool(self.reason)

    def release(self) -> None:
        """Give the signals back to their defaults, all but the one that a scheduler may still send."""
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_DFL if number != signal.SIGUSR1 else signal.SIG_IGN)
