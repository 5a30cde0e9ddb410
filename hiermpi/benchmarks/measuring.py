"""The module times methods alternately, formats the results, and compares every kernel in numpy and compiled."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hiermpi.kernels import Kernels, available_levels, load_kernels
from hiermpi.kernels.layers import padded


def interleaved(
    methods: Mapping[str, Callable[[], object]],
    rounds: int,
    between: Callable[[], None] = lambda: None,
    warm_up: Mapping[str, Callable[[], object]] | None = None,
) -> dict[str, list[float]]:
    """Return the seconds of each call of each method; the methods alternate, so that noise affects all alike.

    Args:
        methods: The methods to time; each is called once untimed first.
        rounds: The number of timed calls of each method.
        between: The function to call before each call (a barrier, on several ranks).
        warm_up: The functions to call untimed right before each call, which restore the caches and pages that the other
            methods displaced.
    """
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for turn in range(rounds + 1):
        for name, method in methods.items():
            between()
            if warm_up is not None:
                warm_up[name]()
            start = time.perf_counter()
            method()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def row(method: str, ranks: int, n: int, seconds: Sequence[float], **more: Any) -> dict[str, Any]:
    """Return one row of ``--json``: median and quartiles of a method in seconds.

    Args:
        method: The name of the method.
        ranks: The number of ranks that took part.
        n: The size of the problem (floats, tokens).
        seconds: The seconds of each call.
        more: Further keys of the row.
    """
    q1, median, q3 = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else [seconds[0]] * 3
    return {"method": method, "ranks": ranks, "n": n, "median_s": median, "q1_s": q1, "q3_s": q3, **more}


def table(rows: Sequence[Mapping[str, Any]], ratios: Mapping[str, float], extra: str = "") -> str:
    """Write rows and ratios as a text for a person.

    Args:
        rows: The rows, as :func:`row` makes them.
        ratios: The ratios by name.
        extra: A further key of the rows to show.
    """
    width = max(len(r["method"]) for r in rows) + 2
    lines = [f"{'method':{width}}{'ranks':>6}{'n':>12}{'median ms':>12}{'quartiles ms':>22}  {extra}"]
    for r in rows:
        quartiles = f"{1e3 * r['q1_s']:.3f} .. {1e3 * r['q3_s']:.3f}"
        shown = f"{r[extra]:,.1f}" if extra in r else ""
        lines.append(
            f"{r['method']:{width}}{r['ranks']:>6}{r['n']:>12,}{1e3 * r['median_s']:>12.3f}{quartiles:>22}  {shown}"
        )
    lines += ["", *(f"{name:{width + 30}}{value:.2f}" for name, value in ratios.items())]
    return "\n".join(lines)


SHAPES = {"nano": (12, 64, 4, 32), "medium": (8, 256, 6, 64)}
"""The sizes B, T, H, D: nanoGPT's CPU configuration, and 6 heads of 64 at 256 tokens."""
VOCABULARY = 256


def bench_kernels(rounds: int = 15) -> dict[str, Any]:
    """Return rows per kernel, level and shape, and the ratios of numpy's median to the best level's."""
    kernels: dict[str, Kernels] = {"numpy": load_kernels("numpy")}
    kernels |= {level: load_kernels(level) for level in available_levels()}
    rows, ratios = [], {}
    for shape_name, shape in SHAPES.items():
        calls = {level: calls_of(chosen, shape) for level, chosen in kernels.items()}
        for kernel in calls["numpy"]:
            seconds = interleaved({level: calls[level][kernel] for level in calls}, rounds)
            made = [row(f"{kernel} {shape_name} {level}", 1, shape[0] * shape[1], s) for level, s in seconds.items()]
            rows += made
            ratios[f"{kernel} {shape_name}: numpy / {list(calls)[-1]}"] = made[0]["median_s"] / made[-1]["median_s"]
    return {"rows": rows, "ratios": ratios}


def calls_of(kernels: Kernels, shape: tuple[int, int, int, int]) -> dict[str, Callable[[], object]]:
    """Return one call per kernel on arrays of its own."""
    batch, length, heads, width = shape
    rows, channels = batch * length, heads * width
    generator = np.random.default_rng(0)

    def some(*sizes: int) -> NDArray[np.float32]:
        return generator.standard_normal(sizes, np.float32)

    x, y, out, wide = some(rows, channels), some(rows, channels), some(rows, channels), some(rows, 4 * channels)
    active, mean, rstd = np.empty_like(wide), some(rows), np.abs(some(rows))
    weight, bias, wide_bias = some(channels), some(channels), np.zeros(4 * channels, np.float32)
    qkv, dqkv, qkv_bias = some(rows, 3 * channels), some(rows, 3 * channels), some(3 * channels)
    p = np.zeros((batch, heads, padded(length), padded(length)), np.float32)
    logits, targets = some(rows, VOCABULARY), generator.integers(0, VOCABULARY, rows).astype(np.int32)
    inputs = generator.integers(0, VOCABULARY, (batch, length)).astype(np.int32)
    table, positions = some(VOCABULARY, channels), some(length, channels)
    vectors = [some(12 * channels * channels) for _ in range(3)] + [np.abs(some(12 * channels * channels))]
    blocks = np.array([[0, len(vectors[0])]], np.int64)
    sums = np.zeros(1)

    def adamw() -> None:
        parameters, gradients, m, v = vectors
        numbers = (1e-3, 0.9, 0.99, 1e-8, 1.0, 1e-8, 1.0)
        kernels.adamw((parameters, m, v, parameters, gradients, m, v), *numbers)

    square, product = some(channels, 4 * channels), np.empty((rows, 4 * channels), np.float32)
    up = np.ascontiguousarray(square.T)
    turned, gradient = np.empty((rows, channels), np.float32), np.empty((channels, 4 * channels), np.float32)
    return {
        "product": lambda: kernels.product(product, x, square),
        "product_input_gradient": lambda: kernels.product(turned, wide, square.T),
        "product_weight_gradient": lambda: kernels.product(gradient, x.T, wide, True),
        "product_gelu": lambda: kernels.product_gelu(active, product, x, square, wide_bias),
        "product_slope": lambda: kernels.product_slope(active, wide_bias, x, up, product),
        "embed_forward": lambda: kernels.embed_forward(out, inputs, table, positions),
        "embed_backward": lambda: kernels.embed_backward(table, positions, x, inputs),
        "norm_forward": lambda: kernels.norm_forward(out, mean, rstd, x, weight, bias),
        "residual_norm_forward": lambda: kernels.residual_norm_forward(y, out, mean, rstd, x, x, bias, weight, bias),
        "norm_backward": lambda: kernels.norm_backward(out, bias, bias, None, y, x, mean, rstd, weight, True),
        "gelu_forward": lambda: kernels.gelu_forward(active, wide, wide_bias),
        "gelu_backward": lambda: kernels.gelu_backward(active, wide_bias, wide),
        "attention_forward": lambda: kernels.attention_forward(out, p, qkv, qkv_bias, shape),
        "attention_backward": lambda: kernels.attention_backward(dqkv, qkv_bias, x, p, qkv, qkv_bias, shape),
        "cross_entropy": lambda: kernels.cross_entropy(logits, targets, True),
        "adamw": adamw,
        "norm_blocks": lambda: kernels.block_sums(sums, vectors[1], blocks),
    }
