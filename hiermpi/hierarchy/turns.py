"""How many of a node's ranks compute at once, where they are more than its cores."""


def at_once(leaves: int, cores: int) -> int:
    """Ranks of a node that compute at the same time: few, so that each finds its memory in the caches.

    At least as many as the cores, and so many that no core is left idle while the last ones compute: of equal work, a
    last round of fewer ranks than cores takes as long as one of as many. All of them where no other number will do.

    Args:
        leaves: of the node.
        cores: for them.
    """
    for ranks in range(max(cores, 1), leaves):
        if leaves % ranks == 0 or leaves % ranks >= cores:
            return ranks
    return max(leaves, 1)
