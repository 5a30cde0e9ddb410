"""The module holds the commands that work with a model: train, evaluate, generate."""

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from hiermpi.commands import Command, add_family_argument, given_family
from hiermpi.config.loading import add_config_arguments
from hiermpi.errors import EXIT_DONE, EXIT_STOPPED

if TYPE_CHECKING:
    from mpi4py import MPI

    from hiermpi.communication.agreement import ErrorSink
    from hiermpi.training.session import TrainResult

TRAIN_SUMMARY = "train a model on the ranks that mpirun or srun started; the same command again continues"
TRAIN_EXAMPLE = """\
example:
    mpirun -n 13 hiermpi train --data data.h5 --run runs/first --train.steps 500

The run folder holds config.toml, metrics.jsonl, ranks.jsonl, checkpoints/ and, when all steps are done, DONE.
To stop early with a checkpoint: touch RUN/STOP, or send SIGUSR1 to mpirun; the exit code is then 75.

Every setting below is also a key of the TOML file given with --config and an environment variable
HIERMPI_SECTION__FIELD; the command line beats the environment, which beats the file."""


def configure_train(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="dataset made by hiermpi prepare")
    parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="run folder, new or to be continued")
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|none|PATH",
        help="auto (default): go on from the newest whole checkpoint of the run; none: start again from step 0; "
        "PATH: from this checkpoint. What the run has beyond that is set aside, not deleted",
    )
    add_config_arguments(parser)


def train_together(arguments: argparse.Namespace, world: "MPI.Comm") -> int:
    """Train on all ranks. Collective over ``world``."""
    from hiermpi.communication.agreement import set_error_sink
    from hiermpi.config.loading import load_config
    from hiermpi.training.session import run_training

    set_error_sink(write_error_to(arguments.run))
    result = run_training(
        world, lambda: load_config(arguments, os.environ), arguments.data, arguments.run, arguments.resume
    )
    if world.rank == 0:
        print("\n".join(result_lines(result, arguments.data)), flush=True)
    return EXIT_STOPPED if result.stopped else EXIT_DONE


def write_error_to(run: Path) -> "ErrorSink":
    """Return a function that writes tracebacks into the run folder."""

    def sink(rank: int, text: str) -> str:
        from hiermpi.storage.run_folder import RunFolder

        return str(RunFolder(run).write_error(rank, text))

    return sink


def result_lines(result: "TrainResult", data: Path) -> list[str]:
    """Describe how the run ended, and the command that may follow."""
    from hiermpi.reporting.tables import load_lines, machine_lines, phase_table

    if result.already_done:
        return [f"{result.run} is done at step {result.step}: a larger --train.steps continues it"]
    records = list(result.ranks)
    what = f"stopped by {result.reason}" if result.stopped else "done"
    lines = [f"{what} after step {result.step} of {result.steps}", f"{'loss':22}{result.loss:.4f} nats"]
    if result.validation_loss is not None:
        told = f"{result.validation_loss:.4f} nats per token, {result.bits_per_byte:.3f} bits per byte"
        lines.append(f"{'validation':22}{told}")
    if result.skipped:
        lines.append(f"{'skipped steps':22}{result.skipped}")
    lines += ["", *phase_table(records), *machine_lines(records), *load_lines(records[0])]
    following = "the same command again continues" if result.stopped else f"hiermpi evaluate {result.run} --data {data}"
    return [*lines, "", f"{'checkpoint':22}{result.checkpoint}", f"{'next':22}{following}"]


TRAIN = Command(TRAIN_SUMMARY, TRAIN_EXAMPLE, configure_train, run_together=train_together)


EVALUATE_SUMMARY = "mean loss, perplexity and bits per byte of a checkpoint over a whole split"
EVALUATE_EXAMPLE = """\
example:
    hiermpi evaluate runs/first --data data.h5
    mpirun -n 8 hiermpi evaluate runs/first --data data.h5 --split train --json"""


