"""The phases of a step account for the time of a rank; tests can inject faults into them.

    HIERMPI_FAULT="raise:rank=4:step=7:phase=reduce"

Several faults are separated by commas. Their kinds are ``raise`` (an exception), ``kill`` (SIGKILL), ``exit`` (code 3),
``freeze`` (SIGSTOP), ``hang`` (sleep for ever), ``slow`` (sleep ``seconds``), ``signal`` (SIGUSR1 to the rank) and
``nan`` (plant a NaN in the gradients of tensor number ``tensor``; phase ``compute`` only). ``step`` counts from 1.
"""

import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from hiermpi.communication.waiting import Waiter
from hiermpi.errors import UsageError

VARIABLE = "HIERMPI_FAULT"
PHASES = ("batch", "scatter", "compute", "reduce", "optimize", "broadcast", "commit", "evaluate", "checkpoint")
"""The names of the phases in the order of a step. Only the root works in ``batch``, ``optimize`` and ``checkpoint``."""
KINDS = ("raise", "kill", "exit", "freeze", "hang", "slow", "signal", "nan")


class InjectedFault(RuntimeError):
    """The exception of a ``raise`` fault."""


@dataclass(frozen=True)
class Fault:
    """A fault, with the rank, step and phase in which it happens."""

    kind: str
    rank: int = 0
    step: int = 1
    phase: str = "compute"
    seconds: float = 1.0
    tensor: int = 0

    def happen(self) -> None:
        """Make the fault happen in this process."""
        if self.kind == "raise":
            raise InjectedFault(f"fault injected at step {self.step} in phase {self.phase}")
        if self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.kind == "exit":
            os._exit(3)
        if self.kind == "freeze":
            os.kill(os.getpid(), signal.SIGSTOP)
        if self.kind == "signal":
            os.kill(os.getpid(), signal.SIGUSR1)
        if self.kind in ("hang", "slow"):
            time.sleep(1e9 if self.kind == "hang" else self.seconds)


def parse_faults(environment: Mapping[str, str]) -> tuple[Fault, ...]:
    """Read the faults from the environment. Raises UsageError for a text that describes none."""
    text = environment.get(VARIABLE, "")
    return tuple(_parse(entry) for entry in text.split(",") if entry)


def _parse(text: str) -> Fault:
    kind, *parts = text.split(":")
    try:
        values = dict(part.split("=", 1) for part in parts)
        fault = Fault(
            kind,
            rank=int(values.pop("rank", 0)),
            step=int(values.pop("step", 1)),
            phase=values.pop("phase", "compute"),
            seconds=float(values.pop("seconds", 1.0)),
            tensor=int(values.pop("tensor", 0)),
        )
    except ValueError:
        values = {"?": ""}
    if values or kind not in KINDS or fault.phase not in PHASES:
        raise UsageError(
            f'{VARIABLE}: "{text}" is not KIND:rank=R:step=S:phase=P with KIND one of {", ".join(KINDS)} '
            f"and P one of {', '.join(PHASES)}"
        )
    return fault


class Phases:
    """A context that adds time to the phases, and makes the faults of this rank happen.

    Args:
        rank: The number of this rank.
        waiter: The waiter of this rank, whose waiting is accounted separately from work.
        faults: The faults of all ranks.
    """

    def __init__(self, rank: int, waiter: Waiter, faults: Sequence[Fault] = ()) -> None:
        self.waiter = waiter
        self.faults = [fault for fault in faults if fault.rank == rank]
        self.step = 0
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.waits = dict.fromkeys(PHASES, 0.0)
        self.cpu = dict.fromkeys(PHASES, 0.0)
        self.waiting_cpu = 0.0
        """The CPU seconds that the waiting in all phases took."""

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Account the time of the body to phase ``name``."""
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
        """Return the ``nan`` fault of this step, or None where there is none."""
        return next((fault for fault in self.faults if fault.kind == "nan" and fault.step == self.step), None)
