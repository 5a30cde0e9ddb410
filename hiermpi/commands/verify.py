"""``hiermpi verify``: is every byte of a dataset or checkpoint as it was written?"""

import argparse
from pathlib import Path

SUMMARY = "tell whether datasets and checkpoints are whole; exit 1 if any byte is damaged"
EXAMPLE = """\
example:
    hiermpi verify data.h5 runs/first/checkpoints/*.h5"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="dataset or checkpoint")


def run(arguments: argparse.Namespace) -> int:
    """Verify each file; name the damaged ones."""
    from hiermpi.errors import UserError
    from hiermpi.storage.checkpoint import load_checkpoint
    from hiermpi.storage.container import verify
    from hiermpi.storage.dataset import open_dataset

    damaged = 0
    for path in arguments.files:
        try:
            header = verify(path)
            if header.kind == "dataset":
                open_dataset(path).close()
            else:
                load_checkpoint(path)
            print(f"{path}: whole ({header.kind}, {header.length:,} bytes, SHA-256 {header.sha256.hex()})")
        except UserError as error:
            print(error)
            damaged += 1
    return 1 if damaged else 0
