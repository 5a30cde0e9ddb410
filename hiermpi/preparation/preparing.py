"""The functions behind ``hiermpi prepare`` and :func:`hiermpi.prepare` turn text into one dataset."""

import heapq
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hiermpi.data.documents import Document, Split, blocks, character_start, fault, find_documents, size_of
from hiermpi.data.tokenizers import (
    FEWEST_BPE_TOKENS,
    BytesTokenizer,
    CharsTokenizer,
    Tokenizer,
    load_library,
    tokenizer_from_json,
    train_bpe,
)
from hiermpi.errors import UsageError, UserError
from hiermpi.files import file_errors, require_new
from hiermpi.progress import ProgressBar
from hiermpi.storage.dataset import SPLITS, DatasetContent, token_dtype, write_dataset

FEWEST_TOKENS = 2
BPE_TOKENS = 8192
BYTES_AT_ONCE = 1 << 20
"""The size in bytes of the text that each rank encodes in one exchange."""
REMAP_BLOCK = 1 << 22

logger = logging.getLogger("hiermpi")


@dataclass(frozen=True)
class Preparation:
    """The arguments of a preparation."""

    sources: Sequence[str]
    out: Path
    tokenizer: str = "bytes"
    vocab_size: int | None = None
    tokenizer_of: Path | None = None
    val_fraction: float = 0.1
    symmetry: str = "modulo"
    symmetry_order: int = 12
    reader: Any = None
    force: bool = False


@dataclass(frozen=True)
class Prepared:
    """The result of a preparation."""

    path: Path
    tokenizer: str
    """The kind of the tokenizer."""
    vocab_size: int
    tokens: dict[str, int]
    """The number of tokens in each split, ``train`` and ``val``."""
    bytes: dict[str, int]
    """The size of the text of each split in bytes."""


def prepare(
    sources: Sequence[str] | str,
    out: Path | str,
    *,
    tokenizer: str = "bytes",
    vocab_size: int | None = None,
    tokenizer_of: Path | str | None = None,
    val_fraction: float = 0.1,
    symmetry: str = "modulo",
    symmetry_order: int = 12,
    reader: Any = None,
    force: bool = False,
) -> Prepared:
    """Make a dataset of text, in this process.

    Args:
        sources: Text files, folders, or the word ``stdlib``.
        out: The dataset to make.
        tokenizer: The kind of the tokenizer: ``bytes``, ``chars`` or ``bpe``.
        vocab_size: The size of the ``bpe`` vocabulary; by default 8192.
        tokenizer_of: A dataset or checkpoint whose tokenizer is to be used.
        val_fraction: The share of the text for validation.
        symmetry: The way in which token ids get their symmetry class: ``modulo`` or ``frequency``.
        symmetry_order: The number of symmetry classes.
        reader: A reader of the user's own, as a text or an object.
        force: Whether an existing file is replaced.

    Raises:
        UserError: The sources or the arguments are wrong; no file is left behind.
    """
    sources = [sources] if isinstance(sources, str) else list(sources)
    other = Path(tokenizer_of) if tokenizer_of is not None else None
    wanted = Preparation(
        sources, Path(out), tokenizer, vocab_size, other, val_fraction, symmetry, symmetry_order, reader, force
    )
    return prepare_with(wanted, Encoder())


class Encoder:
    """An encoder that works in this process."""

    n_ranks = 1

    def encode(self, tokenizer: Tokenizer, texts: Sequence[bytes]) -> NDArray[np.uint32]:
        """Return the token ids of all ``texts``, each of which is encoded by itself."""
        return encode_each(tokenizer, texts)

    def close(self) -> None:
        """End the encoding; nothing is encoded after this call."""


