"""Train from a program of one's own: every rank runs this file.

mpirun -n 2 python examples/from_python.py data.h5 runs/api
"""

import sys

from mpi4py import MPI
from own_optimizer import Momentum

import hiermpi

config = hiermpi.Config.of({"train.steps": 40, "model.n_embd": 48, "model.context_length": 64})
result = hiermpi.train(config, data=sys.argv[1], run=sys.argv[2], rule=Momentum(), comm=MPI.COMM_WORLD)
if MPI.COMM_WORLD.rank == 0:
    print(f"after step {result.step} the validation loss is {result.validation_loss:.3f} nats per token")
