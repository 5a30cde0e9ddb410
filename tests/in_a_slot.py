"""A training run on one core, of which one rank fails inside its compute slot.

    mpiexec -n N python in_a_slot.py FAULT RANK NOTES train ARGUMENT...

FAULT is ``none``, ``raise``, ``hang`` or ``die``. Each rank leaves NOTES/rank-R.txt with the numbers of the slots that
it has taken; the failing rank leaves NOTES/failed.txt with the number of the slot in which it fails.
"""

import os
import signal
import sys
import time
from pathlib import Path

from numpy.typing import NDArray

from hiermpi.cli import launched_rank, main
from hiermpi.model.contract import Batch
from hiermpi.model.gpt2 import GPT2

STEP = 2
"""The failing rank fails in the batch that has this number."""


def fail(fault: str) -> None:
    """Do what ``fault`` names."""
    if fault == "raise":
        raise ValueError("failed in a slot")
    if fault == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    while fault == "hang":
        time.sleep(0.1)


def fail_in_a_slot(fault: str, failing: bool, notes: Path) -> None:
    """Have models note the slots that they are given, and fail at step :data:`STEP` where ``failing``."""
    work_in, write_gradients = GPT2.work_in, GPT2.write_gradients
    taken: list[int] = []

    def noted_work_in(self: GPT2, slot: int) -> None:
        taken.append(slot)
        (notes / f"rank-{launched_rank()}.txt").write_text(" ".join(map(str, sorted(set(taken)))))
        work_in(self, slot)

    def failing_write_gradients(self: GPT2, batch: Batch, gradients: NDArray) -> tuple[float, int]:
        if failing and batch.step == STEP and taken:
            (notes / "failed.txt").write_text(str(taken[-1]))
            fail(fault)
        return write_gradients(self, batch, gradients)

    GPT2.work_in = noted_work_in  # type: ignore[method-assign]
    GPT2.write_gradients = failing_write_gradients  # type: ignore[method-assign]


if __name__ == "__main__":
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # one core makes one slot for all ranks
    fail_in_a_slot(sys.argv[1], launched_rank() == int(sys.argv[2]), Path(sys.argv[3]))
    sys.exit(main(sys.argv[4:]))
