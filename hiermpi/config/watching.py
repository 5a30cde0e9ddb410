"""Settings that tell which of them were read: code from outside the package may not know all of them.

A setting that the user changed and that nobody reads has no effect, and the log says so. Objects handed to a family or a
rule from outside are of the usual types, and note every access.
"""

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from hiermpi.config.schema import ModelConfig, OptimizerConfig

READ_BY_HIERMPI = {
    "model": frozenset({"family", "vocab_size", "context_length", "symmetry_order"}),
    "optimizer": frozenset(
        {"rule", "schedule", "learning_rate", "min_learning_rate", "warmup_steps", "decay_steps", "placement"}
    ),
}


class WatchedTable(dict[str, Any]):
    """A table that notes its entries that were read as ``options.NAME``.

    Args:
        entries: The entries.
        seen: What was read.
    """

    def __init__(self, entries: dict[str, Any], seen: set[str]) -> None:
        super().__init__(entries)
        self.seen = seen

    def __getitem__(self, name: str) -> Any:
        self.seen.add(f"options.{name}")
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.seen.add(f"options.{name}")
        return super().get(name, default)

    def pop(self, name: str, *default: Any) -> Any:
        self.seen.add(f"options.{name}")
        return super().pop(name, *default)

    def __iter__(self) -> Iterator[str]:
        self._see_all()
        return super().__iter__()

    def keys(self) -> Any:
        self._see_all()
        return super().keys()

    def items(self) -> Any:
        self._see_all()
        return super().items()

    def values(self) -> Any:
        self._see_all()
        return super().values()

    def _see_all(self) -> None:
        self.seen.update(f"options.{name}" for name in super().keys())


class WatchedModelConfig(ModelConfig):
    """The settings of a model, which note what was read in the set ``seen``."""

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if not name.startswith("_"):
            seen = super().__getattribute__("__dict__").get("_seen")
            if seen is not None:
                seen.add(name)
                return WatchedTable(value, seen) if name == "options" else value
        return value


def watched(config: ModelConfig, seen: set[str]) -> ModelConfig:
    """Return the same settings; what is read of them is added to ``seen``."""
    made = WatchedModelConfig(**{entry.name: getattr(config, entry.name) for entry in fields(config)})
    object.__setattr__(made, "_seen", seen)
    return made


def unread(section: str, config: ModelConfig | OptimizerConfig, seen: set[str]) -> list[str]:
    """Return the settings of a section that differ from their default and that nobody reads.

    Args:
        section: ``model`` or ``optimizer``.
        config: The section.
        seen: What code from outside has read.
    """
    default, found = type(config)(), []
    for entry in fields(config):
        value = getattr(config, entry.name)
        if entry.name == "options":
            found += [f"options.{name}" for name in value if f"options.{name}" not in seen]
        elif value != getattr(default, entry.name) and entry.name not in seen | READ_BY_HIERMPI[section]:
            found.append(entry.name)
    return [f"{section}.{name}" for name in found]
