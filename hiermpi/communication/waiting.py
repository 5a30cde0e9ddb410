"""The one place where a rank waits for another.

A wait polls, then backs off to sleeps of at most a millisecond: a waiting rank does not steal the core of one that
computes, and Python's signal handlers, stall timers and the like run between two polls. MPI moves data only while
somebody polls, so whenever a request completes the next ones are polled for without sleep again.
"""

import ctypes
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Sequence

from mpi4py import MPI

FIRST_SLEEP = 20e-6
LONGEST_SLEEP = 1e-3
GROWTH = 1.15
"""Growth of the sleep from poll to poll: about a seventh of the wait so far, so that many rounds lose little."""
SPIN_SECONDS = 2e-3
"""How long a rank with a core of its own polls before it sleeps."""
OVERSUBSCRIBED_SPIN_SECONDS = 50e-6
"""How long it polls where ranks share cores; each poll then gives the core away."""

logger = logging.getLogger("hiermpi")


class StallError(RuntimeError):
    """A rank has waited longer than ``run.stall_abort``: another one is gone or hangs."""


class Slept(ctypes.Structure):
    """Nanoseconds of wall time and of CPU that waits in compiled gates took."""

    _fields_ = (("wall", ctypes.c_int64), ("cpu", ctypes.c_int64))


class Waiter:
    """Wait for requests and for other ranks' words in shared memory, and keep account of it.

    Args:
        oversubscribed: whether more ranks than cores share this node.
        stall_warn: seconds after which a wait is logged, once (0: never).
        stall_abort: seconds after which a wait raises :class:`StallError` (0: never).
    """

    def __init__(self, oversubscribed: bool = True, stall_warn: float = 0.0, stall_abort: float = 0.0) -> None:
        self.spin_seconds = OVERSUBSCRIBED_SPIN_SECONDS if oversubscribed else SPIN_SECONDS
        self.stall_warn = stall_warn
        self.stall_abort = stall_abort
        self._seconds = 0.0
        self._cpu_seconds = 0.0
        self._slept = Slept()
        self.slept_at = ctypes.addressof(self._slept)
        """Address of the account that compiled gates keep of their waits."""
        self.phase = "start"
        """What the rank is doing, for messages."""

    @property
    def seconds(self) -> float:
        """Wall time spent in waits so far, in seconds."""
        return self._seconds + 1e-9 * self._slept.wall

    @property
    def cpu_seconds(self) -> float:
        """CPU time that polling in them took, in seconds."""
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
        """Return when ``ready()`` is true: for words of shared memory, which other ranks write."""
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
        """Return when ``done(*arguments)`` is true: a compiled wait that sleeps a second at most and keeps account."""
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
    """Keep at most so many requests under way; the oldest is waited for first.

    Args:
        waiter: does the waiting.
        most: how many requests.
    """

    def __init__(self, waiter: Waiter, most: int) -> None:
        self._waiter = waiter
        self._most = most
        self._requests: deque[MPI.Request] = deque()

    def start(self, start: Callable[[], MPI.Request]) -> None:
        """Start one more request, when there is room."""
        if len(self._requests) == self._most:
            self._waiter.wait(self._requests.popleft())
        self._requests.append(start())

    def finish(self) -> None:
        """Return when all requests are complete."""
        self._waiter.wait_all(list(self._requests))
