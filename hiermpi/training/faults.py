"""Faults made to happen at a named phase of a step, for tests: ``HIERMPI_FAULT``.

    HIERMPI_FAULT="raise:rank=4:step=7:phase=reduce"

Several are separated by commas. Kinds: ``raise`` an exception, ``kill`` (SIGKILL), ``exit`` (code 3), ``freeze``
(SIGSTOP), ``hang`` (sleep for ever), ``slow`` (sleep ``seconds``), ``signal`` (SIGUSR1 to oneself), ``nan`` (plant a
NaN in the gradients of tensor number ``tensor``; phase ``compute`` only). ``step`` counts from 1.
"""

import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass

from hiermpi.errors import UsageError

VARIABLE = "HIERMPI_FAULT"
PHASES = ("batch", "scatter", "compute", "reduce", "optimize", "broadcast", "commit", "evaluate", "checkpoint")
"""In the order of a step. Only the root has work in ``batch``, ``optimize`` and ``checkpoint``."""
KINDS = ("raise", "kill", "exit", "freeze", "hang", "slow", "signal", "nan")


class InjectedFault(RuntimeError):
    """The exception of a ``raise`` fault."""


@dataclass(frozen=True)
class Fault:
    """One fault and when it happens."""

    kind: str
    rank: int = 0
    step: int = 1
    phase: str = "compute"
    seconds: float = 1.0
    tensor: int = 0

    def happen(self) -> None:
        """Make it happen, in this process."""
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
    """The faults of the environment. Raises UsageError for a text it does not understand."""
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
