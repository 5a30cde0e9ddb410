"""Where the time of a rank goes: seconds of wall, of waiting and of CPU per phase of a step."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from hiermpi.communication.waiting import Waiter
from hiermpi.training.faults import PHASES, Fault


class Phases:
    """Times phases, and is the place where injected faults happen.

    Args:
        rank: this rank.
        waiter: its waits are told apart from work.
        faults: of all ranks.
    """

    def __init__(self, rank: int, waiter: Waiter, faults: Sequence[Fault] = ()) -> None:
        self.waiter = waiter
        self.faults = [fault for fault in faults if fault.rank == rank]
        self.step = 0
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.waits = dict.fromkeys(PHASES, 0.0)
        self.cpu = dict.fromkeys(PHASES, 0.0)
        self.waiting_cpu = 0.0
        """CPU that the waits of all phases took."""

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Account the body to phase ``name``."""
        self.waiter.phase = name
        self._trip(name)
        wall, waited, cpu = time.perf_counter(), self.waiter.seconds, time.process_time()
        polled = self.waiter.cpu_seconds
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - wall
            self.waits[name] += self.waiter.seconds - waited
            self.cpu[name] += time.process_time() - cpu
            self.waiting_cpu += self.waiter.cpu_seconds - polled

    def _trip(self, name: str) -> None:
        for fault in self.faults:
            if fault.step == self.step and fault.phase == name:
                fault.happen()

    def planted_nan(self) -> Fault | None:
        """The ``nan`` fault of this step, if there is one."""
        return next((fault for fault in self.faults if fault.kind == "nan" and fault.step == self.step), None)
