"""Interleaved timing and the form of its results."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def interleaved(
    methods: Mapping[str, Callable[[], object]],
    rounds: int,
    between: Callable[[], None] = lambda: None,
    warm_up: Mapping[str, Callable[[], object]] | None = None,
) -> dict[str, list[float]]:
    """Seconds of each call, ``rounds`` of each method, the methods taking turns so that noise falls on all alike.

    Args:
        methods: what to time; each is called once untimed first.
        rounds: timed calls of each.
        between: called before each call (a barrier, on several ranks).
        warm_up: what to do untimed right before each call: while the others had their turns, caches and pages went.
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
    """One row of ``--json``: median and quartiles of a method.

    Args:
        method: its name.
        ranks: that took part.
        n: size of the problem (floats, tokens).
        seconds: of each call.
        more: further keys.
    """
    q1, median, q3 = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else [seconds[0]] * 3
    return {"method": method, "ranks": ranks, "n": n, "median_s": median, "q1_s": q1, "q3_s": q3, **more}


def table(rows: Sequence[Mapping[str, Any]], ratios: Mapping[str, float], extra: str = "") -> str:
    """Rows and ratios for a person; ``extra`` names a further key of the rows to show."""
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
