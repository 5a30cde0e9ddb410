"""Where the measures of a machine are kept between ``bench reduce`` and ``plan``."""

import os
from pathlib import Path

from hiermpi.errors import UsageError
from hiermpi.files import told, write_bytes, write_whole
from hiermpi.planning.cost import Machine, machine_from_json


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