class TeamEncoder(Encoder):
    """An encoder that works on all ranks: rank 0 asks, and the others :meth:`serve` until it closes.

    Args:
        world: The communicator of all ranks.
    """

    def __init__(self, world: "MPI.Comm") -> None:
        from hiermpi.communication.waiting import Waiter

        self.world = world
        self.n_ranks = world.size
        self._waiter = Waiter()
        self._told = ""
        self._tokenizer: Tokenizer | None = None

    def encode(self, tokenizer: Tokenizer, texts: Sequence[bytes]) -> NDArray[np.uint32]:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the ranks are the parallelism
        described = tokenizer.to_json() if tokenizer is not self._tokenizer else ""
        self._tokenizer = tokenizer
        ids = self._round(texts, described)
        assert ids is not None
        return ids

    def close(self) -> None:
        from hiermpi.communication.scatter import deal_texts

        deal_texts(self.world, None, self._waiter)

    def serve(self) -> None:
        """Encode what rank 0 distributes, until it closes. Every rank but 0 calls this."""
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        while self._round(None, "") is not None:
            pass

    def _round(self, texts: Sequence[bytes] | None, described: str) -> NDArray[np.uint32] | None:
        """Do one collective exchange; an error on any rank is raised at rank 0 after all ranks have completed it."""
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
    """Return the token ids of ``texts`` in one array, text after text."""
    return np.concatenate([np.empty(0, np.uint32), *(tokenizer.encode(text) for text in texts)])


