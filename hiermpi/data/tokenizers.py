"""Tokenizers: bytes to token ids and back."""

import json
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from hiermpi.data.bpe import BpeTokenizer
from hiermpi.errors import DamagedFile, UserError

MOST_CHARACTERS = 0x110000


class Tokenizer(Protocol):
    """A map between text and token ids."""

    kind: str
    vocab_size: int

    def encode(self, text: bytes) -> NDArray[np.uint32]:
        """Token ids of a UTF-8 text (of any bytes, for ``bytes``). Raises UserError."""

    def decode(self, ids: NDArray[np.integer] | Sequence[int]) -> bytes:
        """The text of token ids."""

    def to_json(self) -> str:
        """What :func:`tokenizer_from_json` reads."""


class BytesTokenizer:
    """Every byte is a token."""

    kind = "bytes"
    vocab_size = 256

    def encode(self, text: bytes) -> NDArray[np.uint32]:
        return np.frombuffer(text, np.uint8).astype(np.uint32)

    def decode(self, ids: NDArray[np.integer] | Sequence[int]) -> bytes:
        return np.asarray(ids).astype(np.uint8).tobytes()

    def to_json(self) -> str:
        return json.dumps({"kind": self.kind})


class CharsTokenizer:
    """Every character of the corpus is a token, in the order of code points.

    Args:
        characters: sorted and distinct.
    """

    kind = "chars"

    def __init__(self, characters: str) -> None:
        self.characters = characters
        self.vocab_size = len(characters)
        self._points = code_points(characters)

    def encode(self, text: bytes) -> NDArray[np.uint32]:
        points = code_points(text.decode())
        ids = np.searchsorted(self._points, points)
        unknown = self._points[np.minimum(ids, self.vocab_size - 1)] != points
        if unknown.any():
            character = chr(int(points[unknown.argmax()]))
            raise UserError(f"the character {character!r} is not in the vocabulary: use only what the corpus has")
        return ids.astype(np.uint32)

    def decode(self, ids: NDArray[np.integer] | Sequence[int]) -> bytes:
        return "".join(self.characters[i] for i in ids).encode()

    def to_json(self) -> str:
        return json.dumps({"kind": self.kind, "characters": self.characters})


class NoTokenizer:
    """Stands where a model came without one: its token ids mean what the data says.

    Args:
        vocab_size: of the model.
    """

    kind = "none"

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def encode(self, text: bytes) -> NDArray[np.uint32]:
        raise UserError("the model came without a tokenizer: import it again with its tokenizer.json beside it")

    def decode(self, ids: NDArray[np.integer] | Sequence[int]) -> bytes:
        return "".join(f"{i} " for i in ids).encode()

    def to_json(self) -> str:
        return json.dumps({"kind": self.kind, "vocab_size": self.vocab_size})


def code_points(text: str) -> NDArray[np.uint32]:
    """The code points of ``text``."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def tokenizer_from_json(text: str) -> Tokenizer:
    """The tokenizer that :meth:`Tokenizer.to_json` described. Raises DamagedFile."""
    try:
        described = json.loads(text)
        kind = described["kind"]
        if kind == "bytes":
            return BytesTokenizer()
        if kind == "chars":
            characters = described["characters"]
            points = code_points(characters)
            if len(points) and (np.diff(points.astype(np.int64)) > 0).all() and len(points) <= MOST_CHARACTERS:
                return CharsTokenizer(characters)
        if kind == "bpe":
            return BpeTokenizer(described["vocabulary"], described["merges"])
        if kind == "none" and isinstance(described["vocab_size"], int):
            return NoTokenizer(described["vocab_size"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise DamagedFile("the tokenizer of the file is not one that this hiermpi knows: prepare the data again")
