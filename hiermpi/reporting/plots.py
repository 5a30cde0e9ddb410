"""Plots of runs (extra ``report``) are legible in black and white: line styles and hatches carry the meaning."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hiermpi.errors import UserError
from hiermpi.files import file_errors, whole_path
from hiermpi.reporting.reading import RunRecord
from hiermpi.reporting.tables import ROLES, mean, own_share, verdict, work

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZE = (7.5, 4.2)
DPI = 150
WITHOUT_CORE = "compute, without a core"
"""The name of the time in the compute phase in which other ranks had the core."""
HATCHES = {
    "compute": "",
    "waiting": "...",
    "batch": "///",
    "scatter": "\\\\\\",
    "reduce": "xxx",
    "optimize": "+++",
    "broadcast": "---",
    "commit": "ooo",
    "evaluate": "||",
    "checkpoint": "OO",
}
SHADES = {"compute": "0.25", "waiting": "1.0", WITHOUT_CORE: "0.6"}
STYLES = ("-", "--", ":", "-.")
SMALLEST_SHARE = 0.005


def make_plots(runs: Sequence[RunRecord], folder: Path) -> list[Path]:
    """Draw the plots of one run, or the comparison of several, and return their paths. Raises UserError."""
    try:
        import matplotlib as mpl
    except ImportError:
        raise UserError("plots need matplotlib: pip install 'hiermpi[report]', or add --no-plots") from None
    mpl.use("Agg")
    figures = {"compare": compare_figure(runs)} if len(runs) > 1 else figures_of(runs[0])
    with file_errors(folder, "make the folder"):
        folder.mkdir(parents=True, exist_ok=True)
    made = []
    for name, figure in figures.items():
        path = folder / f"{name}.png"
        with file_errors(path, "write"), whole_path(path) as temporary:
            figure.savefig(temporary, dpi=DPI, format="png")
        made.append(path)
    return made


def figures_of(run: RunRecord) -> dict[str, "Figure"]:
    """Draw the plots of one run, and return them by name."""
    figures = {"loss": loss_figure(run)}
    if run.ranks:
        figures["time"] = time_figure(run)
        figures["tree"] = tree_figure(run)
    if run.root is not None and len(run.root.get("loads") or ()) > 1:
        figures["groups"] = groups_figure(run)
    return figures


def new_figure(title: str, size: tuple[float, float] = SIZE) -> tuple["Figure", "Axes"]:
    """Make a figure with one pair of axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.set_title(title)
    return figure, axes


def loss_figure(run: RunRecord) -> "Figure":
    """Draw training and validation loss, and the learning rate, over the steps."""
    figure, axes = new_figure(f"{run.name}: loss and learning rate")
    steps, losses = columns(run.losses)
    axes.plot(steps, losses, color="0.75", linewidth=0.7, label="training, each step")
    axes.plot(steps, smoothed(losses), color="black", linewidth=1.3, label="training, smoothed")
    if run.validations:
        axes.plot(*columns(run.validations), "ks", markersize=6, fillstyle="none", label="validation")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.set_ylim(*loss_limits(losses, [v for _, v in run.validations]))
    rates = [(row["step"], row["learning_rate"]) for row in run.metrics if row.get("learning_rate") is not None]
    right = axes.twinx()
    right.plot(*columns(rates), color="0.45", linestyle="--", linewidth=1.0, label="learning rate")
    right.set_ylabel("learning rate (dashed)")
    right.set_ylim(0, None)
    right.ticklabel_format(axis="y", scilimits=(-2, 2))
    handles = [*axes.get_legend_handles_labels()[0], *right.get_legend_handles_labels()[0]]
    axes.legend(handles=handles, loc="upper right", framealpha=0.9)
    return figure


