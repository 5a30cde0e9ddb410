"""hierarchy.reduction = auto: timed once, kept with the run, and the same on every rank."""

import json

import numpy as np
import pytest
from collective import collective_assert
from reductions import Ring

from hiermpi.communication import autotune as choosing
from hiermpi.communication.agreement import gather_objects
from hiermpi.communication.autotune import candidates, make_reduction, preferred
from hiermpi.communication.communicators import Communicators
from hiermpi.communication.reduction import Vectors
from hiermpi.config.registry import REDUCTIONS
from hiermpi.errors import PluginError, UsageError, UserError
from hiermpi.hierarchy.ownership import Ownership, owned_by_root
from runs import TINY, losses, make_dataset, train_on


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


def distributed(comms, size=1000):
    """Blocks of ``size`` elements dealt out among all owners."""
    ranks = [0, *comms.topology.control_ranks]
    bounds = np.arange(0, size + 1, 100)
    return Ownership(bounds, np.arange(len(bounds) - 1) % len(ranks), np.full(len(bounds) - 1, -1), ranks)


@pytest.mark.mpi
@pytest.mark.parametrize("setting", ["reductions:Ring", Ring])
@pytest.mark.parametrize("dtype", [np.float32, np.int64])
def test_a_reduction_from_outside(comm, setting, dtype):
    comms = Communicators(comm, 12)
    ownership = distributed(comms)
    chosen = make_reduction(setting, comms, ownership, Vectors(dtype, 2, ("momentum",)))
    how = chosen.reduction
    assert (how.name, chosen.name, dict(chosen.seconds)) == ("ring", setting if setting is not Ring else "Ring", {})
    collective_assert(comm, [list(slot) for slot in how.state_slots()] == [["momentum"]] * 2)
    collective_assert(comm, not any(slot.any() for slot in how.parameter_slots()))
    vector = how.gradient_vector()
    collective_assert(comm, not vector.any())
    vector[:] = np.arange(1000) + comm.rank
    total = how.reduce(np.zeros(3), vector)
    expected = comm.size * np.arange(1000) + comm.size * (comm.size - 1) // 2
    collective_assert(comm, np.array_equal(total, expected))
    how.free()
    comms.free()


@pytest.mark.mpi
@pytest.mark.parametrize("placement", ["root", "sharded"])
def test_a_run_with_a_reduction_from_outside(world, shared_folder, placement):
    data = shared_folder / "data.h5"
    if world.rank == 0:
        make_dataset(shared_folder)
    options = [*TINY, "--train.steps", "4", "--optimizer.placement", placement, "--hierarchy.reduction"]
    assert train_on(world, data, shared_folder / "flat", *options, "flat") == 0
    assert train_on(world, data, shared_folder / "ring", *options, "reductions:Ring") == 0
    good = world.rank or losses(shared_folder / "ring") == pytest.approx(losses(shared_folder / "flat"), abs=1e-4)
    collective_assert(world, good)
    both = [*options, "flat,reductions:Ring"]
    assert train_on(world, data, shared_folder / "either", *both) == 0
    kept = shared_folder / "either" / "reductions.json"
    collective_assert(world, kept.exists() == (world.size > 1))
    chosen = set(json.loads(kept.read_text()).values()) if world.size > 1 else {"flat"}
    collective_assert(world, len(chosen) == 1 and chosen <= {"flat", "reductions:Ring"}, chosen)


@pytest.mark.mpi
def test_a_ring_in_many_chunks(comm, monkeypatch):
    monkeypatch.setattr("hiermpi.communication.reduction.CHUNK_BYTES", 64)
    comms = Communicators(comm, 12)
    make_reduction(Ring, comms, distributed(comms), Vectors()).reduction.free()
    comms.free()


