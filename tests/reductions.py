"""Reductions from outside the package, as a user might write them: one that works, and some that do not."""

import numpy as np

from hiermpi.communication.reduction import Reduction


class Ring(Reduction):
    """Sums around a ring; all else is the base class's."""

    name = "ring"

    def reduce(self, sums, gradients):
        self.sum_everywhere(sums)
        size, rank = self.comms.size, self.comms.rank
        parts, left, right = np.array_split(gradients, size), (rank - 1) % size, (rank + 1) % size
        for step in range(size - 1):
            mine, theirs = parts[(rank - step) % size], parts[(rank - step - 1) % size]
            received = np.empty_like(theirs)
            self.send_and_receive(mine, right, received, left)
            theirs += received
        for step in range(size - 1):
            mine, theirs = parts[(rank + 1 - step) % size], parts[(rank - step) % size]
            self.send_and_receive(mine, right, theirs, left)
        return gradients


class Unmakeable(Reduction):
    def __init__(self, comms, ownership, vectors):
        raise ValueError("no ring of\nthese ranks")


class Incomplete:
    """Does not derive from Reduction, and lacks most of it."""

    def __init__(self, comms, ownership, vectors):
        self.ownership = ownership

    def reduce(self, sums, gradients):
        return gradients


class Half(Ring):
    def reduce(self, sums, gradients):
        return super().reduce(sums, gradients)[::2]


class Wide(Ring):
    def reduce(self, sums, gradients):
        return super().reduce(sums, gradients).astype(np.float64)


class Lazy(Ring):
    """Sums the numbers alone."""

    def reduce(self, sums, gradients):
        self.sum_everywhere(sums)
        gradients[:] = -1
        return gradients


class Stateless(Ring):
    def state_slots(self):
        return [{} for _ in range(self.vectors.slots)]


class OneSlot(Ring):
    def parameter_slots(self):
        return super().parameter_slots()[:1]


class Silent(Ring):
    def broadcast(self, verdict, parameters):
        verdict[:] = [1.0, 7.0]


class Deaf(Ring):
    def exchange(self, values):
        if values is not None:
            values[:] = 0


class Failing(Ring):
    def reduce(self, sums, gradients):
        return self.no_such_thing


def unusable(comms, ownership, vectors):
    """Would be the only candidate to fail, but says before that it cannot be used."""
    raise AssertionError


unusable.usable = lambda _: False
