"""``hiermpi generate``: text from a trained model."""

import argparse
from pathlib import Path

from hiermpi.commands import Command, add_family_argument, given_family

SUMMARY = "write text with a trained model"
EXAMPLE = """\
example:
    hiermpi generate runs/first --prompt "def main(" --tokens 200 --temperature 0.8
    hiermpi generate runs/first --prompt "Once upon" --top-p 0.9 --seed 7
    echo "Once upon" | hiermpi generate runs/first --prompt -

Text appears as it is written. The same seed gives the same text."""


def configure(parser: argparse.ArgumentParser) -> None:
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


def run(arguments: argparse.Namespace) -> int:
    """Write the prompt and what follows it to stdout, as it comes."""
    import codecs
    import sys

    from hiermpi.data.tokenizers import tokenizer_from_json
    from hiermpi.errors import UsageError
    from hiermpi.model.generation import Sampling, generate
    from hiermpi.storage.checkpoint import model_config
    from hiermpi.training.opening import family_of, load_model, open_checkpoint

    check(arguments)
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


def check(arguments: argparse.Namespace) -> None:
    """Refuse numbers that mean nothing. Raises UsageError."""
    import math

    from hiermpi.errors import UsageError

    if arguments.tokens < 0 or arguments.top_k < 0 or arguments.seed < 0:
        raise UsageError("--tokens, --top-k and --seed: expected 0 or more")
    if not math.isfinite(arguments.temperature) or arguments.temperature < 0:
        raise UsageError(f"--temperature {arguments.temperature}: expected 0 or more")
    if not 0.0 < arguments.top_p <= 1.0:
        raise UsageError(f"--top-p {arguments.top_p}: expected more than 0 and at most 1")


GENERATE = Command(SUMMARY, EXAMPLE, configure, run)
