"""The tables show how a run's time was spent and which ranks computed how much, from the records of ranks.jsonl."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hiermpi.reporting.reading import RunRecord

Record = dict[str, Any]

ROLES = ("root", "control", "worker")
LABEL = 22
COLUMN = 14
MOST_STRAGGLERS = 5
STRAGGLES = 1.15
"""The seconds per sequence, relative to the median rank's, from which a rank is named as slow."""
COORDINATION = ("batch", "scatter", "reduce", "optimize", "broadcast", "commit")


def work(record: Record, phase: str) -> float:
    """Return the seconds of a phase in which the rank did not wait for another."""
    return record["phases"][phase] - record["waits"][phase]


def mean(values: Iterable[float]) -> float:
    """Return the arithmetic mean, or 0 for no values."""
    listed = list(values)
    return fmean(listed) if listed else 0.0


def phase_table(records: Sequence[Record]) -> list[str]:
    """Write the lines of work per phase in seconds for each role (mean of its ranks), waiting, CPU and utilisation."""
    by_role = {role: [r for r in records if r["role"] == role] for role in ROLES}
    roles = [role for role in ROLES if by_role[role]]
    heads = [f"{len(by_role[role])} {role}{'s' if len(by_role[role]) > 1 else ''}" for role in roles]
    lines = ["seconds of work".ljust(LABEL) + "".join(head.rjust(COLUMN) for head in heads)]

    def line(name: str, value: Callable[[Record], float], pattern: str = "{:.2f}") -> None:
        values = [mean(value(r) for r in by_role[role]) for role in roles]
        lines.append(name.ljust(LABEL) + "".join(pattern.format(v).rjust(COLUMN) for v in values))

    for phase in records[0]["phases"]:
        if any(mean(work(r, phase) for r in by_role[role]) >= 0.005 for role in roles):
            line(phase, lambda r, phase=phase: work(r, phase))  # type: ignore[misc]
    line("waiting", lambda r: sum(r["waits"].values()))
    line("CPU", lambda r: sum(r["cpu"].values()))
    line("computing", lambda r: 100 * work(r, "compute") / max(sum(r["phases"].values()), 1e-9), "{:.0f} %")
    return lines


def machine_lines(records: Sequence[Record]) -> list[str]:
    """Write the lines on how busy the cores were, and on the root's work relative to a worker's."""
    lines = []
    use = core_use(records)
    if use is not None:
        lines.append(f"{'cores':{LABEL}}{use[0]:.0%} computing, {use[1]:.0%} busy, of {use[2]} on {hosts(records)}")
    polling = sum(r.get("waiting_cpu") or 0.0 for r in records)
    if use is not None and polling:
        share = polling / (max(r["elapsed"] for r in records) * use[2])
        lines.append(f"{'waiting takes':{LABEL}}{share:.1%} of them")
    ratio = root_to_worker(records)
    if ratio is not None:
        lines.append(f"{'root : worker':{LABEL}}1 : {ratio:.1f}   (CPU: root's coordinating to a worker's computing)")
    return lines


def core_use(records: Sequence[Record]) -> tuple[float, float, int] | None:
    """Return (share of core time that computed, share that did anything, cores); None where it is not recorded."""
    if not all(r.get("elapsed") and r.get("cores") for r in records):
        return None
    cores = sum({r["host"]: r["cores"] for r in records}.values())
    available = max(r["elapsed"] for r in records) * cores
    computing = sum(r["cpu"]["compute"] for r in records) / available
    return computing, sum(sum(r["cpu"].values()) for r in records) / available, cores


def root_to_worker(records: Sequence[Record]) -> float | None:
    """Return the median worker's CPU seconds of computing per second of the root's coordinating; None for one rank."""
    root = next((r for r in records if r["role"] == "root"), None)
    others = [r for r in records if r["role"] == "worker" and r["sequences"]]
    others = others or [r for r in records if r["role"] == "control" and r["sequences"]]
    if root is None or not others:
        return None
    coordinating = sum(root["cpu"].get(phase, 0.0) for phase in COORDINATION)
    return median(r["cpu"]["compute"] for r in others) / max(coordinating, 1e-9)


