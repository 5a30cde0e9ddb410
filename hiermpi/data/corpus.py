"""The text of a corpus: files, folders, and Python's own standard library; and how it is split.

Fewer than :data:`WHOLE_DOCUMENTS_FROM` documents give the tail of each to validation (the tail of a single file, as
nanoGPT does). More give whole documents, evenly spaced over the sorted corpus by bytes: a tail of an alphabetically
sorted tree would not be like the rest.

A file is never held as a whole: it is read block by block, in as many passes as there are things to find out.
"""

import codecs
import os
import re
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hiermpi.errors import UserError

STDLIB = "stdlib"
NOT_STDLIB = frozenset({"site-packages", "dist-packages", "__pycache__"})
WHOLE_DOCUMENTS_FROM = 100
BINARY_PROBE = 8192
BLOCK = 1 << 20

_LINE_START = re.compile(rb"\n(?=\S)")


@dataclass(frozen=True)
class Document:
    """A file of the corpus."""

    path: Path
    named: bool
    """The user named this very file: then it may not be passed over."""

    def size(self) -> int:
        """Its bytes. Raises UserError."""
        try:
            return self.path.stat().st_size
        except OSError as error:
            raise self._unreadable(error) from None

    def blocks(self, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        """Its bytes from ``start`` to ``stop`` (default: the end) in pieces of at most :data:`BLOCK`.

        Cut where a line starts, else between UTF-8 characters. Raises UserError, also where the file has become
        shorter.
        """
        stop = self.size() if stop is None else stop
        try:
            with open(self.path, "rb") as file:
                file.seek(start)
                rest = b""
                while start < stop:
                    data = file.read(min(BLOCK, stop - start) - len(rest))
                    if not data:
                        raise UserError(f"{self.path} has changed while it was read: try again when it is still")
                    block = rest + data
                    if start + len(block) < stop:
                        rest = block[cut_place(block) :]
                        block = block[: len(block) - len(rest)]
                    start += len(block)
                    yield block
        except OSError as error:
            raise self._unreadable(error) from None

    def character_start(self, place: int) -> int:
        """The start of the UTF-8 character at byte ``place``."""
        first = max(0, place - 3)
        near = b"".join(self.blocks(first, min(place + 1, self.size())))
        while place > first and near[place - first : place - first + 1] and near[place - first] & 0xC0 == 0x80:
            place -= 1
        return place

    def fault(self, decodable: bool) -> str:
        """Why this is not text (not UTF-8, where it must be ``decodable``); empty where it is. Raises UserError."""
        decoder = codecs.getincrementaldecoder("utf-8")()
        seen = 0
        for block in self.blocks():
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

    def _unreadable(self, error: OSError) -> UserError:
        return UserError(f"cannot read {self.path}: {error.strerror or error}")


def cut_place(text: bytes) -> int:
    """Where to cut ``text`` that goes on: at its last line that starts with a word, else between characters."""
    starts = [match.end() for match in _LINE_START.finditer(text, len(text) - len(text) // 8)]
    if starts:
        return starts[-1]
    for back in range(1, min(4, len(text))):  # a character has at most three bytes that continue it
        byte = text[-back]
        if byte & 0xC0 != 0x80:
            whole = back == 1 if byte < 0x80 else back == (2 if byte < 0xE0 else 3 if byte < 0xF0 else 4)
            return len(text) if whole else len(text) - back
    return len(text)


def find_documents(sources: Sequence[str]) -> list[Document]:
    """The files behind ``sources``, folders walked recursively, in sorted order. Raises UserError."""
    found: list[Document] = []
    for source in sources:
        if source == STDLIB and not Path(source).exists():
            root = Path(sysconfig.get_path("stdlib"))
            found += [Document(path, False) for path in walk(root, NOT_STDLIB) if path.suffix == ".py"]
            continue
        path = Path(source)
        if path.is_dir():
            found += [Document(entry, False) for entry in walk(path)]
        elif path.is_file():
            found.append(Document(path, True))
        elif path.exists():
            raise UserError(f"{source} is not a regular file: name text files, folders, or the word {STDLIB}")
        else:
            raise UserError(f"{source} does not exist: name text files, folders, or the word {STDLIB}")
    return found


def walk(root: Path, excluded: frozenset[str] = frozenset()) -> Iterator[Path]:
    """Files below ``root`` in sorted order; not into hidden or excluded folders, nor through links to folders."""
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in excluded and not name.startswith("."))
        for name in sorted(files):
            path = Path(folder) / name
            if not name.startswith(".") and path.is_file():
                yield path


class Split:
    """Decides what of each document is for validation.

    Args:
        n_documents: of the corpus.
        fraction: of the text that goes to validation.
    """

    def __init__(self, n_documents: int, fraction: float) -> None:
        self.by_document = n_documents >= WHOLE_DOCUMENTS_FROM
        self.fraction = fraction
        self._seen = 0
        self._given = 0

    def place(self, size: int) -> int:
        """Where to cut a document of ``size`` bytes: what comes before is for training. Ask in order."""
        if not self.by_document:
            return int(size * (1.0 - self.fraction))
        self._seen += size
        if self._given + size / 2 <= self.fraction * self._seen:
            self._given += size
            return 0
        return size
