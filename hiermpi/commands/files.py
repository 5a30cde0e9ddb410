"""The module holds the commands that make and read files: prepare, inspect, verify, report, export, import."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from hiermpi.commands import Command, add_family_argument, given_family
from hiermpi.config.registry import FORMATS

if TYPE_CHECKING:
    from mpi4py import MPI

    from hiermpi.preparation.preparing import Preparation, Prepared

PREPARE_SUMMARY = "turn text files, folders or Python's own source into one dataset"
PREPARE_EXAMPLE = """\
example:
    hiermpi prepare my-texts/ more.txt --out data.h5
    hiermpi prepare stdlib --out data.h5        (Python's standard library: no download)
    hiermpi prepare shakespeare.txt --out data.h5 --tokenizer chars
    mpirun -n 8 hiermpi prepare corpus/ --out data.h5 --tokenizer bpe --vocab-size 8192"""


def configure_prepare(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help="text file, folder (recursively), or stdlib")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="dataset to make")
    parser.add_argument("--tokenizer", choices=("bytes", "chars", "bpe"), default="bytes", help="(default: bytes)")
    parser.add_argument("--vocab-size", type=int, metavar="N", help="tokens of the bpe vocabulary (default: 8192)")
    parser.add_argument(
        "--tokenizer-of", type=Path, metavar="FILE", help="use the tokenizer of this dataset or checkpoint"
    )
    parser.add_argument(
        "--val-fraction", type=float, default=0.1, metavar="F", help="share of the text for validation (default: 0.1)"
    )
    parser.add_argument(
        "--symmetry",
        choices=("modulo", "frequency"),
        default="modulo",
        help="symmetry group of a token: its id modulo the order, or dealt so that groups weigh alike "
        "(default: modulo)",
    )
    parser.add_argument(
        "--symmetry-order", type=int, default=12, metavar="S", help="number of symmetry groups (default: 12)"
    )
    parser.add_argument(
        "--reader", metavar="NAME", help="package.module:object of your own that reads files of your own kind"
    )
    parser.add_argument("--force", action="store_true", help="replace an existing FILE")


def run_prepare(arguments: argparse.Namespace) -> int:
    """Prepare the dataset and print a summary of it."""
    from hiermpi.preparation.preparing import Encoder, prepare_with

    print(describe_prepared(prepare_with(preparation(arguments), Encoder())))
    return 0


def prepare_together(arguments: argparse.Namespace, world: "MPI.Comm") -> int:
    """Prepare on rank 0, while all ranks encode. Collective over ``world``."""
    from hiermpi.communication.agreement import agreed
    from hiermpi.communication.waiting import Waiter
    from hiermpi.preparation.preparing import TeamEncoder, prepare_with

    encoder = TeamEncoder(world)
    with agreed(world, Waiter()):
        if world.rank != 0:
            encoder.serve()
        else:
            try:
                print(describe_prepared(prepare_with(preparation(arguments), encoder)))
            finally:
                encoder.close()
    return 0


def preparation(arguments: argparse.Namespace) -> "Preparation":
    """Return the preparation that the command line asks for."""
    from hiermpi.preparation.preparing import Preparation

    return Preparation(
        arguments.sources,
        arguments.out,
        arguments.tokenizer,
        arguments.vocab_size,
        arguments.tokenizer_of,
        arguments.val_fraction,
        arguments.symmetry,
        arguments.symmetry_order,
        arguments.reader,
        arguments.force,
    )


def describe_prepared(made: "Prepared") -> str:
    """Describe the dataset that was made, and the command that may follow."""
    n_bytes, n_tokens = sum(made.bytes.values()), sum(made.tokens.values())
    rate = f", {n_bytes / n_tokens:.2f} bytes per token" if made.tokenizer != "bytes" else ""
    return "\n".join(
        [
            f"{'dataset':14}{made.path} ({made.path.stat().st_size:,} bytes)",
            f"{'text':14}{n_bytes:,} bytes",
            f"{'tokens':14}{made.tokens['train']:,} for training, {made.tokens['val']:,} for validation",
            f"{'vocabulary':14}{made.vocab_size:,} {made.tokenizer}{rate}",
            f"{'next':14}mpirun -n 2 hiermpi train --data {made.path} --run runs/first",
        ]
    )


PREPARE = Command(PREPARE_SUMMARY, PREPARE_EXAMPLE, configure_prepare, run_prepare, prepare_together)


INSPECT_SUMMARY = "tell what is in a dataset, a checkpoint or a run"
INSPECT_EXAMPLE = """\
example:
    hiermpi inspect data.h5
    hiermpi inspect runs/first                (its newest checkpoint)
    hiermpi inspect runs/first/checkpoints/step-00000500.h5 --json"""


def configure_inspect(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument("file", type=Path, metavar="FILE", help="dataset, checkpoint or run folder")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run_inspect(arguments: argparse.Namespace) -> int:
    """Print what is in the file."""
    from hiermpi.reporting.reading import describe, inspect

    found = inspect(arguments.file)
    print(json.dumps(found) if arguments.json else describe(found))
    return 0


INSPECT = Command(INSPECT_SUMMARY, INSPECT_EXAMPLE, configure_inspect, run_inspect)


VERIFY_SUMMARY = "tell whether datasets and checkpoints are whole, or runs equal; exit 1 if not"
VERIFY_EXAMPLE = """\
example:
    hiermpi verify data.h5 runs/first/checkpoints/*.h5
    hiermpi verify runs/first runs/second --digest      (are their newest checkpoints' parameters the same bits?)"""


def configure_verify(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="dataset, checkpoint or run folder")
    parser.add_argument("--digest", action="store_true", help="compare the parameters of runs or checkpoints")


def run_verify(arguments: argparse.Namespace) -> int:
    """Verify each file and name the damaged ones, or compare the files where the command line asks for it."""
    return compare(arguments.files) if arguments.digest else verify_all(arguments.files)


def verify_all(paths: list[Path]) -> int:
    """Print the state of each file, and return 1 if any is damaged and 0 otherwise."""
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
    """Return the files themselves, and the checkpoints of run folders. Raises UserError."""
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
    """Print the digest of each checkpoint's parameters, and return 1 if they differ and 0 otherwise."""
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


VERIFY = Command(VERIFY_SUMMARY, VERIFY_EXAMPLE, configure_verify, run_verify)


REPORT_SUMMARY = "tables and plots of one run, or of several side by side"
REPORT_EXAMPLE = """\
example:
    hiermpi report runs/first
    hiermpi report runs/first runs/second --out comparison/

The plots go into RUN/plots (into DIR with --out). Compared runs share one picture of their losses."""


def configure_report(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folder")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the plots (default: RUN/plots)")
    parser.add_argument("--no-plots", action="store_true", help="tables only")
    parser.add_argument("--json", action="store_true", help="print one JSON object per run, one a line")


def run_report(arguments: argparse.Namespace) -> int:
    """Print the tables; make the plots."""
    from hiermpi.reporting.reading import read_run
    from hiermpi.reporting.tables import comparison_table, report_text

    runs = [read_run(path) for path in arguments.runs]
    if arguments.json:
        for found in runs:
            print(json.dumps(found.summary()))
    else:
        print("\n\n".join(report_text(found) for found in runs))
        if len(runs) > 1:
            print("\n" + comparison_table(runs))
    if not arguments.no_plots:
        from hiermpi.reporting.plots import make_plots

        made = make_plots(runs, arguments.out or arguments.runs[0] / "plots")
        if not arguments.json:
            print("\n" + "\n".join(f"{'plot':14}{path}" for path in made))
    return 0


REPORT = Command(REPORT_SUMMARY, REPORT_EXAMPLE, configure_report, run_report)


EXPORT_SUMMARY = "write a trained model for transformers, or as plain tensors"
EXPORT_EXAMPLE = """\
example:
    hiermpi export runs/first --out first-hf --format hf
    python -c 'from transformers import AutoModelForCausalLM as M; M.from_pretrained("first-hf")'"""


def configure_export(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument("source", type=Path, metavar="RUN_OR_CKPT", help="run folder (its newest checkpoint) or file")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to make")
    parser.add_argument(
        "--format",
        default="hf",
        metavar="NAME",
        help="hf: a GPT-2 folder with its tokenizer (default); safetensors, npz: one file of tensors by our names; "
        "or package.module:object of your own",
    )
    parser.add_argument("--force", action="store_true", help="replace an existing export")
    add_family_argument(parser)


def run_export(arguments: argparse.Namespace) -> int:
    """Export the model and print what was written."""
    from hiermpi.interchange.exchange import export
    from hiermpi.model.contract import family_of
    from hiermpi.storage.checkpoint import model_config
    from hiermpi.training.opening import open_checkpoint

    FORMATS.check(arguments.format)
    checkpoint = open_checkpoint(arguments.source)
    family = family_of(model_config(checkpoint), given_family(arguments), arguments.source)
    written = export(checkpoint, arguments.out, arguments.format, arguments.force, family)
    print(f"{'written':14}{written} ({arguments.format}, step {checkpoint.step})")
    return 0


EXPORT = Command(EXPORT_SUMMARY, EXPORT_EXAMPLE, configure_export, run_export)


IMPORT_SUMMARY = "turn a GPT-2 folder of transformers, or an exported model, into a checkpoint"
IMPORT_EXAMPLE = """\
example:
    hiermpi import gpt2/ --out gpt2.h5
    hiermpi generate gpt2.h5 --prompt "The first"
    hiermpi prepare my-texts/ --out data.h5 --tokenizer-of gpt2.h5
    mpirun -n 16 hiermpi train --data data.h5 --run runs/tuned --resume gpt2.h5 --config gpt2-small"""


def configure_import(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument("source", type=Path, metavar="DIR", help="folder (config.json, model.safetensors) or file")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="checkpoint to make")
    parser.add_argument(
        "--format",
        metavar="NAME",
        help=f"{', '.join(FORMATS)}, or package.module:object of your own (default: what the files tell)",
    )
    parser.add_argument("--force", action="store_true", help="replace an existing FILE")
    add_family_argument(parser)


def run_import(arguments: argparse.Namespace) -> int:
    """Import the model and print what was made."""
    from hiermpi.data.tokenizers import tokenizer_from_json
    from hiermpi.files import require_new
    from hiermpi.interchange.exchange import read_model
    from hiermpi.storage.checkpoint import save_checkpoint

    if arguments.format is not None:
        FORMATS.check(arguments.format)
    require_new(arguments.out, arguments.force)
    checkpoint = read_model(arguments.source, arguments.format, given_family(arguments))
    save_checkpoint(arguments.out, checkpoint)
    tokenizer = tokenizer_from_json(checkpoint.tokenizer)
    print(f"{'checkpoint':14}{arguments.out}")
    print(f"{'parameters':14}{sum(tensor.size for tensor in checkpoint.parameters.values()):,}")
    print(f"{'tokenizer':14}{tokenizer.kind}, {tokenizer.vocab_size:,} tokens")
    if tokenizer.kind == "none":
        print(f"{'':14}(no tokenizer.json that hiermpi has: evaluation takes token ids as they are)")
    return 0


IMPORT = Command(IMPORT_SUMMARY, IMPORT_EXAMPLE, configure_import, run_import)
