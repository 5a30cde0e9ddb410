"""The progress of long work is a live bar on a terminal and plain lines in a batch log, always on stderr.

``mpirun`` gives its ranks pipes and passes on whole lines only. A rank therefore finds the terminal of its launcher's
stderr through Linux's /proc, and draws on it directly. ``HIERMPI_PROGRESS=bar|lines`` overrides this choice.
"""

import logging
import os
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress

SECONDS_BETWEEN_LINES = 5.0
TERMINALS = ("/dev/pts/", "/dev/tty")

logger = logging.getLogger("hiermpi")


def terminal() -> str:
    """Return the device of the terminal behind stderr, ``-`` for stderr itself, or an empty text for no terminal."""
    wanted = os.environ.get("HIERMPI_PROGRESS", "auto")
    if wanted == "lines":
        return ""
    if sys.stderr.isatty() or wanted == "bar":
        return "-"
    if "OMPI_COMM_WORLD_RANK" not in os.environ and "PMI_RANK" not in os.environ:
        return ""
    try:
        device = os.readlink(f"/proc/{os.getppid()}/fd/2")
    except OSError:
        return ""
    return device if device.startswith(TERMINALS) else ""


def terminal_width(device: str) -> int:
    """Return the number of columns of the terminal ``device``."""
    try:
        with open("/dev/stderr" if device == "-" else device, "rb") as file:
            return os.get_terminal_size(file.fileno()).columns
    except OSError:
        return 100


class ProgressBar:
    """A context that counts work and shows its progress.

    Args:
        what: The work that is being done, for display.
        total: The units of work in all; steps, or bytes.
        done: The units that were done before.
        in_bytes: Whether the units are bytes.
        lines: Whether to log a line at intervals where there is no terminal; False suits callers with their own lines.
    """

    def __init__(
        self, what: str, total: int, done: int = 0, *, in_bytes: bool = False, lines: bool = True
    ) -> None:
        self.what = what
        self.total = total
        self.done = done
        self.in_bytes = in_bytes
        self.lines = lines
        self._bar: Progress | None = None
        self._told = time.monotonic()

    @property
    def live(self) -> bool:
        """Return whether a bar is drawn on a terminal."""
        return self._bar is not None

    def __enter__(self) -> "ProgressBar":
        device = terminal()
        if device:
            self._bar = make_bar(device, self.in_bytes)
        if self._bar is not None:
            self._task = self._bar.add_task(self.what, total=self.total, completed=self.done, note="")
            self._bar.start()
        return self

    def advance(self, units: int, note: str = "") -> None:
        """Count ``units`` more, and show ``note`` behind the bar."""
        self.done += units
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, note=note)
            return
        if self.lines and time.monotonic() - self._told > SECONDS_BETWEEN_LINES:
            self._told = time.monotonic()
            shown = f"{self.done / 1e6:,.0f} of {self.total / 1e6:,.0f} MB" if self.in_bytes else (
                f"{self.done:,} of {self.total:,}"
            )
            logger.info("%s: %s", self.what, shown)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def make_bar(device: str, in_bytes: bool) -> "Progress | None":
    """Make a progress bar with the rich library (extra ``progress``); return None where it is not installed."""
    try:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )
    except ImportError:
        return None
    columns: list[Any] = [
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn() if in_bytes else MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
    ]
    try:
        file = sys.stderr if device == "-" else open(device, "w", encoding="utf-8")  # noqa: SIM115  (until the end)
    except OSError:
        return None
    console = Console(file=file, force_terminal=True, width=terminal_width(device))
    return Progress(*columns, console=console, redirect_stdout=False, redirect_stderr=True, transient=True)
