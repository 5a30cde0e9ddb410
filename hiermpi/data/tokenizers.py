"""Tokenizers turn bytes into token ids and back.

Byte-level byte pair encoding is that of GPT-2 (Sennrich, Haddow and Birch, arXiv 1508.07909; Radford et al. 2019). The
``tokenizers`` library (extra ``bpe``) does the merging. It is imported only where text is encoded; decoding needs no
library.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hiermpi.data.documents import cut_place
from hiermpi.errors import DamagedFile, UserError

if TYPE_CHECKING:
    import tokenizers

MOST_CHARACTERS = 0x110000
FEWEST_BPE_TOKENS = 257
LONGEST_TOKEN = 64
"""The most bytes of a learned token: a token is a word, not a line of dashes."""
PIECE_BYTES = 1 << 14
"""The most bytes that are encoded at once."""


class Tokenizer(Protocol):
    """A tokenizer maps text to token ids and back."""

    kind: str
    vocab_size: int

    def encode(self, text: bytes) -> NDArray[np.uint32]:
        """Return the (n,) token ids of a UTF-8 text (for ``bytes``, of any bytes). Raises UserError."""

    def decode(self, ids: NDArray[np.integer] | Sequence[int]) -> bytes:
        """Return the text of token ids."""

    def to_json(self) -> str:
        """Return the description that :func:`tokenizer_from_json` reads."""


class BytesTokenizer:
    """A tokenizer for which every byte is a token."""

    kind = "bytes"
    vocab_size = 256

    def encode(self, text: bytes) -> NDArray[np.uint32]:
        return np.frombuffer(text, np.uint8).astype(np.uint32)

    def decode(self, ids: NDArray[np.integer] | Sequence[int]) -> bytes:
        return np.asarray(ids).astype(np.uint8).tobytes()

    def to_json(self) -> str:
        return json.dumps({"kind": self.kind})


class CharsTokenizer:
    """A tokenizer for which every character of the corpus is a token, in the order of code points.

    Args:
        characters: The characters, sorted and distinct.
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
    """A placeholder for a model that was imported without a tokenizer: it decodes ids as numbers and encodes nothing.

    Args:
        vocab_size: The vocabulary size of the model.
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


def byte_alphabet() -> str:
    """Return the 256 printable characters that stand for the bytes in GPT-2's vocabularies."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return "".join(chr(byte if byte in printable else next(others)) for byte in range(256))


BYTE_OF = {character: byte for byte, character in enumerate(byte_alphabet())}


class BpeTokenizer:
    """A tokenizer with byte-level byte pair encoding.

    Args:
        vocabulary: The token of each id; each byte is written as its character of :func:`byte_alphabet`.
        merges: Pairs of tokens, in the order in which they are merged.

    Raises:
        ValueError: The vocabulary or a merge is not valid.
    """

    kind = "bpe"

    def __init__(self, vocabulary: Sequence[str], merges: Sequence[Sequence[str]]) -> None:
        known = set(vocabulary)
        if len(known) != len(vocabulary) or "" in known or not known.issuperset(BYTE_OF):
            raise ValueError("the vocabulary lacks a byte, or has a token twice")
        if not all(isinstance(token, str) and BYTE_OF.keys() >= set(token) for token in vocabulary):
            raise ValueError("the vocabulary has a token that is not a text of bytes")
        if not all(len(pair) == 2 and {*pair, "".join(pair)} <= known for pair in merges):
            raise ValueError("a merge is not of two tokens that make a third")
        self.vocabulary = list(vocabulary)
        self.merges = [(left, right) for left, right in merges]
        self.vocab_size = len(vocabulary)

    def encode(self, text: bytes) -> NDArray[np.uint32]:
        pieces = [piece.decode() for piece in pieces_of(text)]
        found = self._library.encode_batch_fast(pieces, add_special_tokens=False)
        return np.concatenate([np.array(piece.ids, np.uint32) for piece in found] or [np.empty(0, np.uint32)])

    def decode(self, ids: NDArray[np.integer] | Sequence[int]) -> bytes:
        return b"".join(self._bytes[i] for i in ids)

    def to_json(self) -> str:
        return json.dumps({"kind": self.kind, "vocabulary": self.vocabulary, "merges": self.merges})

    def renumbered(self, order: Sequence[int]) -> "BpeTokenizer":
        """Return the same tokenizer with other ids: the token with the id ``order[i]`` gets the id ``i``."""
        return BpeTokenizer([self.vocabulary[i] for i in order], self.merges)

    @cached_property
    def _bytes(self) -> list[bytes]:
        return [bytes(BYTE_OF[character] for character in token) for token in self.vocabulary]

    @cached_property
    def _library(self) -> "tokenizers.Tokenizer":
        library = load_library()
        ids = {token: index for index, token in enumerate(self.vocabulary)}
        built = library.Tokenizer(library.models.BPE(vocab=ids, merges=self.merges))
        built.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
        return built


def train_bpe(texts: Iterable[str], vocab_size: int) -> BpeTokenizer:
    """Learn a vocabulary of ``vocab_size`` tokens, in the order of their merges.

    It is smaller where the texts do not give so many tokens. The library counts words on
    all cores that this process may use.
    """
    library = load_library()
    learner = library.Tokenizer(library.models.BPE())
    learner.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=LONGEST_TOKEN,
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    model = json.loads(learner.to_str())["model"]
    merges = [tuple(pair.split(" ")) if isinstance(pair, str) else pair for pair in model["merges"]]
    return BpeTokenizer(sorted(model["vocab"], key=model["vocab"].__getitem__), merges)


def load_library() -> Any:
    """Return the ``tokenizers`` library. Raises UserError where it is missing."""
    try:
        import tokenizers
    except ImportError:
        raise UserError("bpe needs the tokenizers library: pip install 'hiermpi[bpe]'") from None
    return tokenizers


def pieces_of(text: bytes) -> Iterator[bytes]:
    """Yield ``text`` in pieces of at most :data:`PIECE_BYTES` bytes, cut where :func:`cut_place` says."""
    start = 0
    while start < len(text):
        piece = text[start : start + PIECE_BYTES]
        if start + len(piece) < len(text):
            piece = piece[: cut_place(piece)]
        start += len(piece)
        yield piece


def code_points(text: str) -> NDArray[np.uint32]:
    """Return the (n,) code points of ``text``."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def tokenizer_from_json(text: str) -> Tokenizer:
    """Return the tokenizer that :meth:`Tokenizer.to_json` described. Raises DamagedFile."""
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
