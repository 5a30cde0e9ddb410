"""The communicators match the topology, on any number of ranks."""

import os

import numpy as np
import pytest
from collective import collective_assert
from mpi4py import MPI

from hiermpi.communication.communicators import Communicators
from hiermpi.hierarchy.topology import Role

pytestmark = pytest.mark.mpi


@pytest.mark.smoke
@pytest.mark.parametrize("order", [12, 1, 3])
def test_split_matches_topology(comm, order):
    comms = Communicators(comm, order)
    topology = comms.topology
    members = {
        "control": [0, *topology.control_ranks] if comms.role is not Role.WORKER else None,
        "group": list(topology.groups[comms.group_index]) if comms.rank else None,
        "world": list(range(comm.size)),
    }
    good = True
    for name, expected in members.items():
        part = getattr(comms, name)
        if expected is None:
            good = good and part == MPI.COMM_NULL and not getattr(comms, f"in_{name}")
        else:
            good = good and part.allgather(comms.rank) == expected and part.Get_name().startswith(f"hiermpi.{name}")
    good = good and comms.in_control == (members["control"] is not None) and comms.in_group == (comms.rank > 0)
    collective_assert(comm, good, "a communicator does not hold the ranks of the topology")
    comms.free()


def test_node_communicators_cover_the_world(comm):
    comms = Communicators(comm, 12)
    sizes = comm.allgather((comms.topology.nodes[comms.rank], comms.node.size))
    for node in range(comms.topology.n_nodes):
        here = [size for which, size in sizes if which == node]
        collective_assert(comm, here == [len(here)] * len(here))
    comms.free()


def test_levels_reach_every_rank_once(comm):
    comms = Communicators(comm, 12)
    value = np.array([0.0 if comms.rank else 42.0])
    for level in comms.levels_down():
        level.Bcast(value)
    collective_assert(comm, value[0] == 42.0)
    comms.free()


@pytest.mark.skipif("HIERMPI_TEST_NODES" not in os.environ, reason="set by tests/endtoend/test_nodes.py")
def test_number_of_nodes(world):
    comms = Communicators(world, 12)
    collective_assert(world, comms.topology.n_nodes == int(os.environ["HIERMPI_TEST_NODES"]))
    comms.free()