class Spool:
    """A raw file of token ids for each split, with the counts that a dataset needs.

    Args:
        folder: The folder for the files.
        tokenizer: The tokenizer of the corpus.
        encoder: The encoder that computes the ids.
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
        """Encode the rest of the text and write it to the files."""
        for split, file in self._files.items():
            self._flush(split)
            file.flush()

    def renumber(self, order: NDArray[np.integer]) -> None:
        """Give the id ``i`` to the tokens that had the id ``order[i]``; this follows :meth:`finish`."""
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


def prepare_with(wanted: Preparation, encoder: Encoder) -> Prepared:
    """Make the dataset with ids that ``encoder`` computes. Raises UserError."""
    check(wanted)
    out = wanted.out
    given = stored_tokenizer(wanted.tokenizer_of) if wanted.tokenizer_of else None
    decodable = (given.kind if given else wanted.tokenizer) != "bytes"
    documents = find_text(wanted, decodable)
    with (
        file_errors(out.parent, "write into"),
        tempfile.TemporaryDirectory(dir=out.parent, prefix=".hiermpi-") as folder,
    ):
        tokenizer = given or make_tokenizer(wanted, documents)
        with Spool(Path(folder), tokenizer, encoder) as spool:
            fill(spool, documents, wanted.val_fraction)
            if tokenizer.kind == "bpe" and given is None:
                order = np.argsort(-spool.counts, kind="stable")
                spool.renumber(order)
                tokenizer = tokenizer.renumbered(order)  # type: ignore[attr-defined]
        require_text(spool, wanted)
        content = DatasetContent(
            tokenizer.vocab_size,
            wanted.symmetry_order,
            symmetry_groups_for(wanted.symmetry, spool.counts, wanted.symmetry_order),
            spool.counts,
            tokenizer.to_json(),
            wanted.sources,
            spool.bytes,
        )
        write_dataset(out, content, spool.paths)
    return Prepared(out, tokenizer.kind, tokenizer.vocab_size, dict(spool.tokens), dict(spool.bytes))


def check(wanted: Preparation) -> None:
    """Refuse what can be refused before any work. Raises UserError."""
    if wanted.vocab_size is not None and wanted.tokenizer != "bpe":
        raise UsageError(f"--vocab-size is for --tokenizer bpe: {wanted.tokenizer} finds its own")
    if wanted.vocab_size is not None and not FEWEST_BPE_TOKENS <= wanted.vocab_size <= 1 << 24:
        raise UsageError(
            f"--vocab-size {wanted.vocab_size}: expected {FEWEST_BPE_TOKENS} (256 bytes and a merge) to {1 << 24}"
        )
    if wanted.tokenizer == "bpe":
        load_library()
    if not 0.0 < wanted.val_fraction <= 0.5:
        raise UsageError(f"--val-fraction {wanted.val_fraction}: expected more than 0 and at most 0.5")
    if not 1 <= wanted.symmetry_order <= 255:
        raise UsageError(f"--symmetry-order {wanted.symmetry_order}: expected 1 to 255")
    if wanted.tokenizer not in ("bytes", "chars", "bpe"):
        raise UsageError(f"--tokenizer {wanted.tokenizer}: expected bytes, chars or bpe")
    require_new(wanted.out, wanted.force)


def stored_tokenizer(path: Path) -> Tokenizer:
    """Read the tokenizer of a dataset or checkpoint. Raises UserError."""
    from hiermpi.storage.checkpoint import load_checkpoint
    from hiermpi.storage.container import kind_of
    from hiermpi.storage.dataset import open_dataset

    if kind_of(path) == "dataset":
        with_tokenizer = open_dataset(path)
        with_tokenizer.close()
        return tokenizer_from_json(with_tokenizer.tokenizer)
    return tokenizer_from_json(load_checkpoint(path, with_state=False).tokenizer)


def find_text(wanted: Preparation, decodable: bool) -> list[Document]:
    """Return the documents that hold text. Raises UserError for a source without text that the user named itself.

    Other files without text are skipped and counted.
    """
    kept, passed = [], 0
    for document in find_documents(wanted.sources, wanted.reader):
        wrong = fault(document, decodable)
        if wrong and document.named:
            raise UserError(f"{document.name} {wrong}: name text files")
        passed += bool(wrong)
        if not wrong:
            kept.append(document)
    if passed:
        logger.info("passed over %d files that are not text", passed)
    return kept


def make_tokenizer(wanted: Preparation, documents: list[Document]) -> Tokenizer:
    """Make the tokenizer that the command line asks for; it learns from the corpus. Raises UserError."""
    if wanted.tokenizer == "bytes":
        return BytesTokenizer()
    if not any(size_of(document) for document in documents):
        raise UserError("the sources hold no text: name others")
    if wanted.tokenizer == "bpe":
        return train_bpe(read_text(documents, "learning the vocabulary"), wanted.vocab_size or BPE_TOKENS)
    characters: set[str] = set()
    for text in read_text(documents, "collecting characters"):
        characters.update(text)
    return CharsTokenizer("".join(sorted(characters)))


def read_text(documents: list[Document], what: str) -> Iterator[str]:
    """Yield all text block by block, and show the progress."""
    with ProgressBar(what, sum(size_of(document) for document in documents), in_bytes=True) as bar:
        for document in documents:
            for block in blocks(document):
                try:
                    yield block.decode()
                except UnicodeDecodeError:
                    raise UserError(f"{document.name} has changed while it was read: try again") from None
                bar.advance(len(block))


def fill(spool: Spool, documents: list[Document], val_fraction: float) -> None:
    """Encode all documents into ``spool``, each part into its split.

    Args:
        spool: The files of token ids.
        documents: The documents of the corpus.
        val_fraction: The share of the text for validation.
    """
    sizes = [size_of(document) for document in documents]
    split = Split(len(documents), val_fraction)
    with ProgressBar("encoding", sum(sizes), in_bytes=True) as bar:
        for document, size in zip(documents, sizes, strict=True):
            place = split.cut(size)
            if spool.tokenizer.kind != "bytes" and 0 < place < size:
                place = character_start(document, place)
            for name, (start, stop) in zip(SPLITS, ((0, place), (place, size)), strict=True):
                for block in blocks(document, start, stop):
                    spool.add(name, block)
                    bar.advance(len(block))
        spool.finish()


def require_text(spool: Spool, wanted: Preparation) -> None:
    """Refuse a corpus with too little text for both splits. Raises UserError."""
    for split in SPLITS:
        if spool.tokens[split] < FEWEST_TOKENS:
            raise UserError(
                f"the sources give {spool.tokens['train']} tokens for training and {spool.tokens['val']} for "
                f"validation at --val-fraction {wanted.val_fraction:g}: at least {FEWEST_TOKENS} of each are "
                "needed, name more text"
            )


def symmetry_groups_for(kind: str, counts: NDArray[np.int64], order: int) -> NDArray[np.uint8]:
    """Return the (V,) symmetry class of each token id.

    With ``modulo`` the class is the id modulo the order. With ``frequency`` ids come by decreasing frequency, and each
    goes to the class with the least weight so far, so that all classes carry about the same share of the corpus.

    Args:
        kind: The way of the assignment, ``modulo`` or ``frequency``.
        counts: (V,) The frequency of each token id.
        order: The number of classes.
    """
    if kind == "modulo":
        return (np.arange(len(counts)) % order).astype(np.uint8)
    groups = np.empty(len(counts), np.uint8)
    lightest = [(0, 0, group) for group in range(order)]  # (weight, members, class)
    for token in np.argsort(-counts, kind="stable"):
        weight, members, group = heapq.heappop(lightest)
        groups[token] = group
        heapq.heappush(lightest, (weight + int(counts[token]), members + 1, group))
    return groups


if TYPE_CHECKING:
    from mpi4py import MPI
