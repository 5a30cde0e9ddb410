"""This module finds the documents of a corpus, reads them in blocks, and splits them into training and validation.

A document is a named stream of text, whatever kind of file it comes from. Readers turn files into documents; users
give a reader of their own with ``prepare --reader my_module:READER``. Everything else here, such as the split into
training and validation, does not depend on the kind of file.

Where the corpus has fewer than :data:`WHOLE_DOCUMENTS_FROM` documents, the tail of each one goes to validation (for a
single file, nanoGPT does the same). Otherwise whole documents go there, evenly spaced over the sorted corpus by bytes:
the tail of an alphabetically sorted tree would not be like the rest. A document is never held in memory as a whole: it
is read block by block, in as many passes as are needed.
"""

import codecs
import os
import re
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol, runtime_checkable

from hiermpi.config.registry import READERS
from hiermpi.errors import PluginError, UserError, plugin_errors

STDLIB = "stdlib"
NOT_STDLIB = frozenset({"site-packages", "dist-packages", "__pycache__"})
WHOLE_DOCUMENTS_FROM = 100
BINARY_PROBE = 8192
BLOCK = 1 << 20

_LINE_START = re.compile(rb"\n(?=\S)")


@runtime_checkable
class Document(Protocol):
    """A named stream of text. It may be opened several times, and gives the same bytes each time."""

    @property
    def name(self) -> str:
        """Return the name that messages use for the document, such as its path."""

    @property
    def named(self) -> bool:
        """Tell whether the user named this very document, so that it may not be skipped."""

    def size(self) -> int:
        """Return the size of the document's text in bytes. Raises OSError."""

    def open(self) -> BinaryIO:
        """Open the text at its start: UTF-8, or any bytes for the tokenizer ``bytes``. Raises OSError."""


class Reader(Protocol):
    """A reader turns files of one kind into documents."""

    def accepts(self, path: Path) -> bool:
        """Tell whether the file at ``path`` is of the reader's kind."""

    def documents(self, path: Path, named: bool) -> Iterable[Document]:
        """Return the documents in a file, in order; ``named`` tells whether the user named the file itself."""


def find_documents(sources: Sequence[str], reader: Any = None) -> list[Document]:
    """Find the documents in ``sources``; folders are walked recursively, in sorted order.

    Args:
        sources: Files, folders, or the word ``stdlib``, which stands for the modules of Python's standard library.
        reader: A reader that is asked before those of the package: a name, ``package.module:object``, or the object.

    Raises:
        UserError: A source does not exist.
        PluginError: A reader breaks its contract.
    """
    readers = load_readers(reader)
    found: list[Document] = []
    for source in sources:
        if source == STDLIB and not Path(source).exists():
            root = Path(sysconfig.get_path("stdlib"))
            paths = [(path, False) for path in walk(root, NOT_STDLIB) if path.suffix == ".py"]
        else:
            path = Path(source)
            if path.is_dir():
                paths = [(entry, False) for entry in walk(path)]
            elif path.is_file():
                paths = [(path, True)]
            elif path.exists():
                raise UserError(f"{source} is not a regular file: name text files, folders, or the word {STDLIB}")
            else:
                raise UserError(f"{source} does not exist: name text files, folders, or the word {STDLIB}")
        for path, named in paths:
            found += read_documents(path, named, readers)
    return found


def load_readers(reader: Any = None) -> dict[str, Reader]:
    """Return the readers by name, in the order in which they are asked. Raises UsageError, PluginError."""
    readers = {name: READERS[name] for name in READERS}
    if reader is not None:
        name = READERS.outside(reader) or str(reader)
        first = READERS.load(reader) if isinstance(reader, str) else reader
        if isinstance(first, type):
            with plugin_errors(f"--reader {name}"):
                first = first()
        for method in ("accepts", "documents"):
            if not callable(getattr(first, method, None)):
                raise PluginError(f"--reader {name}: it has no method {method}: a reader needs accepts and documents")
        readers = {name: first, **readers}
    return readers


def read_documents(path: Path, named: bool, readers: dict[str, Reader]) -> list[Document]:
    """Return the documents that the first reader which accepts a file finds in it; none where no reader accepts it.

    Args:
        path: The file.
        named: Whether the user named the file itself.
        readers: The readers by name, in the order in which they are asked.

    Raises:
        PluginError: A reader breaks its contract.
        UserError: A reader refuses the file.
    """
    for name, reader in readers.items():
        outside = f"--reader {name}: {path}" if READERS.outside(name) else ""
        with plugin_errors(outside):
            if not reader.accepts(path):
                continue
            documents = list(reader.documents(path, named))
            if not outside:
                return documents
            if not all(isinstance(document, Document) for document in documents):
                raise PluginError(f"{outside}: what it returns are not documents: name, named, size and open")
            return [OutsideDocument(document, f"--reader {name}: {document.name}") for document in documents]
    return []


