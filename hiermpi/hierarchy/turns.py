"""How many of a node's ranks compute at once, where they are more than its cores."""

IDLE = 0.1
"""Of the cores' time that may be idle while the last ranks compute: turns on cores of their own save more."""


def at_once(leaves: int, cores: int) -> int:
    """Ranks of a node that compute at the same time: few, so that each finds its memory in the caches.

    One for each core where that leaves few of them idle in the last round. Else so many more that the last round has a
    rank for each core too: of equal work, a round of fewer ranks takes as long. All of them where no other number will
    do.

    Args:
        leaves: of the node.
        cores: for them.
    """
    cores = max(cores, 1)
    if cores <= leaves and -leaves % cores <= IDLE * leaves:
        return cores
    for ranks in range(cores, leaves):
        if leaves % ranks == 0 or leaves % ranks >= cores:
            return ranks
    return max(leaves, 1)
