"""The communicators of the hierarchy: world, control, group, node."""

import os

from mpi4py import MPI

from hiermpi.communication.waiting import Waiter
from hiermpi.hierarchy.topology import Role, Topology


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0))


class Communicators:
    """A duplicate of ``parent``, split to match a :class:`Topology`. Collective over ``parent``, like :meth:`free`.

    Args:
        parent: the ranks to organise; it stays the caller's.
        symmetry_order: classes of the model.
        coordinators: ``compute`` or ``dedicated``.
        stall_warn, stall_abort: see :class:`Waiter`.

    Attributes:
        world: all ranks, rank 0 is the root.
        control: the root (rank 0) and the control ranks in group order; COMM_NULL on workers.
        group: a control rank (rank 0) and its workers; COMM_NULL on the root.
        node: the ranks that share this rank's memory.
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
        in_control = self.role is not Role.WORKER
        self.control = self.world.Split(0 if in_control else MPI.UNDEFINED, self.group_index + 1)
        in_group = self.role is not Role.ROOT
        place = self.topology.groups[self.group_index].index(self.rank) if in_group else 0
        self.group = self.world.Split(self.group_index if in_group else MPI.UNDEFINED, place)
        self._name()

    def _name(self) -> None:
        self.world.Set_name("hiermpi.world")
        self.node.Set_name(f"hiermpi.node.{self.topology.nodes[self.rank]}")
        if self.control != MPI.COMM_NULL:
            self.control.Set_name("hiermpi.control")
        if self.group != MPI.COMM_NULL:
            self.group.Set_name(f"hiermpi.group.{self.group_index}")

    def levels_down(self) -> list[MPI.Comm]:
        """The communicators this rank passes data down on, in order: control, then group."""
        return [comm for comm in (self.control, self.group) if comm != MPI.COMM_NULL]

    def free(self) -> None:
        """Free every communicator made here."""
        for comm in (self.group, self.control, self.node, self.world):
            if comm != MPI.COMM_NULL:
                comm.Free()
