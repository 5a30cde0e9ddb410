"""hierarchy.reproducible: the parameters' digest is that of one rank, whatever the ranks, the modes and the stops."""

import itertools
import logging
import os
import re

import numpy as np
import pytest
from collective import collective_assert
from mpi4py import MPI

from hiermpi.communication.agreement import broadcast_object
from hiermpi.communication.communicators import Communicators
from hiermpi.communication.waiting import Waiter
from hiermpi.config.schema import ModelConfig
from hiermpi.errors import UserError
from hiermpi.model.gpt2 import gpt2_specs
from hiermpi.storage.checkpoint import parameters_digest
from hiermpi.training import assembly
from runs import TINY, last_checkpoint, losses, make_dataset, train_on

pytestmark = [pytest.mark.mpi, pytest.mark.timeout(600)]

OPTIONS = (*TINY, "--hierarchy.reproducible", "true", "--model.dropout", "0.1", "--train.micro_batch_size", "2")
SETTINGS = ("hierarchy.routing", "hierarchy.reduction", "hierarchy.coordinators", "optimizer.placement")
MODES = list(
    itertools.product(
        ("balanced", "dominant", "lift"),
        ("tree", "shared", "flat"),
        ("compute", "dedicated"),
        ("root", "sharded"),
    )
)


def chosen_runs():
    """(ranks, mode): all modes for ``make test-matrix``, else four that meet every value.

    64 ranks also stand for fewer.
    """
    size = MPI.COMM_WORLD.size
    if os.environ.get("HIERMPI_TEST_MATRIX") == "all":
        return [(size, mode) for mode in MODES]
    if size < 64:
        return [(size, MODES[index]) for index in (1, 6, 23, 29)]
    return [(64, MODES[5]), (14, MODES[33]), (26, MODES[14]), (27, MODES[27])]


def outcome(run):
    """What must not differ: the parameters' digest, the losses and the validation."""
    return parameters_digest(last_checkpoint(run)), losses(run)


@pytest.fixture
def alone(world, shared_folder):
    """The dataset, and the outcome of a run on one rank."""
    found = None
    if world.rank == 0:
        data = make_dataset(shared_folder)
        assert train_on(MPI.COMM_SELF, data, shared_folder / "alone", *OPTIONS) == 0
        found = outcome(shared_folder / "alone")
    return shared_folder / "data.h5", broadcast_object(world, found, Waiter())


@pytest.mark.smoke
def test_same_bits_in_every_mode(world, shared_folder, alone):
    data, expected = alone
    for ranks, mode in chosen_runs():
        run = shared_folder / "-".join((str(ranks), *mode))
        flags = [word for name, value in zip(SETTINGS, mode, strict=True) for word in (f"--{name}", value)]
        some = world.Split(0 if world.rank < ranks else MPI.UNDEFINED, world.rank)
        code = 0
        if some != MPI.COMM_NULL:
            code = train_on(some, data, run, *OPTIONS, *flags)
            some.Free()
        collective_assert(world, code == 0)
        collective_assert(world, world.rank or outcome(run) == expected, run.name)


def test_same_bits_after_a_resume_on_other_ranks(world, shared_folder, alone):
    data, expected = alone
    run, schedule = shared_folder / "resumed", ("--optimizer.decay_steps", "20")
    assert train_on(world, data, run, *OPTIONS, *schedule, "--train.steps", "7") == 0
    good = True
    if world.rank == 0:
        assert train_on(MPI.COMM_SELF, data, run, *OPTIONS, *schedule) == 0
        good = outcome(run) == expected
    collective_assert(world, good)


class Lines(logging.Handler):
    """Keeps the lines of the log."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


@pytest.fixture
def lines():
    handler = Lines()
    logging.getLogger("hiermpi").addHandler(handler)
    yield handler.lines
    logging.getLogger("hiermpi").removeHandler(handler)


@pytest.mark.parametrize("reduction", ["shared", "tree", "flat"])
def test_a_bad_gradient_is_named_and_skipped_alike(world, shared_folder, alone, lines, reduction):
    data, _ = alone
    rank = world.size - 1
    fault = {"HIERMPI_FAULT": f"nan:rank={rank}:step=3:tensor=2"}
    options = (*OPTIONS, "--train.steps", "5", "--hierarchy.reduction", reduction)
    code = train_on(world, data, shared_folder / "bad", *options, environment=fault)
    collective_assert(world, code == 0)
    if world.rank == 0:
        saved = last_checkpoint(shared_folder / "bad")
        name = gpt2_specs(ModelConfig(vocab_size=256, n_layer=2))[2].name
        told = [line for line in lines if "skipped" in line]
        assert len(told) == 1, lines
        where = r"sequences \d+" if world.size <= 13 else r"(sequences \d+|no sequence)"  # there are 24 of them
        assert re.search(rf"step 3\b.*\brank {rank}\b.*{re.escape(name)} in {where}", told[0]), told
        assert (saved.skipped_steps, saved.adam_count) == (1, 4)
        assert all(np.isfinite(tensor).all() for tensor in saved.parameters.values())


def test_unequal_processors_are_named(world, monkeypatch):
    monkeypatch.setattr(assembly, "arithmetic", lambda: "avx2 kernels" if world.rank == 1 else "avx512 kernels")
    comms = Communicators(world, 12)
    if world.size > 1:
        with pytest.raises(UserError, match="rank 0 computes with avx512 kernels, rank 1 with avx2 kernels"):
            assembly.require_one_kind(comms)
    else:
        assembly.require_one_kind(comms)
    comms.free()
