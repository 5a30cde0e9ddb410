"""Stop and go on: the same bits on the same ranks, the same model on any other number."""

import signal
import threading
import time

import numpy as np
import pytest
from collective import collective_assert
from mpi4py import MPI

from hiermpi.communication.waiting import Waiter
from hiermpi.errors import EXIT_STOPPED, UsageError
from hiermpi.storage.run_folder import RunFolder
from runs import TINY, last_checkpoint, losses, make_dataset, train_on

pytestmark = [pytest.mark.mpi, pytest.mark.timeout(300)]

OPTIONS = (*TINY, "--model.dropout", "0.1")


@pytest.fixture
def folder(world, shared_folder):
    """A folder with data and an uninterrupted run of 20 steps, ``whole``."""
    if world.rank == 0:
        make_dataset(shared_folder)
    Waiter().wait(world.Ibarrier())
    assert train_on(world, shared_folder / "data.h5", shared_folder / "whole", *OPTIONS) == 0
    return shared_folder


@pytest.fixture(autouse=True)
def signals():
    """Give the signals back after a run took them."""
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def tensors_of(checkpoint, part):
    return checkpoint.parameters if part == "parameters" else checkpoint.state[part]


def require_same_bits(world, a, b):
    good, message = True, ""
    if world.rank == 0:
        one, two = last_checkpoint(a), last_checkpoint(b)
        good = losses(a) == losses(b)
        message = f"losses differ: {losses(a)} {losses(b)}"
        for part in ("parameters", "m", "v"):
            for name, tensor in tensors_of(one, part).items():
                if not np.array_equal(tensor, tensors_of(two, part)[name]):
                    good, message = False, f"{part} {name} differs"
        good = good and (one.step, one.cursor, one.adam_count) == (two.step, two.cursor, two.adam_count)
    collective_assert(world, good, message)


@pytest.mark.parametrize("reduction", ["shared", "tree"])
def test_by_count(world, folder, reduction):
    """With moments at their owners on both sides of the stop: where they lie changes no bit of a sum in memory."""
    data, run, whole = folder / "data.h5", folder / "cut", folder / "whole"
    options = (*OPTIONS, "--optimizer.placement", "sharded", "--hierarchy.reduction", reduction)
    if reduction == "tree":
        whole = folder / "tree"
        assert train_on(world, data, whole, *options) == 0
    assert train_on(world, data, run, *options, "--train.steps", "10") == 0
    assert train_on(world, data, run, *options) == 0
    require_same_bits(world, run, whole)


def test_into_another_placement(world, folder):
    data, run = folder / "data.h5", folder / "cut"
    for steps, placement in ((6, "sharded"), (13, "root"), (20, "sharded")):
        assert train_on(world, data, run, *OPTIONS, "--train.steps", steps, "--optimizer.placement", placement) == 0
    require_same_bits(world, run, folder / "whole")


@pytest.mark.parametrize("which", ["first", "last"])
def test_by_signal_on_one_rank(world, folder, which):
    data, run = folder / "data.h5", folder / "cut"
    rank = 0 if which == "first" else world.size - 1
    fault = {"HIERMPI_FAULT": f"signal:rank={rank}:step=10:phase=scatter"}
    code = train_on(world, data, run, *OPTIONS, environment=fault)
    collective_assert(world, code == EXIT_STOPPED, f"exit code {code}")
    collective_assert(world, world.rank or last_checkpoint(run).step == 10, "another step")
    collective_assert(world, not RunFolder(run).is_done())
    assert train_on(world, data, run, *OPTIONS) == 0
    require_same_bits(world, run, folder / "whole")


SLOWLY = {"HIERMPI_FAULT": ",".join(f"slow:step={step}:seconds=0.4:phase=batch" for step in range(4, 21))}


def stop_and_go_on(world, folder, reason, printed, *options):
    """Require that a slow run stops in the middle for ``reason``, and then goes on to the uninterrupted run's bits."""
    data, run = folder / "data.h5", folder / "cut"
    code = train_on(world, data, run, *OPTIONS, *options, environment=SLOWLY)
    collective_assert(world, code == EXIT_STOPPED, f"exit code {code}")
    if world.rank == 0:
        out = printed.readouterr()
        assert reason in out.out + out.err
        assert 0 < last_checkpoint(run).step < 20
        assert not RunFolder(run).is_done()
        assert not (run / "STOP").exists()
    Waiter().wait(world.Ibarrier())
    assert train_on(world, data, run, *OPTIONS) == 0
    require_same_bits(world, run, folder / "whole")


def test_by_stop_file(world, folder, capfd):
    """The file is made by somebody else while the run is at work."""
    stop = folder / "cut" / "STOP"

    def touch_when_it_runs():
        while not (folder / "cut" / "metrics.jsonl").exists():
            time.sleep(0.02)
        stop.touch()

    if world.rank == 0:
        threading.Thread(target=touch_when_it_runs, daemon=True).start()
    stop_and_go_on(world, folder, "the STOP file", capfd)


