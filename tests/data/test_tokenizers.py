"""Text to tokens and back."""

import json

import numpy as np
import pytest

from hiermpi.data.tokenizers import (
    BytesTokenizer,
    CharsTokenizer,
    byte_alphabet,
    pieces_of,
    tokenizer_from_json,
    train_bpe,
)
from hiermpi.errors import DamagedFile, UserError

TEXT = "Grüße, 世界! \U0001f600 done\n"


BPE = train_bpe([TEXT * 3], 270)


@pytest.mark.parametrize("tokenizer", [BytesTokenizer(), CharsTokenizer("".join(sorted(set(TEXT)))), BPE])
def test_round_trip(tokenizer):
    ids = tokenizer.encode(TEXT.encode())
    assert ids.max() < tokenizer.vocab_size
    assert tokenizer.decode(ids) == TEXT.encode()
    again = tokenizer_from_json(tokenizer.to_json())
    assert np.array_equal(again.encode(TEXT.encode()), ids)
    assert again.vocab_size == tokenizer.vocab_size


def test_characters_are_numbered_by_code_point():
    assert CharsTokenizer("abc").encode(b"cab").tolist() == [2, 0, 1]


def test_an_unknown_character_is_named():
    with pytest.raises(UserError, match="'z'"):
        CharsTokenizer("abc").encode(b"abz")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "[" * 9999,
        '{"kind": "magic"}',
        '{"kind": "chars"}',
        '{"kind": "chars", "characters": "ba"}',
        '{"kind": "bpe", "vocabulary": ["a"], "merges": []}',
        '{"kind": "bpe", "vocabulary": 7, "merges": []}',
        json.dumps({"kind": "bpe", "vocabulary": list(byte_alphabet()), "merges": [["a", "b"]]}),
        json.dumps({"kind": "bpe", "vocabulary": [*byte_alphabet(), "ab", "ab"], "merges": []}),
        json.dumps({"kind": "bpe", "vocabulary": [*byte_alphabet(), "a b"], "merges": []}),
        json.dumps({"kind": "bpe", "vocabulary": [*byte_alphabet(), ["ab"]], "merges": []}),
    ],
)
def test_malformed_descriptions_are_refused(text):
    with pytest.raises(DamagedFile, match="prepare the data again"):
        tokenizer_from_json(text)


def test_bpe_numbers_do_not_change_the_tokens():
    ids = BPE.encode(TEXT.encode())
    order = np.random.default_rng(0).permutation(BPE.vocab_size)
    again = BPE.renumbered(order)
    assert np.array_equal(order[again.encode(TEXT.encode())], ids)
    assert again.decode(again.encode(TEXT.encode())) == TEXT.encode()


def test_pieces_are_whole():
    text = ("word " * 50 + "\n  indented ä\n" + "line\n") * 500
    parts = list(pieces_of(text.encode()))
    assert "".join(part.decode() for part in parts) == text
    assert len(parts) > 5
