"""Text files into one dataset."""

import argparse
import heapq
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hiermpi.data.bpe import FEWEST_TOKENS as FEWEST_BPE_TOKENS
from hiermpi.data.bpe import load_library, train_bpe
from hiermpi.data.corpus import Document, Split, find_documents
from hiermpi.data.tokenizers import BytesTokenizer, CharsTokenizer, Tokenizer, tokenizer_from_json
from hiermpi.errors import UsageError, UserError
from hiermpi.files import require_new, told
from hiermpi.preparation.encoding import Encoder
from hiermpi.preparation.spool import Spool
from hiermpi.progress import ProgressBar
from hiermpi.storage.dataset import SPLITS, DatasetContent, write_dataset

FEWEST_TOKENS = 2
BPE_TOKENS = 8192

logger = logging.getLogger("hiermpi")


def prepare(arguments: argparse.Namespace, encoder: Encoder) -> str:
    """Make the dataset that the command line asks for; return what to tell. Raises UserError."""
    check(arguments)
    out: Path = arguments.out
    given = stored_tokenizer(arguments.tokenizer_of) if arguments.tokenizer_of else None
    decodable = (given.kind if given else arguments.tokenizer) != "bytes"
    documents = find_text(arguments.sources, decodable)
    with told(out.parent, "write into"), tempfile.TemporaryDirectory(dir=out.parent, prefix=".hiermpi-") as folder:
        tokenizer = given or make_tokenizer(arguments, documents)
        with Spool(Path(folder), tokenizer, encoder) as spool:
            fill(spool, documents, arguments.val_fraction)
            if tokenizer.kind == "bpe" and given is None:
                order = np.argsort(-spool.counts, kind="stable")
                spool.renumber(order)
                tokenizer = tokenizer.renumbered(order)  # type: ignore[attr-defined]
        require_text(spool, arguments)
        content = DatasetContent(
            tokenizer.vocab_size,
            arguments.symmetry_order,
            symmetry_groups_for(arguments.symmetry, spool.counts, arguments.symmetry_order),
            spool.counts,
            tokenizer.to_json(),
            arguments.sources,
            spool.bytes,
        )
        write_dataset(out, content, spool.paths)
    return describe(out, tokenizer, spool)


def check(arguments: argparse.Namespace) -> None:
    """Refuse what can be refused before any work. Raises UserError."""
    if arguments.vocab_size is not None and arguments.tokenizer != "bpe":
        raise UsageError(f"--vocab-size is for --tokenizer bpe: {arguments.tokenizer} finds its own")
    if arguments.vocab_size is not None and not FEWEST_BPE_TOKENS <= arguments.vocab_size <= 1 << 24:
        raise UsageError(
            f"--vocab-size {arguments.vocab_size}: expected {FEWEST_BPE_TOKENS} (256 bytes and a merge) to {1 << 24}"
        )
    if arguments.tokenizer == "bpe":
        load_library()
    if not 0.0 < arguments.val_fraction <= 0.5:
        raise UsageError(f"--val-fraction {arguments.val_fraction}: expected more than 0 and at most 0.5")
    if not 1 <= arguments.symmetry_order <= 255:
        raise UsageError(f"--symmetry-order {arguments.symmetry_order}: expected 1 to 255")
    require_new(arguments.out, arguments.force)


