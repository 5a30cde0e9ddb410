"""Text to token ids, by this process or by all ranks of a launch with the same result, on their way into a dataset."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hiermpi.data.tokenizers import Tokenizer, tokenizer_from_json
from hiermpi.errors import UserError
from hiermpi.storage.dataset import SPLITS, token_dtype

if TYPE_CHECKING:
    from mpi4py import MPI

BYTES_AT_ONCE = 1 << 20
"""For each rank."""
REMAP_BLOCK = 1 << 22


class Encoder:
    """Encodes in this process."""

    n_ranks = 1

    def encode(self, tokenizer: Tokenizer, texts: Sequence[bytes]) -> NDArray[np.uint32]:
        """The token ids of all ``texts``, each encoded by itself."""
        return encode_each(tokenizer, texts)

    def close(self) -> None:
        """Nothing more will be encoded."""


class TeamEncoder(Encoder):
    """Encodes on all ranks: rank 0 asks, the others :meth:`serve` until it closes.

    Args:
        world: of all ranks.
    """

    def __init__(self, world: "MPI.Comm") -> None:
        from hiermpi.communication.waiting import Waiter

        self.world = world
        self.n_ranks = world.size
        self._waiter = Waiter()
        self._told = ""
        self._tokenizer: Tokenizer | None = None

    def encode(self, tokenizer: Tokenizer, texts: Sequence[bytes]) -> NDArray[np.uint32]:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # ranks are the parallelism
        described = tokenizer.to_json() if tokenizer is not self._tokenizer else ""
        self._tokenizer = tokenizer
        ids = self._round(texts, described)
        assert ids is not None
        return ids

    def close(self) -> None:
        from hiermpi.communication.scatter import deal_texts

        deal_texts(self.world, None, self._waiter)

    def serve(self) -> None:
        """Encode what rank 0 deals out, until it closes. On every rank but 0."""
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        while self._round(None, "") is not None:
            pass

    def _round(self, texts: Sequence[bytes] | None, described: str) -> NDArray[np.uint32] | None:
        """One collective exchange; an error of any rank is raised at rank 0 when all are through it."""
        from hiermpi.communication.agreement import broadcast_object, gather_arrays, gather_objects
        from hiermpi.communication.scatter import deal_texts

        mine = deal_texts(self.world, texts, self._waiter)
        if mine is None:
            return None
        described = broadcast_object(self.world, described, self._waiter)
        ids, error = np.empty(0, np.uint32), ""
        try:
            if described and self.world.rank != 0:
                self._tokenizer = tokenizer_from_json(described)
            assert self._tokenizer is not None
            ids = encode_each(self._tokenizer, mine)
        except Exception as caught:  # noqa: BLE001  (raised at rank 0)
            error = str(caught) if isinstance(caught, UserError) else f"{type(caught).__name__}: {caught}"
        errors = gather_objects(self.world, error, self._waiter)
        collected = gather_arrays(self.world, ids, self._waiter)
        for rank, text in enumerate(errors or ()):
            if text:
                raise UserError(f"rank {rank} cannot encode: {text}" if rank else text)
        return ids if collected is None else collected[0]


def encode_each(tokenizer: Tokenizer, texts: Sequence[bytes]) -> NDArray[np.uint32]:
    """The token ids of ``texts``, one after another."""
    return np.concatenate([np.empty(0, np.uint32), *(tokenizer.encode(text) for text in texts)])


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
