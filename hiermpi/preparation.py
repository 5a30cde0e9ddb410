"""Text to dataset: what ``hiermpi prepare`` does."""

import argparse
import heapq
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hiermpi.data.corpus import Document, Split, find_documents, is_binary
from hiermpi.data.tokenizers import BytesTokenizer, CharsTokenizer, Tokenizer
from hiermpi.errors import UsageError, UserError
from hiermpi.storage.dataset import SPLITS, DatasetContent, token_dtype, write_dataset
from hiermpi.storage.files import told

BLOCK = 1 << 22
FEWEST_TOKENS = 2

logger = logging.getLogger("hiermpi")


def prepare(arguments: argparse.Namespace) -> str:
    """Make the dataset that the command line asks for; return what to tell. Raises UserError."""
    check(arguments)
    out: Path = arguments.out
    documents = find_documents(arguments.sources)
    tokenizer = make_tokenizer(arguments.tokenizer, documents)
    with told(out.parent, "write into"), tempfile.TemporaryDirectory(dir=out.parent, prefix=".hiermpi-") as spool:
        with Spool(Path(spool), tokenizer) as writer:
            split = Split(len(documents), arguments.val_fraction)
            for text in texts(documents, tokenizer.kind != "bytes"):
                for name, part in zip(SPLITS, split.cut(text, tokenizer.kind != "bytes"), strict=True):
                    writer.add(name, part)
        require_text(writer, arguments)
        groups = symmetry_groups_for(arguments.symmetry, writer.counts, arguments.symmetry_order)
        content = DatasetContent(
            tokenizer.vocab_size,
            arguments.symmetry_order,
            groups,
            writer.counts,
            tokenizer.to_json(),
            arguments.sources,
            writer.bytes,
        )
        write_dataset(out, content, writer.paths)
    return describe(out, tokenizer, writer)


def check(arguments: argparse.Namespace) -> None:
    """Refuse what can be refused before any work. Raises UsageError."""
    if arguments.tokenizer == "bpe":
        raise UsageError("--tokenizer bpe is not available in this version: use bytes or chars")
    if arguments.vocab_size is not None:
        raise UsageError(f"--vocab-size is for --tokenizer bpe: {arguments.tokenizer} finds its own")
    if not 0.0 < arguments.val_fraction <= 0.5:
        raise UsageError(f"--val-fraction {arguments.val_fraction}: expected more than 0 and at most 0.5")
    if not 1 <= arguments.symmetry_order <= 255:
        raise UsageError(f"--symmetry-order {arguments.symmetry_order}: expected 1 to 255")
    if arguments.out.is_dir():
        raise UsageError(f"{arguments.out} is a folder: name a file with --out")
    if arguments.out.exists() and not arguments.force:
        raise UsageError(f"{arguments.out} exists: name another --out, or add --force to replace it")
    if not arguments.out.parent.is_dir():
        raise UsageError(f"{arguments.out.parent} is not a folder: make it first, or name another --out")


def texts(documents: list[Document], decodable: bool) -> Iterator[bytes]:
    """The text of each document; binary and undecodable files are passed over and counted, unless named themselves."""
    passed = 0
    for document in documents:
        text = document.read()
        fault = "is binary" if is_binary(text) else ""
        if decodable and not fault:
            try:
                text.decode()
            except UnicodeDecodeError as error:
                fault = f"is not UTF-8 (byte {error.start})"
        if fault and document.named:
            raise UserError(f"{document.path} {fault}: name text files")
        passed += bool(fault)
        if not fault:
            yield text
    if passed:
        logger.info("passed over %d files that are not text", passed)


def make_tokenizer(kind: str, documents: list[Document]) -> Tokenizer:
    """The tokenizer called ``kind`` for this corpus."""
    if kind == "bytes":
        return BytesTokenizer()
    characters: set[str] = set()
    for text in texts(documents, True):
        characters.update(text.decode())
    if not characters:
        raise UserError("the sources hold no text: name others")
    return CharsTokenizer("".join(sorted(characters)))


class Spool:
    """Token ids on their way into a dataset: one raw file per split, and what is to be known of them.

    Args:
        folder: for the files.
        tokenizer: of the corpus.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.dtype = token_dtype(tokenizer.vocab_size)
        self.paths = {split: folder / f"{split}.tokens" for split in SPLITS}
        self.counts = np.zeros(tokenizer.vocab_size, np.int64)
        self.bytes = dict.fromkeys(SPLITS, 0)
        self.tokens = dict.fromkeys(SPLITS, 0)
        self._files = {split: open(path, "wb") for split, path in self.paths.items()}  # noqa: SIM115

    def add(self, split: str, text: bytes) -> None:
        """Add text to a split."""
        for block in blocks(text):
            ids = self.tokenizer.encode(block)
            self.counts += np.bincount(ids, minlength=len(self.counts))
            self.tokens[split] += len(ids)
            self._files[split].write(ids.astype(self.dtype).tobytes())
        self.bytes[split] += len(text)

    def __enter__(self) -> "Spool":
        return self

    def __exit__(self, *exception: object) -> None:
        for file in self._files.values():
            file.close()


def blocks(text: bytes) -> Iterator[bytes]:
    """``text`` in pieces of bounded size, cut between UTF-8 characters."""
    start = 0
    while start < len(text):
        stop = min(start + BLOCK, len(text))
        for _ in range(3):  # a character has at most three bytes that continue it
            if stop < len(text) and text[stop] & 0xC0 == 0x80:
                stop -= 1
        yield text[start:stop]
        start = stop


def require_text(writer: Spool, arguments: argparse.Namespace) -> None:
    """Refuse a corpus with too little text for both splits. Raises UserError."""
    for split in SPLITS:
        if writer.tokens[split] < FEWEST_TOKENS:
            raise UserError(
                f"the sources give {writer.tokens['train']} tokens for training and {writer.tokens['val']} for "
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


def describe(out: Path, tokenizer: Tokenizer, writer: Spool) -> str:
    """What was made, and what to type next."""
    tokens, n_bytes = writer.tokens, writer.bytes
    return "\n".join(
        [
            f"{'dataset':14}{out} ({out.stat().st_size:,} bytes)",
            f"{'text':14}{sum(n_bytes.values()):,} bytes",
            f"{'tokens':14}{tokens['train']:,} for training, {tokens['val']:,} for validation",
            f"{'vocabulary':14}{tokenizer.vocab_size:,} {tokenizer.kind}",
            f"{'next':14}mpirun -n 4 hiermpi train --data {out} --run runs/first",
        ]
    )
