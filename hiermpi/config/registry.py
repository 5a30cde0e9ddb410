"""The registries name everything that can be chosen, and import what comes from outside the package.

A setting such as ``optimizer.rule`` takes one of the names registered here, or ``package.module:object`` for code
of the user's own. One more rule, reduction, format or command of hiermpi's is one file and one line here. Every object
is imported when it is used, so that this module depends on no other package of hiermpi.

Objects from outside are imported only for a text that the user wrote: on the command line, in the environment, in the
TOML file, or in a call of the Python API. A name that stands in a checkpoint or dataset is compared with these, and
never imported.
"""

import difflib
import importlib
import os
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from hiermpi.errors import UsageError

OUTSIDE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
"""The form of the path of an object, ``package.module:object``."""


class Registry(Mapping[str, Any]):
    """A mapping of names to objects, each of which is imported when it is requested.

    Args:
        setting: The name of the choice for the user, such as ``optimizer.rule``; it stands in messages.
        places: The path of each object, ``package.module:object``, by its name.
    """

    def __init__(self, setting: str, places: Mapping[str, str]) -> None:
        self.setting = setting
        self._places = dict(places)
        self._own = set(places)

    def __getitem__(self, name: str) -> Any:
        return import_object(self._places[name], self.setting)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def add(self, name: str, place: str) -> None:
        """Register an object of the user's own under ``name``, for this process."""
        self._places[name] = place
        self._own.discard(name)

    def outside(self, choice: Any) -> str:
        """Return the user's text for an object from outside the package, or an empty text for one of the package.

        Args:
            choice: A registered name, ``package.module:object``, or the object itself.
        """
        if isinstance(choice, str):
            return "" if choice in self._own else choice
        named = choice if hasattr(choice, "__qualname__") else type(choice)
        return f"{named.__module__}:{named.__qualname__.rpartition('<locals>.')[2]}"

    def name_of(self, choice: Any, named: str) -> str:
        """Return the text that stands for a choice; ``named`` where the choice is None."""
        if choice is None or isinstance(choice, str):
            return choice or named
        return self.outside(choice)

    def called(self, made: Any, choice: Any) -> str:
        """Return how messages name an object that was made for a choice; an empty text for one of the package.

        Args:
            made: The object.
            choice: The text in the setting, which a program may have replaced by an object.
        """
        module = str(getattr(made, "__module__", ""))
        if module.partition(".")[0] == "hiermpi":
            return ""
        return f"{self.setting} = {self.outside(choice) or self.outside(made)}"

    def blamed(self, choice: Any) -> str:
        """Return how messages name a choice from outside the package; an empty text for one of the package."""
        return self.described(choice) if self.outside(choice) else ""

    def described(self, choice: Any) -> str:
        """Return the text by which messages name a choice, such as ``optimizer.rule = adamw``."""
        return f"{self.setting} = {self.outside(choice) or choice}"

    def check(self, text: str) -> None:
        """Refuse a text that is neither a registered name nor the path of an object. Raises UsageError."""
        if text not in self._places and not OUTSIDE.fullmatch(text):
            near = difflib.get_close_matches(text, self._places, n=1)
            hint = f'; did you mean "{near[0]}"?' if near else ""
            raise UsageError(
                f"{self.setting} = {text!r}: expected one of {', '.join(self._places)}, or package.module:object of "
                f"your own{hint}"
            )

    def load(self, text: str) -> Any:
        """Import the object that ``text`` names: a registered name, or ``package.module:object``.

        Raises:
            UsageError: The name is unknown, or the object cannot be imported.
        """
        self.check(text)
        return import_object(self._places.get(text, text), self.setting)


def is_outside(text: str) -> bool:
    """Return whether ``text`` names an object outside the registries, ``package.module:object``."""
    return bool(OUTSIDE.fullmatch(text))


def import_object(place: str, setting: str) -> Any:
    """Import ``package.module:object``; the working directory is searched last.

    Raises:
        UsageError: The module cannot be imported, or does not have the object.
    """
    module_name, _, path = place.partition(":")
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.append(folder)  # it comes last: a random.py of the user's must not replace Python's
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise UsageError(f"{setting} = {place}: {module_name} cannot be imported: {reason}") from error
    for name in path.split("."):
        if not hasattr(found, name):
            raise UsageError(f"{setting} = {place}: {module_name} has no {path}: name an object that it defines")
        found = getattr(found, name)
    return found


FAMILIES = Registry("model.family", {"gpt2": "hiermpi.model.gpt2:FAMILY"})
RULES = Registry("optimizer.rule", {"adamw": "hiermpi.optimizer.rules:RULE"})
SCHEDULES = Registry(
    "optimizer.schedule",
    {
        "cosine": "hiermpi.optimizer.rules:cosine",
        "linear": "hiermpi.optimizer.rules:linear",
        "constant": "hiermpi.optimizer.rules:constant",
    },
)
ROUTINGS = Registry(
    "hierarchy.routing",
    {
        "balanced": "hiermpi.hierarchy.routing:Balanced",
        "dominant": "hiermpi.hierarchy.routing:dominant",
        "lift": "hiermpi.hierarchy.routing:lift",
    },
)
REDUCTIONS = Registry(
    "hierarchy.reduction",
    {
        "shared": "hiermpi.communication.shared_reduction:REDUCTION",
        "tree": "hiermpi.communication.tree_reduction:TreeReduction",
        "flat": "hiermpi.communication.tree_reduction:FlatReduction",
    },
)
"""The reductions in the order in which ``auto`` prefers them at about equal speed, so that noise seldom decides."""
SHARING_REDUCTIONS = frozenset({"shared"})
"""The reductions in whose memory the ranks of a node read each other's gradients; ``plan`` needs this without MPI."""
READERS = Registry("--reader", {"text": "hiermpi.data.text:READER"})
FORMATS = Registry(
    "--format",
    {
        "hf": "hiermpi.interchange.huggingface:FORMAT",
        "safetensors": "hiermpi.interchange.plain:SAFETENSORS",
        "npz": "hiermpi.interchange.plain:NPZ",
    },
)
SINKS = Registry("run.sinks", {"csv": "hiermpi.training.recording:CsvSink"})
COMMANDS = Registry(
    "command",
    {
        "prepare": "hiermpi.commands.files:PREPARE",
        "train": "hiermpi.commands.train:TRAIN",
        "evaluate": "hiermpi.commands.train:EVALUATE",
        "generate": "hiermpi.commands.train:GENERATE",
        "report": "hiermpi.commands.files:REPORT",
        "plan": "hiermpi.commands.machine:PLAN",
        "inspect": "hiermpi.commands.files:INSPECT",
        "verify": "hiermpi.commands.files:VERIFY",
        "export": "hiermpi.commands.files:EXPORT",
        "import": "hiermpi.commands.files:IMPORT",
        "bench": "hiermpi.commands.machine:BENCH",
        "info": "hiermpi.commands.machine:INFO",
    },
)
"""The commands in the order in which a new user needs them."""
