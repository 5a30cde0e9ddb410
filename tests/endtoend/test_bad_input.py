"""Users' mistakes: one sentence, no traceback, a non-zero code, on every rank, soon."""

import numpy as np
import pytest
from launch import run

from runs import TINY, make_dataset

LIMIT = 15
RANKS = 3


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data"))


def require_one_sentence(result, code, *words):
    """Exit ``code`` and one line of ours that holds ``words``; the launcher's banner is not ours."""
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    ours = [line for line in result.stderr.splitlines() if line.startswith("hiermpi: ")]
    assert len(ours) == 1, result.stderr
    for word in words:
        assert word in ours[0], ours[0]


def train(data, folder, *options):
    return run("train", "--data", data, "--run", folder / "run", *TINY, *options, ranks=RANKS, timeout=LIMIT)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--train.batchsize", "3"), ("--train.batchsize", "did you mean", "--train.batch_size")),
        (("--train.batch_size", "0"), ("--train.batch_size", "at least 1")),
        (("--train.steps", "ten"), ("--train.steps", "whole number")),
        (("--model.n_embd", "50"), ("n_embd = 50", "n_head = 4", "48 or 52")),
        (("--model.symmetry_order", "7"), ("model.symmetry_order = 7", "12")),
        (("--model.vocab_size", "9"), ("model.vocab_size = 9", "256")),
        (("--model.context_length", "1000000"), ("context",)),
        (("--run.min_ranks", "9"), ("run.min_ranks = 9", "3 ranks")),
        (("--run.threads_per_rank", "999"), ("run.threads_per_rank = 999", "cores")),
    ],
)
def test_wrong_settings(data, tmp_path, options, words):
    require_one_sentence(train(data, tmp_path, *options), 2, *words)
    assert not (tmp_path / "run").exists()


def test_a_misspelt_key_in_a_file(data, tmp_path):
    (tmp_path / "run.toml").write_text("[train]\nstep = 3\n")
    result = train(data, tmp_path, "--config", tmp_path / "run.toml")
    require_one_sentence(result, 2, "run.toml", "train.step", "train.steps")


def test_a_missing_dataset(tmp_path):
    require_one_sentence(train(tmp_path / "none.h5", tmp_path), 1, "none.h5")


def test_a_text_file_as_dataset(tmp_path):
    (tmp_path / "text.h5").write_text("not a dataset\n" * 200)
    require_one_sentence(train(tmp_path / "text.h5", tmp_path), 1, "text.h5")


def test_a_truncated_dataset(data, tmp_path):
    (tmp_path / "short.h5").write_bytes(data.read_bytes()[:-1000])
    require_one_sentence(train(tmp_path / "short.h5", tmp_path), 1, "short.h5")


def test_a_flipped_bit(data, tmp_path):
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "flipped.h5").write_bytes(content)
    require_one_sentence(train(tmp_path / "flipped.h5", tmp_path), 1, "flipped.h5")


def test_a_run_folder_that_is_a_file(data, tmp_path):
    (tmp_path / "run").write_text("x")
    result = train(data, tmp_path)
    assert result.returncode in (1, 2)
    require_one_sentence(result, result.returncode, str(tmp_path / "run"))


def test_a_corpus_shorter_than_one_context(tmp_path):
    data = make_dataset(tmp_path, "ab" * 17)
    require_one_sentence(train(data, tmp_path), 2, "33", "context_length")


def test_prepare_refuses_what_is_not_there(tmp_path):
    result = run("prepare", tmp_path / "none", "--out", tmp_path / "data.h5")
    require_one_sentence(result, result.returncode, "none")
    assert not (tmp_path / "data.h5").exists()


@pytest.mark.parametrize("argv", [[], ["fly"], ["train"], ["train", "--data"], ["plan", "--ranks", "0"]])
def test_wrong_command_lines(argv):
    require_one_sentence(run(*argv), 2)


def test_evaluate_without_a_checkpoint(data, tmp_path):
    for ranks in (0, 2):
        result = run("evaluate", tmp_path, "--data", data, ranks=ranks)
        require_one_sentence(result, 1, str(tmp_path), "checkpoint")


def test_a_token_beyond_the_vocabulary(tmp_path):
    """A dataset whose digest is right and whose content is not."""
    from hiermpi.storage.container import build_image, open_container, write_image

    data = make_dataset(tmp_path)

    def fill(out):
        with open_container(data, "dataset") as good:
            for name in ("train/tokens", "val/tokens", "symmetry_group", "counts"):
                values = good.file[name][:]
                if name == "train/tokens":
                    values[1234] = 256
                out.create_dataset(name, data=values, chunks=good.file[name].chunks)
            for name, value in good.file.attrs.items():
                out.attrs[name] = value

    bad = tmp_path / "bad.h5"
    write_image(bad, build_image("dataset", fill))
    assert np.fromfile(bad, np.uint8).size
    require_one_sentence(train(bad, tmp_path), 1, "bad.h5", "1234", "256")
