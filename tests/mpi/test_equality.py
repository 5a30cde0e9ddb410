"""One rank and N ranks train the same model, whatever the routing, the coordinators, the reduction, the placement."""

import itertools
import os

import numpy as np
import pytest
from collective import collective_assert
from mpi4py import MPI

from hiermpi.communication.waiting import Waiter
from runs import TEXT, TINY, last_checkpoint, losses, make_dataset, train_on

pytestmark = [pytest.mark.mpi, pytest.mark.timeout(600)]

SETTINGS = ("hierarchy.routing", "hierarchy.coordinators", "hierarchy.reduction", "optimizer.placement")
COMBINATIONS = list(
    itertools.product(
        ("balanced", "dominant", "lift"),
        ("compute", "dedicated"),
        ("tree", "shared", "flat"),
        ("root", "sharded"),
    )
)

REDUCTION_OF = [0, 1, 2, 1, 2, 0, 2, 0, 1]
COORDINATORS_OF = [0, 1, 0, 0, 1, 1, 1, 0, 1]
PLACEMENT_OF = [1, 0, 1, 1, 1, 0, 0, 0, 1]
"""Three rows for each routing; together they meet every pair of values (a test below counts)."""


def chosen_combinations():
    """All of them for ``make test-matrix``, else nine that together meet every pair of values.

    With an even number of ranks the coordinators are the other way round; a few do on many ranks.
    """
    if os.environ.get("HIERMPI_TEST_MATRIX") == "all":
        return COMBINATIONS
    size = MPI.COMM_WORLD.size
    chosen = pairwise(size % 2)
    return chosen[:3] if size > 30 else chosen


def pairwise(turn):
    columns = (tuple(dict.fromkeys(column)) for column in zip(*COMBINATIONS, strict=True))
    routings, modes, reductions, placements = columns
    return [
        (
            routings[i // 3],
            modes[(COORDINATORS_OF[i] + turn) % 2],
            reductions[REDUCTION_OF[i]],
            placements[PLACEMENT_OF[i]],
        )
        for i in range(9)
    ]


def test_the_chosen_combinations_meet_every_pair():
    for turn in (0, 1):
        rows = pairwise(turn)
        for a, b in itertools.combinations(range(4), 2):
            assert {(row[a], row[b]) for row in rows} == {(row[a], row[b]) for row in COMBINATIONS}


def reference(world, data, run, *options):
    """A run on one rank, while the others wait."""
    if world.rank == 0:
        assert train_on(MPI.COMM_SELF, data, run, *options) == 0
    Waiter().wait(world.Ibarrier())


def require_equal(comm, run, expected):
    """Per-step losses within 1e-5 relative, parameters within 1e-4. Collective over ``comm``."""
    good, message = True, ""
    if comm.rank == 0:
        good = np.allclose(losses(run), losses(expected), rtol=1e-5, atol=0)
        message = "losses differ"
        ours, theirs = last_checkpoint(run).parameters, last_checkpoint(expected).parameters
        for name, tensor in ours.items():
            difference = np.abs(tensor - theirs[name]).max()
            if difference > 1e-4:
                good, message = False, f"{name} differs by {difference}"
    collective_assert(comm, good, message)


@pytest.mark.smoke
def test_any_number_of_ranks_trains_the_same_model(world, shared_folder):
    data = shared_folder / "data.h5"
    if world.rank == 0:
        make_dataset(shared_folder)
    reference(world, data, shared_folder / "one", *TINY)
    for index, values in enumerate(chosen_combinations()):
        run = shared_folder / f"run-{index}"
        flags = [word for name, value in zip(SETTINGS, values, strict=True) for word in (f"--{name}", value)]
        code = train_on(world, data, run, *TINY, *flags)
        collective_assert(world, code == 0, f"{values} ended with {code}")
        require_equal(world, run, shared_folder / "one")


def test_micro_batches_and_dropout_do_not_depend_on_ranks(world, shared_folder):
    data = shared_folder / "data.h5"
    if world.rank == 0:
        make_dataset(shared_folder)
    options = [*TINY, "--train.steps", "8", "--model.dropout", "0.2"]
    reference(world, data, shared_folder / "one", *options)
    collective_assert(world, train_on(world, data, shared_folder / "n", *options, "--train.micro_batch_size", 2) == 0)
    require_equal(world, shared_folder / "n", shared_folder / "one")


def test_a_starved_group_is_exact(world, shared_folder):
    data = shared_folder / "data.h5"
    if world.rank == 0:
        make_dataset(shared_folder, "a" * 5000)
    reference(world, data, shared_folder / "one", *TINY)
    options = [*TINY, "--hierarchy.routing", "dominant"]
    collective_assert(world, train_on(world, data, shared_folder / "n", *options) == 0)
    require_equal(world, shared_folder / "n", shared_folder / "one")


def test_fewer_sequences_than_ranks(world, shared_folder):
    data = shared_folder / "data.h5"
    if world.rank == 0:
        make_dataset(shared_folder, TEXT)
    options = [*TINY, "--train.batch_size", "2", "--train.steps", "5"]
    reference(world, data, shared_folder / "one", *options)
    collective_assert(world, train_on(world, data, shared_folder / "n", *options) == 0)
    require_equal(world, shared_folder / "n", shared_folder / "one")


@pytest.mark.parametrize("coordinators", ["compute", "dedicated"])
@pytest.mark.parametrize("kind", ["tree", "shared", "flat"])
def test_a_model_so_small_that_a_control_rank_owns_nothing(world, shared_folder, kind, coordinators):
    data = shared_folder / "data.h5"
    if world.rank == 0:
        make_dataset(shared_folder, "".join("ab\n"[i * i % 7 % 3] for i in range(9000)), "--tokenizer", "chars")
    small = ("--model.n_layer", "1", "--model.n_head", "1", "--model.n_embd", "4", "--model.context_length", "8")
    options = [*TINY, *small, "--train.steps", "5"]
    reference(world, data, shared_folder / "one", *options)
    flags = ["--hierarchy.reduction", kind, "--hierarchy.coordinators", coordinators]
    collective_assert(world, train_on(world, data, shared_folder / "n", *options, *flags) == 0)
    require_equal(world, shared_folder / "n", shared_folder / "one")
