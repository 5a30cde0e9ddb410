"""A routing rule of one's own: an even share for everybody, whatever the tokens are.

mpirun -n 13 hiermpi train --data data.h5 --run runs/even --hierarchy.routing examples.own_routing:ROUTING
"""

import numpy as np


def even(counts, capacity, frequency):
    """Return the bin of each unit: the bins are filled one after another.

    Args:
        counts: (n, G + 1) tokens of each group in each unit; the last column is the root's own bin.
        capacity: (G + 1,) units that an even share gives each bin; 0 where nobody computes.
        frequency: (G,) share of each group in the corpus.
    """
    return np.repeat(np.arange(len(capacity)), capacity)[: len(counts)]


ROUTING = even
