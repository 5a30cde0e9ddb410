"""A reader of one's own: files of comma-separated values, whose column ``text`` holds one document in each row.

hiermpi prepare reviews.csv --out data.h5 --reader examples.own_reader:READER
"""

import csv
import io
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One row of a file as a document."""

    name: str
    named: bool
    text: bytes

    def size(self):
        return len(self.text)

    def open(self):
        return io.BytesIO(self.text)


class CsvReader:
    """Reads the column ``text``; all other files are left to hiermpi's own readers."""

    def accepts(self, path):
        return path.suffix == ".csv"

    def documents(self, path, named):
        with open(path, encoding="utf-8", newline="") as file:
            for number, row in enumerate(csv.DictReader(file), start=1):
                yield Row(f"{path}, row {number}", named, (row["text"] + "\n").encode())


READER = CsvReader()