def configure_evaluate(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument("source", type=Path, metavar="RUN_OR_CKPT", help="run folder (its newest checkpoint) or file")
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="dataset made by hiermpi prepare")
    parser.add_argument("--split", choices=("train", "val"), default="val", help="(default: val)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_family_argument(parser)


def run_evaluate(arguments: argparse.Namespace) -> int:
    """Evaluate in this process and print the result."""
    from hiermpi.training.evaluation import evaluate

    found = evaluate(arguments.source, arguments.data, arguments.split, family=given_family(arguments))
    print_evaluation(found, arguments.json)
    return 0


def evaluate_together(arguments: argparse.Namespace, world: "MPI.Comm") -> int:
    """Evaluate on all ranks and print the result on rank 0. Collective over ``world``."""
    from hiermpi.training.evaluation import evaluate

    family = given_family(arguments)
    result = evaluate(arguments.source, arguments.data, arguments.split, family=family, comm=world)
    if world.rank == 0:
        print_evaluation(result, arguments.json)
    return 0


def print_evaluation(result: dict[str, str | float | int], as_json: bool) -> None:
    """Print the result for a program or for a person."""
    if as_json:
        print(json.dumps(result))
        return
    print(f"{'split':16}{result['split']}, {result['tokens']:,} tokens")
    print(f"{'loss':16}{result['loss']:.4f} nats per token")
    print(f"{'perplexity':16}{result['perplexity']:.3f}")
    print(f"{'bits per byte':16}{result['bits_per_byte']:.4f}")


EVALUATE = Command(EVALUATE_SUMMARY, EVALUATE_EXAMPLE, configure_evaluate, run_evaluate, evaluate_together)


GENERATE_SUMMARY = "write text with a trained model"
GENERATE_EXAMPLE = """\
example:
    hiermpi generate runs/first --prompt "def main(" --tokens 200 --temperature 0.8
    hiermpi generate runs/first --prompt "Once upon" --top-p 0.9 --seed 7
    echo "Once upon" | hiermpi generate runs/first --prompt -

Text appears as it is written. The same seed gives the same text."""


def configure_generate(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument("source", type=Path, metavar="RUN_OR_CKPT", help="run folder (its newest checkpoint) or file")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="text to continue; - reads it from stdin")
    parser.add_argument("--tokens", type=int, default=200, metavar="N", help="tokens to write (default: 200)")
    parser.add_argument(
        "--temperature", type=float, default=0.8, metavar="T", help="0 takes the likeliest token (default: 0.8)"
    )
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="choose among the K likeliest (default: all)")
    parser.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="choose among the likeliest that together have probability P (default: 1, all)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed of the choices (default: 0)")
    add_family_argument(parser)


def run_generate(arguments: argparse.Namespace) -> int:
    """Write the prompt to stdout, and each piece of its continuation as it is generated."""
    import codecs
    import sys

    from hiermpi.data.tokenizers import tokenizer_from_json
    from hiermpi.errors import UsageError
    from hiermpi.model.contract import family_of
    from hiermpi.model.generation import Sampling, generate
    from hiermpi.storage.checkpoint import model_config
    from hiermpi.training.opening import load_model, open_checkpoint

    check_generate(arguments)
    text = sys.stdin.buffer.read() if arguments.prompt == "-" else arguments.prompt.encode(errors="surrogateescape")
    if not text:
        raise UsageError("--prompt is empty: give at least one character to continue")
    checkpoint = open_checkpoint(arguments.source)
    tokenizer = tokenizer_from_json(checkpoint.tokenizer)
    if tokenizer.kind != "bytes":
        try:
            text.decode()
        except UnicodeDecodeError as error:
            raise UsageError(f"--prompt is not UTF-8 (byte {error.start}): write it in UTF-8") from None
    prompt = [int(token) for token in tokenizer.encode(text)]
    shape = model_config(checkpoint)
    model = load_model(checkpoint, family=family_of(shape, given_family(arguments), arguments.source))
    how = Sampling(arguments.temperature, arguments.top_k, arguments.top_p)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    sys.stdout.write(decoder.decode(text))
    sys.stdout.flush()
    size = tokenizer.vocab_size
    for token in generate(model, prompt, arguments.tokens, arguments.seed, how, shape.context_length, size):
        sys.stdout.write(decoder.decode(tokenizer.decode([token])))
        sys.stdout.flush()
    sys.stdout.write(decoder.decode(b"", True) + "\n")
    return 0


def check_generate(arguments: argparse.Namespace) -> None:
    """Refuse numbers outside their range. Raises UsageError."""
    import math

    from hiermpi.errors import UsageError

    if arguments.tokens < 0 or arguments.top_k < 0 or arguments.seed < 0:
        raise UsageError("--tokens, --top-k and --seed: expected 0 or more")
    if not math.isfinite(arguments.temperature) or arguments.temperature < 0:
        raise UsageError(f"--temperature {arguments.temperature}: expected 0 or more")
    if not 0.0 < arguments.top_p <= 1.0:
        raise UsageError(f"--top-p {arguments.top_p}: expected more than 0 and at most 1")


GENERATE = Command(GENERATE_SUMMARY, GENERATE_EXAMPLE, configure_generate, run_generate)