def hosts(records: Sequence[Record]) -> str:
    """Write the number of hosts in words."""
    names = sorted({record["host"] for record in records})
    return names[0] if len(names) == 1 else f"{len(names)} hosts"


def load_lines(root: Record) -> list[str]:
    """Write the lines on how many sequences each group computed, and how many tokens were in their own group."""
    loads = root.get("loads") or []
    if len(loads) < 2:
        return []
    shown = [(f"g{index}", load) for index, load in enumerate(loads[:-1])]
    if root["sequences"]:
        shown.append(("root", loads[-1]))
    rows = [shown[i : i + 7] for i in range(0, len(shown), 7)]
    lines = [
        ("sequences" if not i else "").ljust(LABEL) + "  ".join(f"{name} {count:,}" for name, count in row)
        for i, row in enumerate(rows)
    ]
    if len(loads) > 2:
        share, uniform = own_share(root)
        lines.append(f"{'own-group tokens':{LABEL}}{share:.1%} (uniform: {uniform:.1%}, so {share / uniform:.1f}x)")
    return lines


def own_share(root: Record) -> tuple[float, float]:
    """Return the share of tokens that were computed in the group of their symmetry class, and that of blind routing."""
    return root["own_tokens"] / max(root["routed_tokens"], 1), 1 / max(len(root["loads"]) - 1, 1)


def sequence_seconds(records: Sequence[Record]) -> dict[int, float]:
    """Return the seconds per sequence of each rank that computed: CPU time where ranks share cores, else wall time.

    On a shared core the clock goes on while other ranks have it, so wall time would show which rank started first and
    not which one is slow.
    """
    ranks = Counter(r["host"] for r in records)

    def seconds(record: Record) -> float:
        shared = ranks[record["host"]] > (record.get("cores") or math.inf)
        return float(record["cpu"]["compute"]) if shared else work(record, "compute")

    return {r["rank"]: seconds(r) / r["sequences"] for r in records if r["sequences"]}


def straggler_lines(records: Sequence[Record]) -> list[str]:
    """Write the lines on the ranks, and the hosts, that need longest for a sequence."""
    pace = sequence_seconds(records)
    if len(pace) < 2:
        return []
    usual = median(pace.values())
    slow = sorted((rank for rank in pace if pace[rank] > STRAGGLES * usual), key=pace.__getitem__, reverse=True)
    by_rank = {r["rank"]: r for r in records}
    lines = [
        f"{'a sequence takes':{LABEL}}{1e3 * min(pace.values()):.2f} to {1e3 * max(pace.values()):.2f} ms, "
        f"median {1e3 * usual:.2f} ms"
    ]
    lines += [
        f"{'straggler' if not i else '':{LABEL}}rank {rank} ({by_rank[rank]['role']}) on {by_rank[rank]['host']}: "
        f"{1e3 * pace[rank]:.2f} ms, {pace[rank] / usual:.2f}x the median"
        for i, rank in enumerate(slow[:MOST_STRAGGLERS])
    ]
    names = sorted({r["host"] for r in records})
    if len(names) > 1:
        for name in names:
            here = [pace[r["rank"]] for r in records if r["host"] == name and r["rank"] in pace]
            if here:
                lines.append(f"{'host ' + name:{LABEL}}{1e3 * median(here):.2f} ms on {len(here)} ranks")
    return lines


