"""Who turns text into token ids: this process, or all ranks of a launch with the same result."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hiermpi.data.tokenizers import Tokenizer, tokenizer_from_json
from hiermpi.errors import UserError

if TYPE_CHECKING:
    from mpi4py import MPI


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
