"""hierarchy.reduction = auto: timed once, kept with the run, and the same on every rank."""

import json

import numpy as np
import pytest
from collective import collective_assert

from hiermpi.communication import autotune as choosing
from hiermpi.communication.agreement import gather_objects
from hiermpi.communication.autotune import make_reduction, preferred
from hiermpi.communication.communicators import Communicators
from hiermpi.communication.reduction import Vectors
from hiermpi.errors import UserError
from hiermpi.hierarchy.ownership import owned_by_root
from hiermpi.registry import REDUCTIONS
from runs import TINY, make_dataset, train_on


@pytest.mark.mpi
@pytest.mark.parametrize("dtype", [np.float32, np.int64])
def test_every_rank_takes_the_same_and_starts_from_zero(comm, dtype):
    comms = Communicators(comm, 12)
    chosen = make_reduction("auto", comms, owned_by_root(1000), Vectors(dtype))
    names = gather_objects(comms.world, chosen.reduction.name, comms.waiter)
    collective_assert(comm, names is None or len(set(names)) == 1, names)
    collective_assert(comm, comm.size == 1 or set(chosen.seconds) >= {"tree", "flat"})
    collective_assert(comm, not chosen.reduction.gradient_vector().any())
    collective_assert(comm, not chosen.reduction.parameter_slots()[0].any())
    chosen.reduction.free()
    comms.free()


@pytest.mark.mpi
def test_what_is_known_is_not_timed(comm, monkeypatch):
    monkeypatch.setattr(choosing, "fastest", lambda *_: pytest.fail("was timed"))
    comms = Communicators(comm, 12)
    for name in REDUCTIONS:
        chosen = make_reduction("auto", comms, owned_by_root(100), Vectors(), known=name)
        assert (chosen.reduction.name, chosen.name, dict(chosen.seconds)) == (name, name, {})
        chosen.reduction.free()
    comms.free()


@pytest.mark.mpi
def test_a_run_keeps_its_choice(world, shared_folder):
    data, run = shared_folder / "data.h5", shared_folder / "run"
    kept = run / "reductions.json"
    if world.rank == 0:
        make_dataset(shared_folder)
    assert train_on(world, data, run, *TINY, "--train.steps", "2") == 0
    collective_assert(world, kept.exists() == (world.size > 1))
    if world.size == 1:
        return
    if world.rank == 0:
        choice = json.loads(kept.read_text())
        assert len(choice) == 1
        kept.write_text(json.dumps(dict.fromkeys(choice, "flat")))
    assert train_on(world, data, run, *TINY, "--train.steps", "3") == 0
    collective_assert(world, world.rank or set(json.loads(kept.read_text()).values()) == {"flat"})
    if world.rank == 0:
        kept.write_text("{")
    with pytest.raises(UserError, match=r"reductions\.json is damaged: remove it"):
        train_on(world, data, run, *TINY, "--train.steps", "4")


def test_a_little_faster_is_not_enough():
    assert preferred({"shared": 1.05, "tree": 1.0, "flat": 2.0}) == "shared"
    assert preferred({"shared": 1.2, "tree": 1.0, "flat": 0.95}) == "tree"
    assert preferred({"tree": 1.2, "flat": 0.95}) == "flat"
