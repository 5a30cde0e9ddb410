"""The table at the end of a run: where the time went, by phase and role, and who computed how much."""

from collections.abc import Sequence
from typing import Any

from hiermpi.communication.communicators import Communicators
from hiermpi.communication.objects import gather_objects
from hiermpi.hierarchy.topology import Role
from hiermpi.training.faults import PHASES
from hiermpi.training.trainer import Trainer


def gather_ranks(trainer: Trainer, comms: Communicators, host: str) -> list[dict[str, Any]] | None:
    """One record per rank, at the root; None elsewhere. Collective over the world."""
    phases = trainer.phases
    record = {
        "rank": comms.rank,
        "role": str(comms.role),
        "group": comms.group_index,
        "host": host,
        "sequences": trainer.sequences,
        "tokens": trainer.tokens,
        "phases": {name: round(seconds, 6) for name, seconds in phases.seconds.items()},
        "waits": {name: round(seconds, 6) for name, seconds in phases.waits.items()},
        "cpu": {name: round(seconds, 6) for name, seconds in phases.cpu.items()},
    }
    return gather_objects(comms.world, record, comms.waiter)


def phase_table(records: Sequence[dict[str, Any]]) -> list[str]:
    """Lines: seconds of work per phase for each role (mean over its ranks), then waiting and utilisation."""
    by_role = {role: [r for r in records if r["role"] == role] for role in Role}
    roles = [role for role in Role if by_role[role]]
    heads = {role: f"{len(by_role[role])} {role}{'s' if len(by_role[role]) > 1 else ''}" for role in roles}
    lines = ["seconds of work".ljust(20) + "".join(heads[role].rjust(14) for role in roles)]

    def line(name: str, values: Sequence[float], pattern: str = "{:.2f}") -> str:
        return name.ljust(20) + "".join(pattern.format(value).rjust(14) for value in values)

    def work(record: dict[str, Any], phase: str) -> float:
        return record["phases"][phase] - record["waits"][phase]

    for phase in PHASES:
        values = [mean(work(r, phase) for r in by_role[role]) for role in roles]
        if any(value >= 0.005 for value in values):
            lines.append(line(phase, values))
    waits = [mean(sum(r["waits"].values()) for r in by_role[role]) for role in roles]
    lines.append(line("waiting", waits))
    shares = [
        mean(100 * work(r, "compute") / max(sum(r["phases"].values()), 1e-9) for r in by_role[role]) for role in roles
    ]
    lines.append(line("computing", shares, "{:.0f} %"))
    return lines


def load_lines(loads: Sequence[int], computes_on_root: bool) -> list[str]:
    """Lines: sequences that each group has computed."""
    names = [f"g{index}" for index in range(len(loads) - 1)] + ["root"]
    shown = list(zip(names, loads, strict=True))
    if not computes_on_root:
        shown.pop()
    rows = [shown[i : i + 7] for i in range(0, len(shown), 7)]
    text = ["  ".join(f"{name} {count:,}" for name, count in row) for row in rows]
    return [("sequences" if not i else "").ljust(20) + line for i, line in enumerate(text)]


def mean(values: Any) -> float:
    """Arithmetic mean; 0 of nothing."""
    listed = list(values)
    return sum(listed) / len(listed) if listed else 0.0
