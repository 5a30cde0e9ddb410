"""``hiermpi generate``: text from a trained model."""

import argparse
from pathlib import Path

SUMMARY = "write text with a trained model"
EXAMPLE = """\
example:
    hiermpi generate runs/first --prompt "def main(" --tokens 200 --temperature 0.8
    echo "Once upon" | hiermpi generate runs/first --prompt -"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument("source", type=Path, metavar="RUN_OR_CKPT", help="run folder (its newest checkpoint) or file")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="text to continue; - reads it from stdin")
    parser.add_argument("--tokens", type=int, default=200, metavar="N", help="tokens to write (default: 200)")
    parser.add_argument(
        "--temperature", type=float, default=0.8, metavar="T", help="0 takes the likeliest token (default: 0.8)"
    )
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="choose among the K likeliest (default: all)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed of the choices (default: 0)")


def run(arguments: argparse.Namespace) -> int:
    """Write the prompt and what follows it to stdout, as it comes."""
    import codecs
    import math
    import sys

    from hiermpi.data.tokenizers import tokenizer_from_json
    from hiermpi.errors import UsageError
    from hiermpi.model.decoder import generate
    from hiermpi.training.loading import load_model, open_checkpoint

    if arguments.tokens < 0 or arguments.top_k < 0 or arguments.seed < 0:
        raise UsageError("--tokens, --top-k and --seed: expected 0 or more")
    if not math.isfinite(arguments.temperature) or arguments.temperature < 0:
        raise UsageError(f"--temperature {arguments.temperature}: expected 0 or more")
    text = sys.stdin.buffer.read() if arguments.prompt == "-" else arguments.prompt.encode(errors="surrogateescape")
    if not text:
        raise UsageError("--prompt is empty: give at least one character to continue")
    checkpoint = open_checkpoint(arguments.source)
    tokenizer = tokenizer_from_json(checkpoint.tokenizer)
    prompt = [int(token) for token in tokenizer.encode(text)]
    model = load_model(checkpoint)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    sys.stdout.write(decoder.decode(text))
    for token in generate(model, prompt, arguments.tokens, arguments.seed, arguments.temperature, arguments.top_k):
        sys.stdout.write(decoder.decode(tokenizer.decode([token] if token < tokenizer.vocab_size else [])))
        sys.stdout.flush()
    sys.stdout.write(decoder.decode(b"", True) + "\n")
    return 0
