"""Text to tokens and back."""

import numpy as np
import pytest

from hiermpi.data.tokenizers import BytesTokenizer, CharsTokenizer, tokenizer_from_json
from hiermpi.errors import DamagedFile, UserError

TEXT = "Grüße, 世界! \U0001f600 done\n"


@pytest.mark.parametrize("tokenizer", [BytesTokenizer(), CharsTokenizer("".join(sorted(set(TEXT))))])
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
    ["", "[]", "{}", '{"kind": "magic"}', '{"kind": "chars"}', '{"kind": "chars", "characters": "ba"}', "[" * 9999],
)
def test_malformed_descriptions_are_refused(text):
    with pytest.raises(DamagedFile, match="prepare the data again"):
        tokenizer_from_json(text)
