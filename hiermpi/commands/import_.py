"""``hiermpi import``: a model of another program as a checkpoint."""

import argparse
from pathlib import Path

from hiermpi.commands import Command

SUMMARY = "turn a GPT-2 folder of transformers, or an exported model, into a checkpoint"
EXAMPLE = """\
example:
    hiermpi import gpt2/ --out gpt2.h5
    hiermpi generate gpt2.h5 --prompt "The first"
    hiermpi prepare my-texts/ --out data.h5 --tokenizer-of gpt2.h5
    mpirun -n 16 hiermpi train --data data.h5 --run runs/tuned --resume gpt2.h5 --config gpt2-small"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument("source", type=Path, metavar="DIR", help="folder (config.json, model.safetensors) or file")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="checkpoint to make")
    parser.add_argument("--force", action="store_true", help="replace an existing FILE")


def run(arguments: argparse.Namespace) -> int:
    """Import, and tell what was made."""
    from hiermpi.files import require_new
    from hiermpi.interchange.importing import as_checkpoint, read_model
    from hiermpi.storage.checkpoint import save_checkpoint

    require_new(arguments.out, arguments.force)
    model = read_model(arguments.source)
    save_checkpoint(arguments.out, as_checkpoint(model))
    count = sum(tensor.size for tensor in model.tensors.values())
    print(f"{'checkpoint':14}{arguments.out}")
    print(f"{'parameters':14}{count:,}")
    print(f"{'tokenizer':14}{model.tokenizer.kind}, {model.tokenizer.vocab_size:,} tokens")
    if model.tokenizer.kind == "none":
        print(f"{'':14}(no tokenizer.json that hiermpi has: evaluation takes token ids as they are)")
    return 0


IMPORT = Command(SUMMARY, EXAMPLE, configure, run)
