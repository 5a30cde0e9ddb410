"""Two slots of parameters and moments: the same model to the last bit, and what is not committed leaves no trace."""

import numpy as np
import pytest
from collective import collective_assert

from hiermpi.training import opening
from hiermpi.training.trainer import Trainer
from runs import TINY, last_checkpoint, losses, make_dataset, train_on

pytestmark = [pytest.mark.mpi, pytest.mark.timeout(300)]
STEPS = 6
WAYS = [("tree", "sharded"), ("shared", "root"), ("shared", "sharded"), ("flat", "root")]


class LostError(Exception):
    """Somebody did not live to commit the step."""


@pytest.fixture(autouse=True)
def nothing_is_refused(monkeypatch):
    monkeypatch.setattr(opening, "refuse_unavailable", lambda _: None)


def state_of(trainer):
    """Copies of what this rank holds of the model's state."""
    optimizer = trainer.rank.optimizer
    moments = [] if optimizer is None else [optimizer.updates, *(v.copy() for v in optimizer.state.values())]
    return [trainer.progress.step, trainer.model.parameters.vector.copy(), *moments]


def same(one, other):
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def runs_are_equal(folder, name, other):
    ours, theirs = last_checkpoint(folder / name), last_checkpoint(folder / other)
    assert ours.state.keys() == theirs.state.keys() == {"m", "v"}
    pairs = [(ours.parameters, theirs.parameters), *((ours.state[name], theirs.state[name]) for name in ours.state)]
    arrays = all(np.array_equal(one[key], two[key]) for one, two in pairs for key in one)
    return arrays and losses(folder / name) == losses(folder / other) and ours.adam_count == theirs.adam_count


@pytest.mark.parametrize(("reduction", "placement"), WAYS)
def test_a_step_that_is_not_committed_can_be_done_again(world, shared_folder, monkeypatch, reduction, placement):
    data = shared_folder / "data.h5"
    if world.rank == 0:
        make_dataset(shared_folder)
    options = [*TINY, "--train.steps", STEPS, "--hierarchy.reduction", reduction, "--optimizer.placement", placement]
    shrink = ["--run.on_failure", "shrink"]
    collective_assert(world, train_on(world, data, shared_folder / "one", *options) == 0)
    collective_assert(world, train_on(world, data, shared_folder / "two", *options, *shrink) == 0)

    step, commit = Trainer.step, Trainer._commit
    left_alone, written = [], []

    def lose(trainer, *arguments):
        raise LostError

    def stumble(trainer):
        if trainer.progress.step in (0, 3):
            before = state_of(trainer)
            monkeypatch.setattr(Trainer, "_commit", lose)
            with pytest.raises(LostError):
                step(trainer)
            monkeypatch.setattr(Trainer, "_commit", commit)
            left_alone.append(same(before, state_of(trainer)))
            written.append(not np.array_equal(trainer.model.parameters.next, trainer.model.parameters.vector))
        return step(trainer)

    monkeypatch.setattr(Trainer, "step", stumble)
    collective_assert(world, train_on(world, data, shared_folder / "again", *options, *shrink) == 0)
    collective_assert(world, left_alone == written == [True, True], (left_alone, written))
    if world.rank == 0:
        assert runs_are_equal(shared_folder, "two", "one")
        assert runs_are_equal(shared_folder, "again", "one")
