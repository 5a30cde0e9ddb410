"""This module reads plain text files, one document each; its reader takes every file that no other reader takes."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from hiermpi.data.documents import Document


@dataclass(frozen=True)
class TextFile:
    """A text file as a document."""

    path: Path
    named: bool

    @property
    def name(self) -> str:
        return str(self.path)

    def size(self) -> int:
        return self.path.stat().st_size

    def open(self) -> BinaryIO:
        return open(self.path, "rb")


class TextReader:
    """The reader of text files accepts every file."""

    def accepts(self, path: Path) -> bool:
        return True

    def documents(self, path: Path, named: bool) -> Iterable[Document]:
        return [TextFile(path, named)]


READER = TextReader()