def test_by_time_limit(world, folder, capfd):
    stop_and_go_on(world, folder, "run.time_limit", capfd, "--run.time_limit", "1.5")


def test_a_signal_during_evaluation(world, folder):
    data, run = folder / "data.h5", folder / "cut"
    fault = {"HIERMPI_FAULT": f"signal:rank={world.size - 1}:step=10:phase=evaluate"}
    options = [*OPTIONS, "--train.eval_interval", "10"]
    code = train_on(world, data, run, *options, environment=fault)
    collective_assert(world, code == EXIT_STOPPED, f"exit code {code}")
    assert train_on(world, data, run, *OPTIONS) == 0
    require_same_bits(world, run, folder / "whole")


def test_on_another_number_of_ranks(world, folder):
    data, run = folder / "data.h5", folder / "cut"
    if world.rank == 0:
        assert train_on(MPI.COMM_SELF, data, run, *OPTIONS, "--train.steps", "10") == 0
    Waiter().wait(world.Ibarrier())
    assert train_on(world, data, run, *OPTIONS) == 0
    good = True
    if world.rank == 0:
        one, two = last_checkpoint(run).parameters, last_checkpoint(folder / "whole").parameters
        good = all(np.abs(one[name] - two[name]).max() < 1e-4 for name in one)
    collective_assert(world, good)


def test_done_runs_say_so_and_reopen(world, folder):
    data, run = folder / "data.h5", folder / "whole"
    before = RunFolder(run).read_metrics() if world.rank == 0 else None
    assert train_on(world, data, run, *OPTIONS) == 0
    collective_assert(world, world.rank or RunFolder(run).read_metrics() == before)
    assert train_on(world, data, run, *OPTIONS, "--train.steps", "23") == 0
    collective_assert(world, world.rank or (len(losses(run)) == 23 and RunFolder(run).is_done()))


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--model.n_layer", "3"), "model.n_layer = 3, but the run was started with 2"),
        (("--train.batch_size", "25"), "train.batch_size = 25, but the run was started with 24"),
        (("--train.seed", "1"), "train.seed = 1, but the run was started with 1337"),
    ],
)
def test_another_run_is_refused_on_every_rank(world, folder, flags, sentence):
    with pytest.raises(UsageError) as caught:
        train_on(world, folder / "data.h5", folder / "whole", *OPTIONS, "--train.steps", "30", *flags)
    collective_assert(world, sentence in str(caught.value), caught.value)
    collective_assert(world, RunFolder(folder / "whole").is_done(), "the refused command changed the run")


def test_another_dataset_is_refused(world, folder):
    other = folder / "other"
    if world.rank == 0:
        other.mkdir()
        make_dataset(other, "another text " * 900)
    Waiter().wait(world.Ibarrier())
    with pytest.raises(UsageError, match="name the same dataset"):
        train_on(world, other / "data.h5", folder / "whole", *OPTIONS, "--train.steps", "30")


def test_resume_from_a_named_checkpoint(world, folder):
    data, run = folder / "data.h5", folder / "named"
    assert train_on(world, data, run, *OPTIONS, "--checkpoint.interval", "5", "--checkpoint.keep_last", "9") == 0
    path = run / "checkpoints" / "step-00000005.h5"
    assert train_on(world, data, run, *OPTIONS, "--resume", path) == 0
    require_same_bits(world, run, folder / "whole")
    aside = run / "checkpoints" / "step-00000020.h5.superseded"
    collective_assert(world, aside.exists(), "the checkpoint beyond the resumed step is gone")


def test_start_again_in_the_same_folder(world, folder):
    run = folder / "whole"
    options = (*OPTIONS, "--resume", "none", "--train.steps", "3")
    before = losses(run) if world.rank == 0 else []
    assert train_on(world, folder / "data.h5", run, *options) == 0
    good = world.rank or (losses(run) == before[:3] and last_checkpoint(run).step == 3)
    collective_assert(world, good)
    collective_assert(world, (run / "metrics.jsonl.superseded").exists())


def test_a_nan_is_skipped_and_named(world, folder):
    run = folder / "nan"
    fault = {"HIERMPI_FAULT": f"nan:rank={world.size - 1}:step=3:tensor=1"}
    assert train_on(world, folder / "data.h5", run, *OPTIONS, environment=fault) == 0
    good, message = True, ""
    if world.rank == 0:
        rows, saved = RunFolder(run).read_metrics(), last_checkpoint(run)
        good = rows[2].get("skipped") is True and not any(row.get("skipped") for row in rows[3:])
        good = good and all(np.isfinite(tensor).all() for tensor in saved.parameters.values())
        good = good and (saved.step, saved.adam_count, saved.skipped_steps) == (20, 19, 1)
        message = str(rows[2])
    collective_assert(world, good, message)
