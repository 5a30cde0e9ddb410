"""prepare: what goes in, what is passed over, what is refused before anything is written."""

import numpy as np
import pytest

from hiermpi.cli import parse
from hiermpi.commands.files import run_prepare
from hiermpi.data.tokenizers import tokenizer_from_json
from hiermpi.errors import UsageError, UserError
from hiermpi.preparation import preparing
from hiermpi.preparation.preparing import read_text, symmetry_groups_for
from hiermpi.storage.dataset import open_dataset


def make(folder, *words):
    out = folder / "data.h5"
    assert run_prepare(parse(["prepare", *map(str, words), "--out", str(out)])) == 0
    return open_dataset(out)


def test_folders_are_walked_in_order_and_odd_files_passed_over(tmp_path):
    root = tmp_path / "texts"
    (root / "b").mkdir(parents=True)
    (root / ".hidden").mkdir()
    (root / "a.txt").write_text("A" * 100)
    (root / "b" / "c.txt").write_text("C" * 200)
    (root / "binary").write_bytes(b"x\0y" * 100)
    (root / ".hidden" / "h.txt").write_text("H" * 100)
    data = make(tmp_path, root)
    assert data.length("train") == 90 + 180  # the tail of each of few documents
    assert data.length("val") == 10 + 20
    assert data.counts[ord("A")] == 100
    assert data.counts[ord("H")] == data.counts[0] == 0


def test_many_documents_are_split_whole_and_evenly(tmp_path):
    root = tmp_path / "texts"
    root.mkdir()
    for i in range(200):
        (root / f"{i:03}.txt").write_bytes(bytes([i % 100 + 28]) * 50)
    data = make(tmp_path, root)
    assert data.length("val") == pytest.approx(0.1 * 200 * 50, rel=0.1)
    assert data.length("val") % 50 == 0


def test_characters(tmp_path):
    (tmp_path / "t.txt").write_text("äöü€" * 50)
    data = make(tmp_path, tmp_path / "t.txt", "--tokenizer", "chars")
    assert data.vocab_size == 4
    assert data.length("train") + data.length("val") == 200
    assert data.bytes == 450


def test_force(tmp_path):
    (tmp_path / "t.txt").write_text("text " * 50)
    make(tmp_path, tmp_path / "t.txt")
    with pytest.raises(UsageError, match="--force"):
        make(tmp_path, tmp_path / "t.txt")
    make(tmp_path, tmp_path / "t.txt", "--force")


@pytest.mark.parametrize(
    ("content", "options", "words"),
    [
        (b"", (), "at least 2 of each"),
        (b"x\0y", (), "is binary"),
        (b"caf\xe9 " * 50, ("--tokenizer", "chars"), "is not UTF-8"),
        (b"caf\xe9 " * 50, ("--tokenizer", "bpe"), "is not UTF-8"),
        (b"text " * 50, ("--tokenizer", "bpe", "--vocab-size", "256"), "expected 257"),
        (b"", ("--tokenizer", "bpe"), "hold no text"),
        (b"text " * 50, ("--tokenizer-of", "t.txt"), "t.txt"),
        (b"text " * 50, ("--val-fraction", "0"), "--val-fraction 0"),
        (b"text " * 50, ("--symmetry-order", "0"), "--symmetry-order 0"),
        (b"text " * 50, ("--vocab-size", "9"), "--vocab-size"),
    ],
)
def test_refusals_leave_nothing(tmp_path, content, options, words):
    (tmp_path / "t.txt").write_bytes(content)
    with pytest.raises(UserError) as caught:
        make(tmp_path, tmp_path / "t.txt", *options)
    assert words in str(caught.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["t.txt"]


def test_frequency_symmetry_weighs_groups_alike():
    counts = np.random.default_rng(0).zipf(1.2, 5000).clip(max=10_000)
    groups = symmetry_groups_for("frequency", counts, 12)
    weights = np.bincount(groups, weights=counts, minlength=12)
    assert weights.max() / weights.min() < 1.01
    modulo = symmetry_groups_for("modulo", counts, 12)
    assert (modulo == np.arange(5000) % 12).all()


def test_bpe_ids_are_sorted_by_frequency(tmp_path):
    text = "".join(f"the cat {i % 7} sat on the mat, the {i % 13} times\n" for i in range(400))
    (tmp_path / "t.txt").write_text(text)
    data = make(tmp_path, tmp_path / "t.txt", "--tokenizer", "bpe", "--vocab-size", "300")
    assert 257 < data.vocab_size <= 300
    assert (np.diff(data.counts) <= 0).all()
    assert data.counts.sum() == data.length("train") + data.length("val")
    tokenizer = tokenizer_from_json(data.tokenizer)
    ids = data.read("train", np.array([0]), data.length("train"))[0]
    assert text.encode().startswith(tokenizer.decode(ids))
    assert len(ids) < len(tokenizer.decode(ids)) / 2
    assert tokenizer.encode("ä😀 unseen".encode()).max() < data.vocab_size


def test_bpe_is_the_same_every_time(tmp_path):
    (tmp_path / "t.txt").write_text("".join(f"{i * i} words and {i} numbers\n" for i in range(2000)))
    options = ("--tokenizer", "bpe", "--vocab-size", "400", "--force")
    assert make(tmp_path, tmp_path / "t.txt", *options).sha256 == make(tmp_path, tmp_path / "t.txt", *options).sha256


def test_the_tokenizer_of_another_dataset(tmp_path):
    (tmp_path / "t.txt").write_text("abcabcabd " * 100)
    first = make(tmp_path, tmp_path / "t.txt", "--tokenizer", "bpe", "--vocab-size", "270")
    first.path.rename(tmp_path / "first.h5")
    (tmp_path / "u.txt").write_text("abdabd " * 100)
    second = make(tmp_path, tmp_path / "u.txt", "--tokenizer-of", tmp_path / "first.h5")
    assert second.tokenizer == first.tokenizer
    assert tokenizer_from_json(second.tokenizer).decode(second.read("val", np.array([0]), 5)[0]) in b"abdabd " * 9


def test_a_file_that_vanishes_leaves_nothing(tmp_path, monkeypatch):
    root = tmp_path / "texts"
    root.mkdir()
    for name in ("a", "b"):
        (root / name).write_text("text " * 100)

    def vanish(documents, what):
        yield from read_text(documents, what)
        (root / "b").unlink()

    monkeypatch.setattr(preparing, "read_text", vanish)
    with pytest.raises(UserError, match=r"cannot read .*b: No such file"):
        make(tmp_path, root, "--tokenizer", "chars")
    assert [entry.name for entry in tmp_path.iterdir()] == ["texts"]
