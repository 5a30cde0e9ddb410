"""Small objects, agreement on errors, and waits."""

import time

import pytest
from collective import collective_assert
from mpi4py import MPI

from hiermpi.communication import agreement
from hiermpi.communication.agreement import agree, agreed, broadcast_object, from_root, gather_objects
from hiermpi.communication.waiting import StallError, Waiter
from hiermpi.errors import UsageError, UserError

pytestmark = pytest.mark.mpi


def test_broadcast_and_gather(comm):
    waiter = Waiter()
    value = broadcast_object(comm, {"a": [1, "x"]} if comm.rank == 0 else None, waiter)
    collective_assert(comm, value == {"a": [1, "x"]})
    gathered = gather_objects(comm, "y" * comm.rank, waiter)
    expected = ["y" * rank for rank in range(comm.size)] if comm.rank == 0 else None
    collective_assert(comm, gathered == expected)


def test_agree_raises_the_lowest_ranks_user_error_everywhere(comm):
    waiter = Waiter()
    agree(comm, None, waiter)
    last = comm.size - 1
    error = UsageError(f"from {comm.rank}") if comm.rank in (last, last - 1) else None
    caught = None
    try:
        agree(comm, error, waiter)
    except UserError as raised:
        caught = raised
    collective_assert(comm, isinstance(caught, UsageError) and str(caught) == f"from {max(last - 1, 0)}")
    collective_assert(comm, caught.everywhere)


def test_agree_tells_of_other_errors(comm):
    error = KeyError("lost") if comm.rank == comm.size - 1 else None
    with pytest.raises(KeyError if error else RuntimeError, match="lost"):
        agree(comm, error, Waiter())


def test_agreed_raises_everywhere_what_one_rank_raises(comm):
    waiter = Waiter()
    with agreed(comm, waiter):
        pass
    with pytest.raises(UsageError, match=f"from {comm.size - 1}"), agreed(comm, waiter):
        if comm.rank == comm.size - 1:
            raise UsageError(f"from {comm.rank}")


def test_what_the_root_makes_or_its_error(comm):
    waiter, called = Waiter(), []

    def make():
        called.append(comm.rank)
        return {"by": comm.rank}

    collective_assert(comm, from_root(comm, make, waiter) == {"by": 0})
    collective_assert(comm, called == ([0] if comm.rank == 0 else []))
    with pytest.raises(ZeroDivisionError if comm.rank == 0 else RuntimeError, match="division"):
        from_root(comm, lambda: 1 // 0, waiter)


def test_an_error_is_said_where_others_are_late(world, monkeypatch, caplog):
    if world.size == 1:
        pytest.skip("nobody is late")
    monkeypatch.setattr(agreement, "PATIENCE_SECONDS", 0.05)
    if world.rank == 0:
        time.sleep(0.3)
    error = UsageError("lost") if world.rank == world.size - 1 else None
    with pytest.raises(UsageError, match="lost"):
        agree(world, error, Waiter())
    said = [record.getMessage() for record in caplog.records]
    collective_assert(world, said == (["lost (other ranks have not heard of it yet)"] if error else []), said)


def test_a_wait_sleeps_and_is_accounted(world):
    waiter = Waiter()
    if world.rank == 0:
        time.sleep(0.3)
    cpu = time.process_time()
    waiter.wait(world.Ibarrier())
    cpu = time.process_time() - cpu
    late = world.rank == 0 or world.size == 1
    collective_assert(world, late or waiter.seconds > 0.2, f"{waiter.seconds} s")
    collective_assert(world, late or cpu < 0.2, f"{cpu} s of CPU in a wait of 0.3 s")


def test_a_stall_ends_the_wait():
    request = MPI.COMM_SELF.Irecv(bytearray(1), source=0)
    with pytest.raises(StallError, match=r"phase reduce"):
        waiter = Waiter(stall_abort=1.1)
        waiter.phase = "reduce"
        waiter.wait(request)
    MPI.COMM_SELF.Send(bytearray(1), dest=0)
    request.Wait()