def stored_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a dataset or checkpoint. Raises UserError."""
    from hiermpi.storage.checkpoint import load_checkpoint
    from hiermpi.storage.container import kind_of
    from hiermpi.storage.dataset import open_dataset

    if kind_of(path) == "dataset":
        with_tokenizer = open_dataset(path)
        with_tokenizer.close()
        return tokenizer_from_json(with_tokenizer.tokenizer)
    return tokenizer_from_json(load_checkpoint(path, with_state=False).tokenizer)


def find_text(sources: list[str], decodable: bool) -> list[Document]:
    """The documents that hold text; others are passed over and counted, unless named themselves. Raises UserError."""
    kept, passed = [], 0
    for document in find_documents(sources):
        fault = document.fault(decodable)
        if fault and document.named:
            raise UserError(f"{document.path} {fault}: name text files")
        passed += bool(fault)
        if not fault:
            kept.append(document)
    if passed:
        logger.info("passed over %d files that are not text", passed)
    return kept


def make_tokenizer(arguments: argparse.Namespace, documents: list[Document]) -> Tokenizer:
    """The tokenizer that the command line asks for, learned from the corpus. Raises UserError."""
    if arguments.tokenizer == "bytes":
        return BytesTokenizer()
    if not any(document.size() for document in documents):
        raise UserError("the sources hold no text: name others")
    if arguments.tokenizer == "bpe":
        return train_bpe(read_text(documents, "learning the vocabulary"), arguments.vocab_size or BPE_TOKENS)
    characters: set[str] = set()
    for text in read_text(documents, "collecting characters"):
        characters.update(text)
    return CharsTokenizer("".join(sorted(characters)))


def read_text(documents: list[Document], what: str) -> Iterator[str]:
    """All text, block by block, with progress."""
    with ProgressBar(what, sum(document.size() for document in documents), in_bytes=True) as bar:
        for document in documents:
            for block in document.blocks():
                try:
                    yield block.decode()
                except UnicodeDecodeError:
                    raise UserError(f"{document.path} has changed while it was read: try again") from None
                bar.advance(len(block))


def fill(spool: Spool, documents: list[Document], val_fraction: float) -> None:
    """Encode all documents into ``spool``, each split at its place."""
    sizes = [document.size() for document in documents]
    split = Split(len(documents), val_fraction)
    with ProgressBar("encoding", sum(sizes), in_bytes=True) as bar:
        for document, size in zip(documents, sizes, strict=True):
            place = split.place(size)
            if spool.tokenizer.kind != "bytes" and 0 < place < size:
                place = document.character_start(place)
            for name, (start, stop) in zip(SPLITS, ((0, place), (place, size)), strict=True):
                for block in document.blocks(start, stop):
                    spool.add(name, block)
                    bar.advance(len(block))
        spool.finish()


def require_text(spool: Spool, arguments: argparse.Namespace) -> None:
    """Refuse a corpus with too little text for both splits. Raises UserError."""
    for split in SPLITS:
        if spool.tokens[split] < FEWEST_TOKENS:
            raise UserError(
                f"the sources give {spool.tokens['train']} tokens for training and {spool.tokens['val']} for "
                f"validation at --val-fraction {arguments.val_fraction:g}: at least {FEWEST_TOKENS} of each are "
                "needed, name more text"
            )


def symmetry_groups_for(kind: str, counts: NDArray[np.int64], order: int) -> NDArray[np.uint8]:
    """(V,) symmetry group of each token id.

    ``modulo``: the id modulo the order. ``frequency``: ids by decreasing frequency, each to the group that weighs
    least so far, so that all groups carry about the same share of the corpus.
    """
    if kind == "modulo":
        return (np.arange(len(counts)) % order).astype(np.uint8)
    groups = np.empty(len(counts), np.uint8)
    lightest = [(0, 0, group) for group in range(order)]  # weight, members, group
    for token in np.argsort(-counts, kind="stable"):
        weight, members, group = heapq.heappop(lightest)
        groups[token] = group
        heapq.heappush(lightest, (weight + int(counts[token]), members + 1, group))
    return groups


def describe(out: Path, tokenizer: Tokenizer, spool: Spool) -> str:
    """What was made, and what to type next."""
    tokens, n_bytes = spool.tokens, spool.bytes
    per_token = sum(n_bytes.values()) / sum(tokens.values())
    return "\n".join(
        [
            f"{'dataset':14}{out} ({out.stat().st_size:,} bytes)",
            f"{'text':14}{sum(n_bytes.values()):,} bytes",
            f"{'tokens':14}{tokens['train']:,} for training, {tokens['val']:,} for validation",
            f"{'vocabulary':14}{tokenizer.vocab_size:,} {tokenizer.kind}"
            + (f", {per_token:.2f} bytes per token" if tokenizer.kind != "bytes" else ""),
            f"{'next':14}mpirun -n 2 hiermpi train --data {out} --run runs/first",
        ]
    )