def verdict(records: Sequence[Record]) -> str:
    """Write one sentence on what limits the run."""
    total = sum(sum(r["phases"].values()) for r in records)
    computing = sum(work(r, "compute") for r in records) / max(total, 1e-9)
    waiting = sum(sum(r["waits"].values()) for r in records) / max(total, 1e-9)
    use = core_use(records)
    if use is not None and len(records) > use[2] and use[1] > 0.8:
        return (
            f"the {use[2]} cores: {len(records)} ranks keep them {use[1]:.0%} busy, {use[0]:.0%} with computing; "
            "more cores would help, more ranks would not"
        )
    if computing >= 0.85:
        return f"computing, {computing:.0%} of all ranks' time: more cores would help"
    busiest = max(records, key=lambda r: sum(r["phases"].values()) - sum(r["waits"].values()))
    shares = {p: sum(work(r, p) for r in records) / max(total, 1e-9) for p in records[0]["phases"] if p != "compute"}
    other = max(shares, key=shares.__getitem__)
    if waiting > max(shares.values()):
        root = next(r for r in records if r["role"] == "root")
        alone = {p: work(root, p) for p in ("batch", "optimize", "checkpoint") if p in root["phases"]}
        most = max(alone, key=alone.__getitem__)
        if alone[most] > 0.5 * waiting * sum(root["phases"].values()):
            return f"the root: all wait {waiting:.0%} of their time, mostly while it does {most}"
        return (
            f"waiting, {waiting:.0%} of all ranks' time, most of it for the slowest (rank {busiest['rank']} on "
            f"{busiest['host']} works longest): a larger train.batch_size shares the load more evenly"
        )
    return f"{other}, {shares[other]:.0%} of all ranks' time beside {computing:.0%} computing"


def report_text(run: "RunRecord") -> str:
    """Write everything about one run as a text."""
    return "\n".join(report_lines(run))


def report_lines(run: "RunRecord") -> list[str]:
    """Write the lines of :func:`report_text`."""
    figures = run.summary()
    state = "done" if run.done else "not done: the same command again continues"
    lines = [
        f"{'run':{LABEL}}{run.path}",
        f"{'state':{LABEL}}step {figures['step']:,} of {figures['steps'] or '?'}, {state}",
        f"{'model':{LABEL}}{shape(run.config)}",
        f"{'tokens':{LABEL}}{figures['tokens']:,}, {figures['tokens_per_second'] or 0:,.0f} a second (median)",
        f"{'step':{LABEL}}{1e3 * figures['step_seconds']:.1f} ms (median)",
        f"{'training loss':{LABEL}}{number(figures['loss'])} nats per token (mean of the last steps)",
    ]
    if figures["val_loss"] is not None:
        lines.append(
            f"{'validation loss':{LABEL}}{number(figures['val_loss'])} nats per token, best "
            f"{number(figures['best_val_loss'])} at step {figures['best_val_step']:,}"
        )
    if figures["skipped_steps"]:
        lines.append(f"{'skipped steps':{LABEL}}{figures['skipped_steps']} (loss or gradient was not finite)")
    if not run.ranks:
        return [*lines, "", "no ranks.jsonl: it is written when a run ends in order"]
    since = run.ranks[0].get("first_step")
    lines += ["", f"time of the last start{f', after step {since}' if since else ''}", *phase_table(run.ranks)]
    lines += machine_lines(run.ranks)
    lines += [f"{'what limits it':{LABEL}}{verdict(run.ranks)}"]
    if run.root is not None and run.root.get("loads"):
        lines += ["", *load_lines(run.root)]
    return lines + straggler_lines(run.ranks)


def comparison_table(runs: Sequence["RunRecord"]) -> str:
    """Write the table of the runs side by side."""
    width = max(len(str(run.path)) for run in runs) + 2
    lines = [f"{'run':{width}}{'step':>8}{'ranks':>8}{'loss':>10}{'val':>10}{'best val':>10}{'tokens/s':>12}"]
    for run in runs:
        f = run.summary()
        lines.append(
            f"{run.path!s:{width}}{f['step']:8,}{f['ranks'] or '-':>8}{number(f['loss']):>10}"
            f"{number(f['val_loss']):>10}{number(f['best_val_loss']):>10}{f['tokens_per_second'] or 0:12,.0f}"
        )
    return "\n".join(lines)


def shape(config: dict[str, Any]) -> str:
    """Write the model and the batch in words."""
    if not config:
        return "not known: config.toml is missing"
    get = config.get
    return (
        f"{get('model.n_layer')} layers, {get('model.n_head')} heads, {get('model.n_embd')} wide, context "
        f"{get('model.context_length')}, vocabulary {get('model.vocab_size'):,}; "
        f"batch of {get('train.batch_size')} sequences"
    )


def number(value: float | None) -> str:
    """Write a loss, or a dash for None."""
    return "-" if value is None else f"{value:.4f}"
