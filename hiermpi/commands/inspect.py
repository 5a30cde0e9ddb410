"""``hiermpi inspect``: what is in a dataset or a checkpoint."""

import argparse
import json
from pathlib import Path

from hiermpi.commands import Command

SUMMARY = "tell what is in a dataset, a checkpoint or a run"
EXAMPLE = """\
example:
    hiermpi inspect data.h5
    hiermpi inspect runs/first                (its newest checkpoint)
    hiermpi inspect runs/first/checkpoints/step-00000500.h5 --json"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument("file", type=Path, metavar="FILE", help="dataset, checkpoint or run folder")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Print what is in the file."""
    from hiermpi.reporting.inspection import describe, inspect

    found = inspect(arguments.file)
    print(json.dumps(found) if arguments.json else describe(found))
    return 0


INSPECT = Command(SUMMARY, EXAMPLE, configure, run)