BROKEN = {
    "Unmakeable": "cannot be constructed: ValueError: no ring of these ranks",
    "Incomplete": "has no gradient_vector, parameter_slots, state_slots, exchange,.* derive it from hiermpi.Reduction",
    "Half": r"what reduce\(\) returns is float32 of shape \(500,\), with gaps, not float32 of shape \(1000,\)",
    "Wide": r"what reduce\(\) returns is float64 of shape \(1000,\), not float32",
    "Lazy": r"reduce\(\) gives wrong sums",
    "Stateless": r"state_slots\(\) has \[\], not \['m', 'v'\]",
    "OneSlot": r"parameter_slots\(\) has 1 slots, not 2",
    "Failing": "fails in its first step: AttributeError: 'Failing' object has no attribute 'no_such_thing'",
}
BROKEN_ON_SEVERAL = {
    "Silent": r"broadcast\(\) does not give every rank what the owners have",
    "Deaf": r"exchange\(\) does not give a rank that decides what the owners found",
}


@pytest.mark.mpi
@pytest.mark.parametrize("name", [*BROKEN, *BROKEN_ON_SEVERAL])
@pytest.mark.parametrize("setting", ["reductions:{}", "auto,reductions:{}"])
def test_a_broken_one_is_refused_in_one_sentence(world, name, setting):
    if world.size == 1 and (name not in BROKEN or "auto" in setting):
        pytest.skip("on one rank nothing is timed, and there is nobody to hear")
    comms = Communicators(world, 12)
    with pytest.raises(PluginError, match=(BROKEN | BROKEN_ON_SEVERAL)[name]) as caught:
        make_reduction(setting.format(name), comms, distributed(comms), Vectors(slots=2))
    message = str(caught.value)
    collective_assert(world, message.startswith(f"hierarchy.reduction = reductions:{name}") and "\n" not in message)
    collective_assert(world, caught.value.everywhere)
    comms.free()


@pytest.mark.mpi
@pytest.mark.parametrize("text", ["reductions:Rong", "no_such_module:Ring", "trea"])
def test_a_wrong_name_is_refused_on_every_rank(world, text):
    comms = Communicators(world, 12)
    with pytest.raises(UsageError, match=f"hierarchy.reduction = '?{text}"):
        make_reduction(text, comms, owned_by_root(10), Vectors())
    comms.free()


@pytest.mark.mpi
@pytest.mark.parametrize("setting", ["auto, reductions:Ring", "reductions:Ring,tree", "flat,tree,reductions:unusable"])
def test_a_list_is_timed_together(comm, setting):
    comms = Communicators(comm, 12)
    chosen = make_reduction(setting, comms, owned_by_root(1000), Vectors())
    collective_assert(comm, comm.size == 1 or chosen.name in chosen.seconds)
    expected = set(candidates(setting)) - {"reductions:unusable"} - apart(comms)
    collective_assert(comm, comm.size == 1 or set(chosen.seconds) == expected, chosen.seconds)
    collective_assert(comm, not chosen.reduction.gradient_vector().any())
    chosen.reduction.free()
    comms.free()


def apart(comms):
    """What cannot be tried where no two ranks share memory."""
    return {"shared"} if comms.topology.n_nodes == comms.size else set()


@pytest.mark.mpi
def test_what_is_known_is_taken_only_if_it_is_listed(world):
    comms = Communicators(world, 12)
    known = make_reduction("tree,reductions:Ring", comms, owned_by_root(100), Vectors(), known="reductions:Ring")
    collective_assert(world, isinstance(known.reduction, Ring) and not known.seconds)
    other = make_reduction("tree,flat", comms, owned_by_root(100), Vectors(), known="reductions:Ring")
    collective_assert(world, other.name in ("tree", "flat"))
    comms.free()


def test_lists_keep_their_order():
    assert candidates("auto") == list(REDUCTIONS) == ["shared", "tree", "flat"]
    assert candidates("flat, a.b:C ,auto,,flat") == ["flat", "a.b:C", "shared", "tree"]


def test_a_little_faster_is_not_enough():
    assert preferred({"shared": 1.05, "tree": 1.0, "flat": 2.0}) == "shared"
    assert preferred({"shared": 1.2, "tree": 1.0, "flat": 0.95}) == "tree"
    assert preferred({"tree": 1.2, "flat": 0.95}) == "flat"
