"""This module does all waiting of a rank for another.

A wait polls, then sleeps for at most a millisecond between polls: a waiting rank does not take the core of one that
computes, and Python's signal handlers, stall timers and the like run between two polls. MPI moves data only while a
rank polls, so whenever a request completes, the next ones are polled without sleep again.
"""

import ctypes
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Sequence

from mpi4py import MPI

FIRST_SLEEP = 20e-6
"""The seconds of the first sleep of a wait."""
LONGEST_SLEEP = 1e-3
"""The seconds of the longest sleep between two polls."""
GROWTH = 1.15
"""The growth of the sleep from poll to poll, so that it is about a seventh of the wait so far."""
SPIN_SECONDS = 2e-3
"""The time for which a rank with a core of its own polls before it sleeps."""
OVERSUBSCRIBED_SPIN_SECONDS = 50e-6
"""The time for which a rank polls before it sleeps where ranks share cores; each poll yields the core."""

logger = logging.getLogger("hiermpi")


class StallError(RuntimeError):
    """The error of a rank that has waited longer than ``run.stall_abort``: another rank is gone or hangs."""


class Slept(ctypes.Structure):
    """The nanoseconds of wall time and of CPU time that waits in compiled gates took."""

    _fields_ = (("wall", ctypes.c_int64), ("cpu", ctypes.c_int64))


class Waiter:
    """The waiter of a rank, which waits for requests and for words in shared memory, and keeps account of its waits.

    Args:
        oversubscribed: Whether more ranks than cores share this node.
        stall_warn: The seconds after which a wait is logged once; with 0 it never is.
        stall_abort: The seconds after which a wait raises :class:`StallError`; with 0 it never does.
    """

    def __init__(self, oversubscribed: bool = True, stall_warn: float = 0.0, stall_abort: float = 0.0) -> None:
        self.spin_seconds = OVERSUBSCRIBED_SPIN_SECONDS if oversubscribed else SPIN_SECONDS
        self.stall_warn = stall_warn
        self.stall_abort = stall_abort
        self._seconds = 0.0
        self._cpu_seconds = 0.0
        self._slept = Slept()
        self.slept_at = ctypes.addressof(self._slept)
        """The address of the account that compiled gates keep of their waits."""
        self.phase = "start"
        """The phase in which the rank is, for messages."""

    @property
    def seconds(self) -> float:
        """Return the wall time spent in waits so far, in seconds."""
        return self._seconds + 1e-9 * self._slept.wall

    @property
    def cpu_seconds(self) -> float:
        """Return the CPU time that waits took so far, in seconds."""
        return self._cpu_seconds + 1e-9 * self._slept.cpu

    def wait(self, *requests: MPI.Request) -> None:
        """Return when all requests are complete."""
        self.wait_all(requests)

    def wait_all(self, requests: Sequence[MPI.Request]) -> None:
        """Return when all requests are complete."""
        pending = list(requests)
        if MPI.Request.Testall(pending):
            return
        start = last = time.perf_counter()
        cpu = time.process_time()
        pause = FIRST_SLEEP
        warned = False
        while True:
            completed = MPI.Request.Testsome(pending)
            if completed is None:
                break
            now = time.perf_counter()
            if completed:
                last, pause = now, FIRST_SLEEP
            if now - last < self.spin_seconds:
                os.sched_yield()
                continue
            time.sleep(pause)
            pause = min(GROWTH * pause, LONGEST_SLEEP)
            if now - start > 1.0:
                warned = self._watch(now - start, warned)
        self._account(start, cpu)

    def wait_until(self, ready: Callable[[], bool]) -> None:
        """Return when ``ready()`` is true, such as when other ranks have written words of shared memory."""
        if ready():
            return
        start, cpu = time.perf_counter(), time.process_time()
        pause = FIRST_SLEEP
        warned = False
        while not ready():
            waited = time.perf_counter() - start
            if waited < self.spin_seconds:
                os.sched_yield()
                continue
            time.sleep(pause)
            pause = min(GROWTH * pause, LONGEST_SLEEP)
            if waited > 1.0:
                warned = self._watch(waited, warned)
        self._account(start, cpu)

    def wait_asleep(self, done: Callable[..., bool], *arguments: int) -> None:
        """Return when ``done(*arguments)`` is true.

        Args:
            done: The compiled wait, which sleeps for at most a second at a time and keeps account itself.
            arguments: The arguments of ``done``.
        """
        start = time.perf_counter()
        warned = False
        while not done(*arguments):
            warned = self._watch(time.perf_counter() - start, warned)

    def _account(self, start: float, cpu: float) -> None:
        self._seconds += time.perf_counter() - start
        self._cpu_seconds += time.process_time() - cpu

    def _watch(self, waited: float, warned: bool) -> bool:
        if self.stall_abort and waited > self.stall_abort:
            raise StallError(
                f"waited {waited:.0f} s for other ranks in phase {self.phase} (run.stall_abort = {self.stall_abort:g})"
            )
        if self.stall_warn and waited > self.stall_warn and not warned:
            logger.warning("has waited %.0f s for other ranks in phase %s", waited, self.phase)
            return True
        return warned


class InFlight:
    """A queue of pending requests of limited length, in which the oldest is waited for first.

    Args:
        waiter: The waiter of this rank.
        most: The most requests that are pending at once.
    """

    def __init__(self, waiter: Waiter, most: int) -> None:
        self._waiter = waiter
        self._most = most
        self._requests: deque[MPI.Request] = deque()

    def start(self, start: Callable[[], MPI.Request]) -> None:
        """Start one more request; where the queue is full, wait for the oldest one first."""
        if len(self._requests) == self._most:
            self._waiter.wait(self._requests.popleft())
        self._requests.append(start())

    def finish(self) -> None:
        """Return when all requests are complete."""
        self._waiter.wait_all(list(self._requests))
