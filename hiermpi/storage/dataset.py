"""Datasets hold the token ids of a corpus, with the symmetry class and the frequency of each id."""

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hiermpi.data.tokenizers import tokenizer_from_json
from hiermpi.errors import DamagedFile
from hiermpi.storage.container import Reader, open_container, write_streamed

import h5py  # isort: skip

SPLITS = ("train", "val")
IN_MEMORY_LIMIT = 1 << 30
"""The largest split, in bytes, that is kept in memory; larger ones are read slice by slice."""
BLOCK = 1 << 22
CHUNK = 1 << 19


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the smallest stored type that holds every token id."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


@dataclass(frozen=True)
class DatasetContent:
    """The content of a dataset besides the tokens."""

    vocab_size: int
    symmetry_order: int
    symmetry_group: NDArray[np.uint8]
    counts: NDArray[np.int64]
    tokenizer: str
    sources: Sequence[str]
    split_bytes: dict[str, int]
    """The size of the text of each split in bytes."""


def write_dataset(path: Path, content: DatasetContent, spools: dict[str, Path]) -> None:
    """Write a dataset from one file of raw :func:`token_dtype` tokens per split.

    Args:
        path: The dataset to make.
        content: Everything in the dataset besides the tokens.
        spools: The files of raw tokens by split.

    Raises:
        UserError: The dataset cannot be written.
    """
    dtype = token_dtype(content.vocab_size)

    def fill(file: h5py.File) -> None:
        for split in SPLITS:
            tokens = np.memmap(spools[split], dtype, "r")
            chunk = max(1, min(CHUNK, len(tokens)))
            target = file.create_dataset(f"{split}/tokens", tokens.shape, dtype, chunks=(chunk,))
            for start in range(0, len(tokens), BLOCK):
                target[start : start + BLOCK] = tokens[start : start + BLOCK]
        file.create_dataset("symmetry_group", data=content.symmetry_group.astype(np.uint8))
        file.create_dataset("counts", data=content.counts.astype(np.int64))
        file.attrs["vocab_size"] = content.vocab_size
        file.attrs["symmetry_order"] = content.symmetry_order
        file.attrs["tokenizer"] = content.tokenizer
        file.attrs["sources"] = json.dumps(list(content.sources))
        file.attrs["bytes"] = sum(content.split_bytes.values())
        for split in SPLITS:
            file.attrs[f"{split}_bytes"] = content.split_bytes[split]

    size = sum(spools[split].stat().st_size for split in SPLITS) + 9 * content.vocab_size + len(content.tokenizer)
    write_streamed(path, "dataset", fill, size + 2 * CHUNK * dtype.itemsize)


class TokenDataset:
    """A dataset that was checked and is open for reading.

    Attributes:
        path: The path of the file.
        sha256: The hex digest of the content, which identifies it.
        vocab_size: The number of token ids, V.
        symmetry_order: The number of symmetry classes.
        tokenizer: The tokenizer as JSON.
        sources: The names of the sources as JSON.
        bytes: The size of the whole text in bytes.
        train_bytes: The size of the training text in bytes.
        val_bytes: The size of the validation text in bytes.
        symmetry_group: (V,) The class of each token id.
        counts: (V,) The frequency of each token id in the corpus.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stack = ExitStack()
        try:
            reader = self._reader = self._stack.enter_context(open_container(path, "dataset"))
            self.sha256 = reader.sha256
            self.vocab_size = reader.integer("vocab_size")
            self.symmetry_order = reader.integer("symmetry_order")
            self.tokenizer = reader.text("tokenizer")
            self.sources = reader.text("sources")
            self.bytes = reader.integer("bytes")
            self.train_bytes = reader.integer("train_bytes")
            self.val_bytes = reader.integer("val_bytes")
            self.symmetry_group = reader.array("symmetry_group", ("uint8",), 1)
            self.counts = reader.array("counts", ("int64",), 1)
            self._tokens: dict[str, NDArray | h5py.Dataset] = {
                split: reader.dataset(f"{split}/tokens", ("uint16", "uint32"), 1) for split in SPLITS
            }
            self._keep_small_splits()
            self._check(reader)
        except BaseException:
            self._stack.close()
            raise

    def length(self, split: str) -> int:
        """Return the number of tokens in ``split``."""
        return len(self._tokens[split])

    def read(self, split: str, starts: NDArray[np.int64], length: int) -> NDArray[np.int32]:
        """Read token ids of a split.

        Args:
            split: The name of the split.
            starts: The index of the first token of each sequence.
            length: The number of tokens in a sequence.

        Returns:
            The token ids, of shape (len(starts), length).
        """
        tokens = self._tokens[split]
        if isinstance(tokens, np.ndarray):
            return np.lib.stride_tricks.sliding_window_view(tokens, length)[starts].astype(np.int32)
        rows = [self._block(tokens, start, start + length) for start in starts]
        return np.array(rows, np.int32).reshape(len(starts), length)

    def in_memory(self, split: str) -> NDArray[np.unsignedinteger] | None:
        """Return all token ids of ``split`` as they are stored, or None where they are not held in memory."""
        tokens = self._tokens[split]
        return tokens if isinstance(tokens, np.ndarray) else None

    @property
    def kept_bytes(self) -> int:
        """The size in bytes of the tokens that are held in memory."""
        return sum(tokens.nbytes for tokens in self._tokens.values() if isinstance(tokens, np.ndarray))

    def close(self) -> None:
        """Close the file."""
        self._stack.close()

    def _block(self, tokens: NDArray | h5py.Dataset, start: int, stop: int) -> NDArray:
        return tokens[start:stop] if isinstance(tokens, np.ndarray) else self._reader.block(tokens, start, stop)

    def _check(self, reader: Reader) -> None:
        size = self.vocab_size
        if not 1 <= size < 1 << 31 or self.symmetry_order < 1:
            raise reader.refuse(f"vocab_size = {size} and symmetry_order = {self.symmetry_order} are not usable")
        if len(self.symmetry_group) != size or len(self.counts) != size:
            raise reader.refuse(f"/symmetry_group and /counts must have vocab_size = {size} entries")
        if (self.symmetry_group >= self.symmetry_order).any() or (self.counts < 0).any():
            raise reader.refuse("/symmetry_group or /counts has an entry out of range")
        try:
            tokenizer = tokenizer_from_json(self.tokenizer)
        except DamagedFile as error:
            raise DamagedFile(f"{self.path}: {error}") from None
        if tokenizer.vocab_size != size:
            raise reader.refuse(f"the tokenizer does not have vocab_size = {size} tokens")
        for split, tokens in self._tokens.items():
            for start in range(0, len(tokens), BLOCK):
                block = self._block(tokens, start, start + BLOCK)
                if len(block) and block.max() >= size:
                    offset = int((block >= size).argmax())
                    raise DamagedFile(
                        f"{self.path}: token {start + offset} of {split} is {block[offset]}, "
                        f"but vocab_size is {size}: make it again"
                    )

    def _keep_small_splits(self) -> None:
        for split, tokens in self._tokens.items():
            if tokens.nbytes <= IN_MEMORY_LIMIT:
                self._tokens[split] = self._reader.block(tokens, 0, len(tokens))
        if all(isinstance(tokens, np.ndarray) for tokens in self._tokens.values()):
            self._stack.close()


def open_dataset(path: Path) -> TokenDataset:
    """Open and check the dataset at ``path``. Raises UserError, DamagedFile."""
    return TokenDataset(Path(path))