def time_figure(run: RunRecord) -> "Figure":
    """Draw the milliseconds of a step by phase, stacked, for each role; the title names what limits the run."""
    limit = textwrap.fill(f"limited by {verdict(run.ranks)}", 80)
    figure, axes = new_figure(f"{run.name}: where a step's time goes\n{limit}")
    axes.title.set_fontsize("medium")
    roles = [role for role in ROLES if any(r["role"] == role for r in run.ranks)]
    steps = max(steps_of(run), 1)
    parts = phase_parts(run, roles, steps)
    left = np.zeros(len(roles))
    totals = sum(parts.values(), np.zeros(len(roles)))
    shown = {name: values for name, values in parts.items() if (values >= SMALLEST_SHARE * totals.max()).any()}
    for name, values in shown.items():
        shade = SHADES.get(name, "0.85")
        axes.barh(
            np.arange(len(roles)), values, left=left, color=shade, edgecolor="black", hatch=HATCHES.get(name, ""),
            linewidth=0.6, label=name,
        )  # fmt: skip
        for row, value in enumerate(values):
            if value > 0.09 * totals.max():
                colour = "white" if name == "compute" else "black"
                box = None if name == "compute" else {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
                axes.text(left[row] + value / 2, row, f"{value:.1f}", ha="center", va="center", color=colour, bbox=box)
        left += values
    counts = [sum(r["role"] == role for r in run.ranks) for role in roles]
    names = [f"{count} {role}{'s' if count > 1 else ''}" for role, count in zip(roles, counts, strict=True)]
    axes.set_yticks(np.arange(len(roles)), names)
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds per step (mean over the role's ranks)")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=4, handlelength=2.5)
    return figure


def phase_parts(run: RunRecord, roles: Sequence[str], steps: int) -> dict[str, NDArray[np.float64]]:
    """Compute the milliseconds per step of each phase's work, and of waiting, for each role.

    Args:
        run: The record of the run.
        roles: The names of the roles, in the order of the arrays.
        steps: The number of steps that the records cover.
    """

    def each(value: Any) -> NDArray[np.float64]:
        return np.array([1e3 / steps * mean(value(r) for r in run.ranks if r["role"] == role) for role in roles])

    phases = [name for name in run.ranks[0]["phases"] if name != "compute"]
    on_core = each(lambda r: min(work(r, "compute"), r["cpu"]["compute"] or work(r, "compute")))
    parts = {"compute": on_core, WITHOUT_CORE: each(lambda r: work(r, "compute")) - on_core}
    parts |= {name: each(lambda r, name=name: work(r, name)) for name in phases}
    parts["waiting"] = each(lambda r: sum(r["waits"].values()))
    return parts


def groups_figure(run: RunRecord) -> "Figure":
    """Draw the number of sequences that each group computed."""
    root = run.root
    assert root is not None
    figure, axes = new_figure(f"{run.name}: load per symmetry group")
    loads = root["loads"] if root["sequences"] else root["loads"][:-1]
    names = [str(index) for index in range(len(root["loads"]) - 1)] + (["root"] if root["sequences"] else [])
    axes.bar(np.arange(len(loads)), loads, color="0.7", edgecolor="black", linewidth=0.6)
    even = sum(loads) / len(loads)
    axes.axhline(even, color="black", linestyle="--", linewidth=1.0, label=f"even: {even:,.0f}")
    share, uniform = own_share(root)
    routing = run.config.get("hierarchy.routing", "?")
    axes.set_title(f"{run.name}: load per group, {routing} routing; {share:.1%} own tokens ({uniform:.1%} if blind)")
    axes.set_xticks(np.arange(len(loads)), names)
    axes.set_xlabel("symmetry group")
    axes.set_ylabel("sequences computed")
    axes.set_ylim(0, 1.15 * max(*loads, 1))
    axes.legend(loc="upper right")
    return figure


def tree_figure(run: RunRecord) -> "Figure":
    """Draw the ranks as a tree, each as dark as the share of its time that it computed."""
    groups: dict[int, list[dict[str, Any]]] = {}
    for record in run.ranks:
        groups.setdefault(record.get("group", -1), []).append(record)
    columns_ = [sorted(members, key=lambda r: r["rank"]) for index, members in sorted(groups.items()) if index >= 0]
    deepest = max((len(members) for members in columns_), default=1)
    figure, axes = new_figure(
        f"{run.name}: {len(run.ranks)} ranks; number: rank, darkness: share of time computing",
        (max(SIZE[0], 0.62 * len(columns_) + 1.0), 2.4 + 0.42 * deepest),
    )
    shares = {r["rank"]: work(r, "compute") / max(sum(r["phases"].values()), 1e-9) for r in run.ranks}

    def node(record: dict[str, Any], x: float, y: float) -> None:
        share = shares[record["rank"]]
        kind = {"root": "s", "control": "D"}.get(record["role"], "o")
        axes.plot(x, y, kind, color=str(1 - 0.85 * share), markeredgecolor="black", markersize=19, zorder=2)
        axes.text(
            x, y, str(record["rank"]), ha="center", va="center", fontsize=8,
            color="white" if share > 0.45 else "black", zorder=3,
        )  # fmt: skip

    middle = (len(columns_) - 1) / 2
    for x, members in enumerate(columns_):
        axes.plot([middle, x], [0, -1.4], color="0.5", linewidth=0.8, zorder=1)
        axes.plot([x, x], [-1.4, -1.4 - 0.9 * (len(members) - 1)], color="0.5", linewidth=0.8, zorder=1)
        for depth, record in enumerate(members):
            node(record, x, -1.4 - 0.9 * depth)
        axes.text(x, -2.2 - 0.9 * (deepest - 1), f"g{x}", ha="center", fontsize=8)
    for record in groups.get(-1, []):
        node(record, middle, 0)
    for marker, label in (("s", "root"), ("D", "control"), ("o", "worker")):
        if any(r["role"] == label for r in run.ranks):
            axes.plot([], [], marker, color="white", markeredgecolor="black", label=label)
    axes.set_xlim(-0.8, max(len(columns_), 1) - 0.2)
    axes.set_ylim(-2.5 - 0.9 * (deepest - 1), 0.8)
    axes.legend(loc="upper right", ncols=3)
    low, high = min(shares.values()), max(shares.values())
    axes.set_xlabel(f"computing {low:.0%} (lightest) to {high:.0%} (darkest) of the time")
    axes.set_xticks([])
    axes.set_yticks([])
    return figure


def compare_figure(runs: Sequence[RunRecord]) -> "Figure":
    """Draw the losses of several runs over steps and over time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 4.4), layout="constrained")
    by_step, by_time = figure.subplots(1, 2, sharey=True)
    everything: list[float] = []
    for index, run in enumerate(runs):
        steps, losses = columns(run.losses)
        seconds = np.cumsum([row["step_seconds"] for row in run.metrics if row["loss"] is not None])
        shade = str(0.55 * (index // len(STYLES) % 2))
        line = {"linestyle": STYLES[index % len(STYLES)], "color": shade, "linewidth": 1.3}
        by_step.plot(steps, smoothed(losses), label=str(run.path), **line)
        by_time.plot(seconds, smoothed(losses), **line)
        for step, value in run.validations:
            by_step.plot(step, value, "s", color=shade, markersize=5, fillstyle="none")
        everything += [*smoothed(losses), *(value for _, value in run.validations)]
    by_step.set_xlabel("step (squares: validation)")
    by_time.set_xlabel("seconds of training")
    by_step.set_ylabel("training loss, smoothed (nats per token)")
    by_step.set_ylim(*loss_limits(np.array(everything), []))
    figure.legend(loc="outside lower center", ncols=min(len(runs), 3))
    return figure


def steps_of(run: RunRecord) -> int:
    """Return the number of steps that the records of the ranks cover."""
    first, last = run.ranks[0].get("first_step", 0), run.ranks[0].get("last_step", run.metrics[-1]["step"])
    return int(last) - int(first)


def columns(pairs: Sequence[tuple[int, float]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return a list of pairs as two arrays."""
    table = np.array(pairs, np.float64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def smoothed(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return a centred running mean over about a fiftieth of the values, with a shorter window at the ends."""
    half = len(values) // 100
    total = np.concatenate([[0.0], np.cumsum(values)])
    first = np.maximum(np.arange(len(values)) - half, 0)
    last = np.minimum(np.arange(len(values)) + half + 1, len(values))
    return (total[last] - total[first]) / np.maximum(last - first, 1)


def loss_limits(losses: NDArray[np.float64], validations: Sequence[float]) -> tuple[float, float]:
    """Return the limits of the loss axis; the first steps may exceed them, the rest must be visible."""
    values = np.concatenate([losses, np.asarray(validations, np.float64)])
    if not len(values):
        return 0.0, 1.0
    low, start = float(values.min()), float(losses[0]) if len(losses) else float(values.max())
    high = max(float(np.quantile(values, 0.98)), low + 0.75 * (start - low))
    margin = 0.05 * max(high - low, 0.1)
    return low - margin, high + margin
