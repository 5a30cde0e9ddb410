"""``hiermpi verify``: is every byte of a file as it was written? Have runs come to the same parameters?"""

import argparse
from pathlib import Path

from hiermpi.commands import Command

SUMMARY = "tell whether datasets and checkpoints are whole, or runs equal; exit 1 if not"
EXAMPLE = """\
example:
    hiermpi verify data.h5 runs/first/checkpoints/*.h5
    hiermpi verify runs/first runs/second --digest      (are their newest checkpoints' parameters the same bits?)"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="dataset, checkpoint or run folder")
    parser.add_argument("--digest", action="store_true", help="compare the parameters of runs or checkpoints")


def run(arguments: argparse.Namespace) -> int:
    """Verify each file, and name the damaged ones; or compare."""
    return compare(arguments.files) if arguments.digest else verify_all(arguments.files)


def verify_all(paths: list[Path]) -> int:
    """Print the state of each file; 1 if any is damaged."""
    from hiermpi.errors import UserError
    from hiermpi.storage.checkpoint import load_checkpoint
    from hiermpi.storage.container import verify
    from hiermpi.storage.dataset import open_dataset

    damaged = 0
    for path in files_of(paths):
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


def files_of(paths: list[Path]) -> list[Path]:
    """The files, and the checkpoints of run folders. Raises UserError."""
    from hiermpi.errors import UserError
    from hiermpi.storage.run_folder import RunFolder

    found: list[Path] = []
    for path in paths:
        checkpoints = [file for _, file in RunFolder(path).checkpoints.list()] if path.is_dir() else [path]
        if not checkpoints:
            raise UserError(f"{path} holds no checkpoint: name a run folder, a dataset or a checkpoint")
        found += checkpoints
    return found


def compare(paths: list[Path]) -> int:
    """Print the digest of each one's parameters; 1 if they differ."""
    from hiermpi.storage.checkpoint import parameters_digest
    from hiermpi.training.opening import open_checkpoint

    found = []
    for path in paths:
        checkpoint = open_checkpoint(path)
        found.append((parameters_digest(checkpoint), checkpoint.step))
        print(f"{path}: step {checkpoint.step:,}, parameters SHA-256 {found[-1][0]}")
    if len({digest for digest, _ in found}) == 1:
        print("the same parameters" if len(found) > 1 else "nothing to compare with")
        return 0
    print("different parameters" + (", at different steps" if len({step for _, step in found}) > 1 else ""))
    return 1


VERIFY = Command(SUMMARY, EXAMPLE, configure, run)
