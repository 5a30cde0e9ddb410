"""prepare: what goes in, what is passed over, what is refused before anything is written."""

import numpy as np
import pytest

from hiermpi.cli import parse
from hiermpi.commands import prepare
from hiermpi.errors import UsageError, UserError
from hiermpi.preparation import blocks, symmetry_groups_for
from hiermpi.storage.dataset import open_dataset


def make(folder, *words):
    out = folder / "data.h5"
    assert prepare.run(parse(["prepare", *map(str, words), "--out", str(out)])) == 0
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
        (b"text " * 50, ("--tokenizer", "bpe"), "bpe"),
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


def test_blocks_cut_between_characters(monkeypatch):
    monkeypatch.setattr("hiermpi.preparation.BLOCK", 5)
    text = "aé€😀" * 20
    parts = list(blocks(text.encode()))
    assert b"".join(parts) == text.encode()
    assert "".join(part.decode() for part in parts) == text
    assert b"".join(blocks(b"\x80" * 23)) == b"\x80" * 23
