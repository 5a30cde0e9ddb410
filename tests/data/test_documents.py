"""Documents: pieces at good places, faults found block by block."""

import pytest

from hiermpi.data import documents
from hiermpi.data.documents import Split, blocks, character_start, cut_place, fault
from hiermpi.data.text import TextFile
from hiermpi.errors import UserError

TEXT = "aé€😀" * 20


@pytest.fixture
def document(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "BLOCK", 7)
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return TextFile(path, True)


def test_blocks_cut_between_characters(document):
    found = list(blocks(document))
    assert "".join(block.decode() for block in found) == TEXT
    assert max(map(len, found)) <= 7
    assert b"".join(blocks(document, 3, 20)) == TEXT.encode()[3:20]
    document.path.write_bytes(b"\x80" * 23)
    assert b"".join(blocks(document)) == b"\x80" * 23


def test_cuts_where_a_line_starts_near_the_end():
    assert cut_place(b"x" * 90 + b"\n\n  y\nword word") == 96
    assert cut_place(b"\nword" + b"x" * 90) == 95


def test_every_character_start(document):
    starts = {0}
    for character in TEXT:
        starts.add(max(starts) + len(character.encode()))
    for place in range(len(TEXT.encode())):
        assert character_start(document, place) == max(start for start in starts if start <= place)


@pytest.mark.parametrize(
    ("content", "decodable", "wrong"),
    [
        (TEXT.encode(), True, ""),
        (b"x" * 30 + b"\xe9" + b"y" * 30, True, "is not UTF-8 (byte 30)"),
        (b"x" * 30 + b"\xe9" + b"y" * 30, False, ""),
        ("x€".encode()[:-1], True, "is not UTF-8 (byte 1)"),
        (b"text\0", False, "is binary"),
        (b"", True, ""),
    ],
)
def test_faults(document, content, decodable, wrong):
    document.path.write_bytes(content)
    assert fault(document, decodable) == wrong


def test_a_file_that_shrinks_is_named(document):
    with pytest.raises(UserError, match="has changed while it was read"):
        list(blocks(document, 0, 10_000))


def test_split_of_many_documents_is_even():
    split = Split(1000, 0.1)
    places = [split.cut(50) for _ in range(1000)]
    assert places.count(0) == 100
    assert Split(3, 0.25).cut(100) == 75
