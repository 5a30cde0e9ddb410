"""A run of which one rank is killed halfway through its update: the others write down what they hold.

    mpiexec --with-ft ulfm -n N python -m mpi4py survivors.py DATA FOLDER VICTIM STEP SETTING...

Each survivor leaves FOLDER/rank-R.npz: its step and, in token order, the parameters, and the moments where its node
shares them.
"""

import os
import signal
import sys
from pathlib import Path

import numpy as np
from mpi4py import MPI

from hiermpi.cli import parse
from hiermpi.communication.communicators import Communicators
from hiermpi.communication.waiting import StallError
from hiermpi.optimizer import update as updating
from hiermpi.training import opening
from hiermpi.training.session import Session, open_everywhere


def die_in_the_middle(trainer, step):
    """Have this rank killed when half of what it owns is updated in step number ``step``."""
    whole_update = updating.adamw_update

    def half_an_update(*arrays, decay_ranges, **settings):
        if trainer.progress.step + 1 < step:
            whole_update(*arrays, decay_ranges=decay_ranges, **settings)
            return
        start, stop, decay = decay_ranges[0]
        half = [(start, start + (stop - start) // 2, decay)] if len(decay_ranges) == 1 else decay_ranges[:-1]
        whole_update(*arrays, decay_ranges=half, **settings)
        os.kill(os.getpid(), signal.SIGKILL)

    updating.adamw_update = half_an_update


def main(data, folder, victim, step, *settings):
    opening.refuse_unavailable = lambda _: None
    world = MPI.COMM_WORLD
    arguments = parse(["train", "--data", data, "--run", f"{folder}/run", *settings])
    opened, start = open_everywhere(arguments, world)
    comms = Communicators(world, start.config.model.symmetry_order, stall_warn=0, stall_abort=0.9)
    session = Session(start, comms, opened)
    trainer = session.trainer
    if comms.rank == int(victim):
        die_in_the_middle(trainer, int(step))
    try:
        while trainer.progress.step < start.config.train.steps:
            trainer.step()
    except (StallError, MPI.Exception):
        in_order, parameters = session.model.tensors_in_token_order, session.model.parameters
        parts = {"parameters": parameters.vector}
        if session.reduction.shares_memory:  # the moments of all owners of the node, also of the one that is gone
            parts |= session.reduction.state_slots()[parameters.slot]
        tensors = {part: in_order(vector) for part, vector in parts.items()}
        arrays = {f"{part}/{name}": tensor for part, named in tensors.items() for name, tensor in named.items()}
        np.savez(Path(folder) / f"rank-{comms.rank}.npz", step=trainer.progress.step, **arrays)
    sys.stdout.flush()
    os._exit(0)  # MPI_Finalize would wait for the dead


main(*sys.argv[1:])
