"""This module makes the communicators of the hierarchy: world, control, group and node."""

import os

from mpi4py import MPI

from hiermpi.communication.waiting import Waiter
from hiermpi.hierarchy.topology import Role, Topology


def usable_cores() -> int:
    """Return the number of cores on which this process may run."""
    return len(os.sched_getaffinity(0))


class Communicators:
    """The communicators of the hierarchy: a duplicate of ``parent``, and its splits by a :class:`Topology`.

    Construction and :meth:`free` are collective over ``parent``.

    Args:
        parent: The communicator of the ranks to organise; the caller still has to free it.
        symmetry_order: The number of symmetry classes of the model.
        coordinators: The value of ``hierarchy.coordinators``, ``compute`` or ``dedicated``.
        stall_warn: The seconds after which a wait is logged, see :class:`Waiter`.
        stall_abort: The seconds after which a wait raises, see :class:`Waiter`.

    Attributes:
        world: All ranks; rank 0 is the root.
        control: The root (rank 0) and the control ranks in group order, valid only where ``in_control``.
        group: A control rank (rank 0) and its workers, valid only where ``in_group``.
        node: The ranks that share this rank's memory.
        in_control: Whether this rank is the root or a control rank.
        in_group: Whether this rank is a control rank or a worker.
        rank: The number of this rank in ``world``.
        size: The number of ranks.
        topology: The role, group and node of every rank.
        role: The role of this rank.
        group_index: The number of this rank's group; -1 at the root.
        waiter: The waiter of this rank.
    """

    def __init__(
        self,
        parent: MPI.Comm,
        symmetry_order: int,
        coordinators: str = "compute",
        stall_warn: float = 0.0,
        stall_abort: float = 0.0,
    ) -> None:
        # Ranks that start early sleep here for the others, as Dup and Split themselves would spin.
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
        """Return the communicators over which this rank passes data down, in order: control, then group."""
        levels = ((self.control, self.in_control), (self.group, self.in_group))
        return [comm for comm, belongs in levels if belongs]

    def free(self) -> None:
        """Free every communicator that the constructor made."""
        for comm in (*reversed(self.levels_down()), self.node, self.world):
            comm.Free()
