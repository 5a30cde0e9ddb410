"""A run of which one rank is killed halfway through its update: the others write down what they hold.

    mpiexec --with-ft ulfm -n N python -m mpi4py survivors.py DATA FOLDER VICTIM STEP SETTING...

Each survivor leaves FOLDER/rank-R.npz: its step and, in token order, the parameters, and the moments where its node
shares them.
"""

import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

import numpy as np
from mpi4py import MPI

from hiermpi.cli import parse
from hiermpi.communication.communicators import Communicators
from hiermpi.communication.waiting import StallError
from hiermpi.config.loading import load_config
from hiermpi.optimizer.update import Optimizer
from hiermpi.training import opening, session
from hiermpi.training.session import Session, run_training


def die_in_the_middle(optimizer: Optimizer, step: int) -> None:
    """Have this rank killed when half of what it owns is updated in step number ``step``."""
    whole_update = optimizer.update

    def half_an_update(gradients: np.ndarray, n_tokens: int, norm: float, before: int) -> None:
        if before + 1 == step:
            if len(optimizer._pieces) > 1:
                del optimizer._pieces[-1]
            else:
                piece = optimizer._pieces[0]
                optimizer._pieces[0] = piece._replace(stop=(piece.start + piece.stop) // 2)
            for slot in optimizer._values:
                del slot[len(optimizer._pieces) :]
                if len(slot) == 1:
                    length = optimizer._pieces[0].stop - optimizer._pieces[0].start
                    state = {name: vector[:length] for name, vector in slot[0].state.items()}
                    slot[0] = slot[0]._replace(parameters=slot[0].parameters[:length], state=state)
        whole_update(gradients, n_tokens, norm, before)
        if before + 1 == step:
            os.kill(os.getpid(), signal.SIGKILL)

    optimizer.update = half_an_update  # type: ignore[method-assign]


class DyingSession(Session):
    """A run that only takes steps, and ends in the middle of one."""

    folder_of_states: Path
    victim: int
    step: int

    def run(self) -> NoReturn:
        rank, reduction = self.rank, self.rank.reduction
        if self.comms.rank == self.victim:
            assert rank.optimizer
            die_in_the_middle(rank.optimizer, self.step)
        try:
            while rank.progress.step < self.config.train.steps:
                self.trainer.step()
        except (StallError, MPI.Exception):
            parameters = rank.model.parameters
            parts = {"parameters": parameters.vector}
            if reduction.shares_memory:  # the moments of all owners of the node, also of the one that is gone
                parts |= reduction.state_slots()[parameters.slot]
            tensors = {part: parameters.tensors_in_token_order(vector) for part, vector in parts.items()}
            arrays = {f"{part}/{name}": tensor for part, named in tensors.items() for name, tensor in named.items()}
            np.savez(self.folder_of_states / f"rank-{self.comms.rank}.npz", step=rank.progress.step, **arrays)
        sys.stdout.flush()
        os._exit(0)  # MPI_Finalize would wait for the dead


def impatient(world: MPI.Comm, order: int, coordinators: str, *_: float) -> Communicators:
    """Make the hierarchy of a run that soon gives up waiting."""
    return Communicators(world, order, coordinators, stall_warn=0, stall_abort=0.9)


def main(data: str, folder: str, victim: str, step: str, *settings: str) -> None:
    opening.refuse_unavailable = lambda _: None
    session.Communicators = impatient  # type: ignore[assignment, misc]
    session.Session = DyingSession  # type: ignore[misc]
    DyingSession.folder_of_states, DyingSession.victim, DyingSession.step = Path(folder), int(victim), int(step)
    arguments = parse(["train", "--data", data, "--run", f"{folder}/run", *settings])
    run_training(MPI.COMM_WORLD, lambda: load_config(arguments, os.environ), arguments.data, arguments.run)


main(*sys.argv[1:])
