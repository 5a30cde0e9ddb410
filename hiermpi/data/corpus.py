"""The text of a corpus: files, folders, and Python's own standard library; and how it is split.

Fewer than :data:`WHOLE_DOCUMENTS_FROM` documents give the tail of each to validation (the tail of a single file, as
nanoGPT does). More give whole documents, evenly spaced over the sorted corpus by bytes: a tail of an alphabetically
sorted tree would not be like the rest.
"""

import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hiermpi.errors import UserError

STDLIB = "stdlib"
NOT_STDLIB = frozenset({"site-packages", "dist-packages", "__pycache__"})
WHOLE_DOCUMENTS_FROM = 100
BINARY_PROBE = 8192


@dataclass(frozen=True)
class Document:
    """A file of the corpus."""

    path: Path
    named: bool
    """The user named this very file: then it may not be passed over."""

    def read(self) -> bytes:
        """Its bytes. Raises UserError."""
        try:
            return self.path.read_bytes()
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {error.strerror or error}") from None


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
        elif path.exists():
            found.append(Document(path, True))
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


def is_binary(text: bytes) -> bool:
    """Whether the beginning of a file is not text."""
    return b"\0" in text[:BINARY_PROBE]


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

    def cut(self, text: bytes, whole_characters: bool) -> tuple[bytes, bytes]:
        """The parts of a document for training and for validation.

        Args:
            text: the documents, one after another.
            whole_characters: cut between characters of UTF-8.
        """
        if self.by_document:
            self._seen += len(text)
            if self._given + len(text) / 2 <= self.fraction * self._seen:
                self._given += len(text)
                return b"", text
            return text, b""
        place = int(len(text) * (1.0 - self.fraction))
        while whole_characters and 0 < place < len(text) and text[place] & 0xC0 == 0x80:
            place -= 1
        return text[:place], text[place:]
