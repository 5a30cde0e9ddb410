"""Token ids on their way into a dataset."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hiermpi.data.tokenizers import Tokenizer
from hiermpi.preparation.encoding import Encoder
from hiermpi.storage.dataset import SPLITS, token_dtype

BYTES_AT_ONCE = 1 << 20
"""For each rank."""
REMAP_BLOCK = 1 << 22


class Spool:
    """One raw file of ids per split, and what is to be known of them.

    Args:
        folder: for the files.
        tokenizer: of the corpus.
        encoder: does the work.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer, encoder: Encoder) -> None:
        self.tokenizer = tokenizer
        self.encoder = encoder
        self.dtype = token_dtype(tokenizer.vocab_size)
        self.paths = {split: folder / f"{split}.tokens" for split in SPLITS}
        self.counts = np.zeros(tokenizer.vocab_size, np.int64)
        self.bytes = dict.fromkeys(SPLITS, 0)
        self.tokens = dict.fromkeys(SPLITS, 0)
        self._files = {split: open(path, "wb") for split, path in self.paths.items()}  # noqa: SIM115
        self._pending: dict[str, list[bytes]] = {split: [] for split in SPLITS}
        self._pending_bytes = dict.fromkeys(SPLITS, 0)

    def add(self, split: str, text: bytes) -> None:
        """Add text to a split."""
        self.bytes[split] += len(text)
        self._pending[split].append(text)
        self._pending_bytes[split] += len(text)
        if self._pending_bytes[split] >= self.encoder.n_ranks * BYTES_AT_ONCE:
            self._flush(split)

    def finish(self) -> None:
        """Have everything in the files."""
        for split, file in self._files.items():
            self._flush(split)
            file.flush()

    def renumber(self, order: NDArray[np.integer]) -> None:
        """Give the id ``i`` to what had the id ``order[i]``; after :meth:`finish`."""
        new = np.empty(len(order), self.dtype)
        new[order] = np.arange(len(order), dtype=self.dtype)
        self.counts = self.counts[order]
        for split, path in self.paths.items():
            if self.tokens[split]:
                ids = np.memmap(path, self.dtype, "r+")
                for start in range(0, len(ids), REMAP_BLOCK):
                    ids[start : start + REMAP_BLOCK] = new[ids[start : start + REMAP_BLOCK]]
                ids.flush()

    def _flush(self, split: str) -> None:
        texts, self._pending[split], self._pending_bytes[split] = self._pending[split], [], 0
        if texts:
            ids = self.encoder.encode(self.tokenizer, texts)
            self.counts += np.bincount(ids, minlength=len(self.counts))
            self.tokens[split] += len(ids)
            self._files[split].write(ids.astype(self.dtype).tobytes())

    def __enter__(self) -> "Spool":
        return self

    def __exit__(self, *exception: object) -> None:
        for file in self._files.values():
            file.close()
