"""``hiermpi export``: a trained model for other programs."""

import argparse
from pathlib import Path

from hiermpi.commands import Command

SUMMARY = "write a trained model for transformers, or as plain tensors"
EXAMPLE = """\
example:
    hiermpi export runs/first --out first-hf --format hf
    python -c 'from transformers import AutoModelForCausalLM as M; M.from_pretrained("first-hf")'"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument("source", type=Path, metavar="RUN_OR_CKPT", help="run folder (its newest checkpoint) or file")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to make")
    parser.add_argument(
        "--format",
        choices=("hf", "safetensors", "npz"),
        default="hf",
        help="hf: a GPT-2 folder with its tokenizer (default); safetensors, npz: one file of tensors by our names",
    )
    parser.add_argument("--force", action="store_true", help="replace an existing export")


def run(arguments: argparse.Namespace) -> int:
    """Export, and tell what was written."""
    from hiermpi.interchange.exporting import export
    from hiermpi.training.opening import open_checkpoint

    checkpoint = open_checkpoint(arguments.source)
    written = export(checkpoint, arguments.out, arguments.format, arguments.force)
    print(f"{'written':14}{written} ({arguments.format}, step {checkpoint.step})")
    return 0


EXPORT = Command(SUMMARY, EXAMPLE, configure, run)
