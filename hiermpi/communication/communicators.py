"""The communicators of the hierarchy: world, control, group, node."""

import os

from mpi4py import MPI

from hiermpi.communication.waiting import Waiter
from hiermpi.hierarchy.topology import Role, Topology


def usable_cores() -> int:
    """Return how many cores this process may run on."""
    return len(os.sched_getaffinity(0))


class Communicators:
    """Duplicate ``parent``, and split it to match a :class:`Topology`. Collective over ``parent``, like :meth:`free`.

    Args:
        parent: the ranks to organise; it stays the caller's.
        symmetry_order: how many symmetry classes the model has.
        coordinators: ``compute`` or ``dedicated``.
        stall_warn: see :class:`Waiter`.
        stall_abort: see :class:`Waiter`.

    Attributes:
        world: all ranks; rank 0 is the root.
        control: the root (rank 0) and the control ranks in group order. Only where ``in_control``.
        group: a control rank (rank 0) and its workers. Only where ``in_group``.
        node: the ranks that share this rank's memory.
        in_control: whether this rank is the root or a control rank.
        in_group: whether this rank is a control rank or a worker.
        rank: this rank's number in ``world``.
        size: how many ranks there are.
        topology: the role, group and node of every rank.
        role: this rank's role.
        group_index: this rank's group by number; -1 at the root.
        waiter: does this rank's waiting.
    """

    def __init__(
        self,
        parent: MPI.Comm,
        symmetry_order: int,
        coordinators: str = "compute",
        stall_warn: float = 0.0,
        stall_abort: float = 0.0,
    ) -> None:
        # Start-up skew is spent asleep here: Dup and Split themselves spin.
        Waiter().wait(parent.Ibarrier())
        self.world = parent.Dup()
        self.rank, self.size = self.world.rank, self.world.size
        self.node = self.world.Split_type(MPI.COMM_TYPE_SHARED, self.rank)
        self.waiter = Waiter(self.node.size > usable_cores(), stall_warn, stall_abort)
        leader = self.node.allreduce(self.rank, MPI.MIN)
        self.topology = Topology(
            self.size,
            symmetry_order,
            node_of_rank=tuple(self.world.allgather(leader)),
            coordinators=coordinators,
        )
        self.role = self.topology.role(self.rank)
        self.group_index = self.topology.group_of_rank[self.rank]
        self.in_control = self.role is not Role.WORKER
        self.control = self.world.Split(0 if self.in_control else MPI.UNDEFINED, self.group_index + 1)
        self.in_group = self.role is not Role.ROOT
        place = self.topology.groups[self.group_index].index(self.rank) if self.in_group else 0
        self.group = self.world.Split(self.group_index if self.in_group else MPI.UNDEFINED, place)
        self._name()

    def _name(self) -> None:
        self.world.Set_name("hiermpi.world")
        self.node.Set_name(f"hiermpi.node.{self.topology.nodes[self.rank]}")
        if self.in_control:
            self.control.Set_name("hiermpi.control")
        if self.in_group:
            self.group.Set_name(f"hiermpi.group.{self.group_index}")

    def levels_down(self) -> list[MPI.Comm]:
        """Return the communicators that this rank passes data down on, in order: control, then group."""
        levels = ((self.control, self.in_control), (self.group, self.in_group))
        return [comm for comm, belongs in levels if belongs]

    def free(self) -> None:
        """Free every communicator made here."""
        for comm in (*reversed(self.levels_down()), self.node, self.world):
            comm.Free()