class OutsideDocument:
    """A document of a reader from outside; what it raises or breaks is told in one sentence that names the reader.

    Args:
        document: The document.
        what: How messages call it.
    """

    def __init__(self, document: Document, what: str) -> None:
        self.document = document
        self.what = what
        self.name = str(document.name)
        self.named = bool(document.named)

    def size(self) -> int:
        with plugin_errors(self.what):
            size = self.document.size()
            if not isinstance(size, int) or size < 0:
                raise PluginError(f"{self.what}: size() returned {size!r}, not the number of its bytes")
        return size

    def open(self) -> BinaryIO:
        with plugin_errors(self.what):
            text = self.document.open()
            if not callable(getattr(text, "read", None)) or not isinstance(text.read(0), bytes):
                raise PluginError(f"{self.what}: open() returned {type(text).__name__}, not a binary file")
        return text


def walk(root: Path, excluded: frozenset[str] = frozenset()) -> Iterator[Path]:
    """Yield the files below ``root`` in sorted order; hidden, excluded and linked folders are skipped."""
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in excluded and not name.startswith("."))
        for name in sorted(files):
            path = Path(folder) / name
            if not name.startswith(".") and path.is_file():
                yield path


@contextmanager
def reading(document: Document) -> Iterator[None]:
    """Turn an OSError that the body raises into a UserError that names the document."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot read {document.name}: {error.strerror or error}") from None


def size_of(document: Document) -> int:
    """Return the size of a document's text in bytes. Raises UserError."""
    with reading(document):
        return document.size()


def blocks(document: Document, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
    """Yield a part of a document's text in blocks of at most :data:`BLOCK` bytes.

    Blocks are cut where a line starts, else between UTF-8 characters.

    Args:
        document: The document.
        start: The first byte of the part.
        stop: The byte at which the part ends; by default the end of the text.

    Raises:
        UserError: The document cannot be read, or it has become shorter.
    """
    stop = size_of(document) if stop is None else stop
    with reading(document), document.open() as stream:
        skip(stream, start)
        rest = b""
        while start < stop:
            data = stream.read(min(BLOCK, stop - start) - len(rest))
            if not data:
                raise UserError(f"{document.name} has changed while it was read: try again when it is still")
            block = rest + data
            if start + len(block) < stop:
                rest = block[cut_place(block) :]
                block = block[: len(block) - len(rest)]
            start += len(block)
            yield block


def skip(stream: BinaryIO, count: int) -> None:
    """Skip the first ``count`` bytes of a stream, which may not be able to seek."""
    if stream.seekable():
        stream.seek(count)
        return
    while count > 0 and (data := stream.read(min(count, BLOCK))):
        count -= len(data)


def character_start(document: Document, position: int) -> int:
    """Return the byte at which the UTF-8 character at byte ``position`` starts. Raises UserError."""
    first = max(0, position - 3)
    near = b"".join(blocks(document, first, min(position + 1, size_of(document))))
    while position > first and near[position - first : position - first + 1] and near[position - first] & 0xC0 == 0x80:
        position -= 1
    return position


def fault(document: Document, decodable: bool) -> str:
    """Return why a document is not text, as the end of a sentence; return "" where it is text. Raises UserError.

    Args:
        document: The document.
        decodable: Whether the document must be UTF-8.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    seen = 0
    for block in blocks(document):
        if seen < BINARY_PROBE and b"\0" in block[: BINARY_PROBE - seen]:
            return "is binary"
        if not decodable:
            return ""
        pending = len(decoder.getstate()[0])
        try:
            decoder.decode(block)
        except UnicodeDecodeError as error:
            return f"is not UTF-8 (byte {seen - pending + error.start})"
        seen += len(block)
    pending = len(decoder.getstate()[0])
    return f"is not UTF-8 (byte {seen - pending})" if pending else ""


def cut_place(text: bytes) -> int:
    """Return the offset at which to cut a text that continues after these bytes.

    It is the start of the last line that begins with a word, where one begins in the last eighth of ``text``; else it
    is a place between two UTF-8 characters.
    """
    starts = [match.end() for match in _LINE_START.finditer(text, len(text) - len(text) // 8)]
    if starts:
        return starts[-1]
    for back in range(1, min(4, len(text))):  # a character has at most three bytes that continue it
        byte = text[-back]
        if byte & 0xC0 != 0x80:
            whole = back == 1 if byte < 0x80 else back == (2 if byte < 0xE0 else 3 if byte < 0xF0 else 4)
            return len(text) if whole else len(text) - back
    return len(text)


class Split:
    """A split decides which part of each document is for validation.

    Args:
        n_documents: The number of documents of the corpus.
        fraction: The share of the text that goes to validation.
    """

    def __init__(self, n_documents: int, fraction: float) -> None:
        self.by_document = n_documents >= WHOLE_DOCUMENTS_FROM
        self.fraction = fraction
        self._seen = 0
        self._given = 0

    def cut(self, size: int) -> int:
        """Return the byte at which a document of ``size`` bytes is cut; the text before it is for training.

        It must be called once for each document, in the order of the corpus.
        """
        if not self.by_document:
            return int(size * (1.0 - self.fraction))
        self._seen += size
        if self._given + size / 2 <= self.fraction * self._seen:
            self._given += size
            return 0
        return size
