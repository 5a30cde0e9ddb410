"""What ``hiermpi bench reduce`` measured of a machine, and the file in which ``plan`` finds it."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from hiermpi.errors import UsageError
from hiermpi.files import told, write_bytes, write_whole


class Line(NamedTuple):
    """Seconds of a sum and a broadcast: ``latency + bytes / rate``."""

    latency: float
    rate: float
    """Bytes that cross between ranks, up and down, a second."""


@dataclasses.dataclass(frozen=True)
class Machine:
    """What was measured of one node."""

    host: str
    date: str
    cores: int
    """Usable ones of a node."""
    ranks: int
    """With which it was measured."""
    token_flops: float
    """Of a token of the model that was measured, as the model's family counts them; 0 where it does not."""
    token_seconds: float
    """Of computing a token of it on one core, all cores being busy."""
    call_seconds: float
    """Of a micro-batch besides its tokens."""
    sum_rate: float
    """Bytes a second that the node's cores together read and write in summing gradients in memory."""
    optimize_seconds: float
    """Of norm and AdamW per parameter on one core."""
    batch_seconds: float
    """Of the root's preparing a sequence."""
    overhead_seconds: float
    """Of a step besides all this."""
    crowded_overhead_seconds: float
    """More of it for each rank, on one core, where ranks share cores and take turns."""
    root_seconds: float
    """CPU of the root a step for everything but computing and preparing sequences, at ``ranks``."""
    tree: Line
    flat: Line

    def to_json(self) -> str:
        """As a JSON object."""
        return json.dumps(dataclasses.asdict(self) | {"tree": self.tree, "flat": self.flat}, indent=1) + "\n"


def machine_from_json(text: str | bytes) -> Machine:
    """A machine as :meth:`Machine.to_json` wrote it. Raises ValueError that names what is wrong."""
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError("it is not a JSON object")
    values: dict[str, Any] = {}
    for field in dataclasses.fields(Machine):
        value = found.get(field.name)
        if field.type is Line:
            if not (isinstance(value, list) and len(value) == 2 and all(_is_amount(x) for x in value)):
                raise ValueError(f"{field.name} is not two numbers")
            values[field.name] = Line(*value)
        elif field.type is str:
            values[field.name] = str(value)
        elif not isinstance(value, int | float) or not _is_amount(value) or (field.type is int and value < 1):
            raise ValueError(f"{field.name} is not a positive number")
        else:
            values[field.name] = value
    return Machine(**values)


def _is_amount(value: object) -> bool:
    return isinstance(value, int | float) and 0 <= value < float("inf")


def default_path() -> Path:
    """In the user's configuration folder (XDG base directory specification)."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "hiermpi" / "machine.json"


def keep_machine(path: Path, machine: Machine) -> None:
    """Write the file, and the folder it is in. Raises UserError."""
    with told(path.parent, "make the folder"):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda descriptor: write_bytes(descriptor, machine.to_json().encode()))


def read_machine(path: Path | None) -> Machine | None:
    """The machine in ``path``; by default in :func:`default_path`, None where that is not there. Raises UserError."""
    place = path or default_path()
    if path is None and not place.exists():
        return None
    with told(place, "read"):
        text = place.read_bytes()
    try:
        return machine_from_json(text)
    except ValueError as error:
        raise UsageError(
            f"{place} is not what hiermpi bench reduce wrote ({error}): measure again, or name another with --machine"
        ) from None
