"""A reduction of one's own: a ring (Patarasu and Yuan, Bandwidth optimal all-reduce algorithms, 2009).

Each rank hands a part of the vector to its right neighbour while it receives another from its left one. After size - 1
rounds every part is summed at one rank, and after as many more it is everywhere.

    mpirun -n 4 hiermpi train --data data.h5 --run runs/ring --hierarchy.reduction auto,examples.own_reduction:REDUCTION
"""

import numpy as np
from mpi4py import MPI

from hiermpi import Reduction


class Ring(Reduction):
    """Sums around a ring; memory, broadcast and all else are those of the base class."""

    name = "ring"

    def reduce(self, sums, gradients):
        world, size, rank = self.comms.world, self.comms.size, self.comms.rank
        self.comms.waiter.wait(world.Iallreduce(MPI.IN_PLACE, sums))
        parts = np.array_split(gradients, size)
        left, right = (rank - 1) % size, (rank + 1) % size
        for step in range(size - 1):
            mine, theirs = parts[(rank - step) % size], parts[(rank - step - 1) % size]
            received = np.empty_like(theirs)
            self.send_and_receive(mine, right, received, left)
            theirs += received
        for step in range(size - 1):
            mine, theirs = parts[(rank + 1 - step) % size], parts[(rank - step) % size]
            self.send_and_receive(mine, right, theirs, left)
        return gradients


REDUCTION = Ring
