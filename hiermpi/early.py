"""Signals that come while the program is still being loaded: remembered, where they would otherwise kill."""

import signal
from types import FrameType

received: list[int] = []
"""Numbers of the signals that came since :func:`listen`."""


def listen() -> None:
    """Remember the signals that ask a training run to stop; its own handlers take over later."""
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, remember)


def remember(number: int, frame: FrameType | None) -> None:
    """A signal handler."""
    received.append(number)
