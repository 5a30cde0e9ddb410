"""The schema holds every setting of hiermpi: one frozen dataclass per section, one documented field per setting.

Types and ranges stand in the annotations and are checked by :func:`build`; what spans several fields is checked in
``__post_init__``. The names are a contract: a field is a TOML key, a flag ``--section.field`` and an environment
variable ``HIERMPI_SECTION__FIELD``.
"""

import difflib
import math
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal, get_origin, get_type_hints

from annotated_types import Ge, Gt, Lt

from hiermpi.config.registry import FAMILIES, REDUCTIONS, ROUTINGS, RULES, SCHEDULES, SINKS, Registry
from hiermpi.errors import UsageError

PositiveInt = Annotated[int, Ge(1)]
CountOrZero = Annotated[int, Ge(0)]
PositiveFloat = Annotated[float, Gt(0)]
FloatOrZero = Annotated[float, Ge(0)]
Fraction = Annotated[float, Ge(0), Lt(1)]


def option(default: Any, text: str) -> Any:
    """Make a field with its default and its line of ``--help``."""
    if isinstance(default, dict):
        return field(default_factory=dict, metadata={"help": text})
    return field(default=default, metadata={"help": text})


def duration_seconds(text: str) -> float:
    """Return the seconds in ``text``: plain seconds, ``MM:SS``, ``HH:MM:SS`` or ``D-HH:MM:SS`` as SLURM writes them.

    An empty text means no limit (infinity). Raises ValueError for anything else.
    """
    if not text:
        return float("inf")
    match = re.fullmatch(r"(?:(\d+)-)?((?:\d+:){0,2}\d+(?:\.\d+)?)", text.strip())
    if match is None:
        raise ValueError(f'"{text}" is not a duration: write seconds, HH:MM:SS or D-HH:MM:SS')
    days, clock = match.groups()
    seconds = 0.0
    for part in clock.split(":"):
        seconds = 60 * seconds + float(part)
    if days and clock.count(":") < 2:  # SLURM also writes D-HH and D-HH:MM
        seconds *= 60 ** (2 - clock.count(":"))
    return seconds + 86400 * int(days or 0)


def require_known(registry: Registry, text: str) -> None:
    """Refuse a text that names nothing in ``registry`` and is not the path of an object. Raises ValueError."""
    try:
        registry.check(text)
    except UsageError as error:
        raise ValueError(str(error)) from None


def listed(text: str) -> tuple[str, ...]:
    """Return the entries of a comma-separated list without surrounding blanks."""
    return tuple(entry.strip() for entry in text.split(",") if entry.strip())


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of the model."""

    family: str = option("gpt2", f"{', '.join(FAMILIES)}, or package.module:object of your own")
    options: dict[str, Any] = option({}, "settings of a family of your own, as a TOML table")
    vocab_size: CountOrZero = option(0, "rows of the token table; 0 takes the data's vocabulary")
    context_length: PositiveInt = option(256, "tokens per sequence")
    n_layer: PositiveInt = option(4, "transformer blocks")
    n_head: PositiveInt = option(4, "attention heads per block")
    n_embd: PositiveInt = option(128, "width of the residual stream")
    symmetry_order: Annotated[int, Ge(1), Lt(256)] = option(12, "symmetry groups of the vocabulary")
    tie_embeddings: bool = option(True, "share the token table with the output layer")
    dropout: Fraction = option(0.0, "share of activations dropped in training")

    def __post_init__(self) -> None:
        require_known(FAMILIES, self.family)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The length and the batches of the training, and the intervals of its reports."""

    steps: CountOrZero = option(2000, "optimizer steps of the whole run")
    batch_size: PositiveInt = option(48, "sequences per step, all ranks together")
    micro_batch_size: CountOrZero = option(0, "sequences a leaf computes at once; 0 chooses by the context length")
    eval_interval: CountOrZero = option(250, "steps between two validations; 0 validates at the end only")
    eval_batches: CountOrZero = option(20, "batches per validation; 0 takes the whole split")
    log_interval: PositiveInt = option(10, "steps between two lines of the log")
    seed: CountOrZero = option(1337, "seed of initialisation, data order and dropout")
    grad_clip: FloatOrZero = option(1.0, "largest gradient norm; 0 does not clip")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The rule by which parameters are updated, and its learning rate."""

    rule: str = option("adamw", f"{', '.join(RULES)}, or package.module:object of your own")
    options: dict[str, Any] = option({}, "settings of a rule of your own, as a TOML table")
    schedule: str = option("cosine", f"learning rate after warm-up: {', '.join(SCHEDULES)}, or one of your own")
    learning_rate: PositiveFloat = option(1e-3, "peak learning rate")
    min_learning_rate: FloatOrZero = option(1e-4, "learning rate after the decay")
    warmup_steps: CountOrZero = option(100, "steps of linear warm-up")
    decay_steps: CountOrZero = option(0, "step at which the decay ends; 0 takes train.steps")
    weight_decay: FloatOrZero = option(0.1, "decoupled decay of matrices (never of one-dimensional tensors)")
    beta1: Fraction = option(0.9, "decay of the first moment")
    beta2: Fraction = option(0.99, "decay of the second moment")
    placement: Literal["root", "sharded"] = option(
        "sharded", "who applies the optimizer: the root, or each control rank to its classes' rows and a share"
    )

    def __post_init__(self) -> None:
        require_known(RULES, self.rule)
        require_known(SCHEDULES, self.schedule)
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"optimizer.min_learning_rate = {self.min_learning_rate:g} is above "
                f"optimizer.learning_rate = {self.learning_rate:g}: lower it"
            )


@dataclass(frozen=True, kw_only=True)
class HierarchyConfig:
    """The distribution of work over the ranks, and the summing of gradients."""

    coordinators: Literal["compute", "dedicated"] = option(
        "compute", "compute: every rank computes; dedicated: only ranks with nobody below them"
    )
    routing: str = option("balanced", f"how sequences find their group: {', '.join(ROUTINGS)}, or one of your own")
    reduction: str = option(
        "auto",
        f"how gradients are summed: {', '.join(REDUCTIONS)}, or one of your own; auto, or several with commas between "
        "them (auto,package.module:object), takes the fastest",
    )
    retune: bool = option(False, "time the reductions again instead of reusing the run's choice")
    reproducible: bool = option(
        False, "the same bits on any number of ranks: units of train.micro_batch_size sequences, fixed-point sums"
    )


    def __post_init__(self) -> None:
        require_known(ROUTINGS, self.routing)
        if not listed(self.reduction):
            raise ValueError("hierarchy.reduction is empty: name auto, or a reduction")
        for name in listed(self.reduction):
            if name != "auto":
                require_known(REDUCTIONS, name)


@dataclass(frozen=True, kw_only=True)
class LatticeConfig:
    """The coupling of each token's embedding to its twelve neighbours."""

    coupling: FloatOrZero = option(0.0, "strength of the coupling; 0 is none")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """The times at which the run is saved, and the checkpoints that are kept."""

    interval: CountOrZero = option(500, "steps between two checkpoints; 0 saves by time and at the end only")
    minutes: FloatOrZero = option(15.0, "minutes between two checkpoints; 0 saves by steps and at the end only")
    keep_last: PositiveInt = option(3, "newest checkpoints kept")
    keep_every: CountOrZero = option(0, "also keep every checkpoint whose step is a multiple; 0 keeps none")
    asynchronous: bool = option(True, "write to disk in a thread while training goes on")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The job around the training."""

    time_limit: str = option("", "stop with a checkpoint after this time: seconds, HH:MM:SS or D-HH:MM:SS")
    on_failure: Literal["abort", "shrink"] = option("abort", "when a rank dies: end the job, or go on without it")
    min_ranks: PositiveInt = option(1, "fewest ranks to run on")
    stall_warn: FloatOrZero = option(60.0, "seconds of waiting after which a rank says so; 0 never")
    stall_abort: FloatOrZero = option(1800.0, "seconds of waiting after which the job ends; 0 never")
    threads_per_rank: PositiveInt = option(1, "BLAS threads of each rank")
    sinks: str = option("", f"where the run is also written to, with commas between: {', '.join(SINKS)}, or your own")

    def __post_init__(self) -> None:
        for name in listed(self.sinks):
            require_known(SINKS, name)
        try:
            duration_seconds(self.time_limit)
        except ValueError as error:
            raise ValueError(f"run.time_limit: {error}") from None


@dataclass(frozen=True, kw_only=True)
class Config:
    """The resolved configuration of a run."""

    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    hierarchy: HierarchyConfig = HierarchyConfig()
    lattice: LatticeConfig = LatticeConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    run: RunConfig = RunConfig()

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> "Config":
        """Make the configuration of ``{"section.field": value}``; missing settings take their defaults.

        Raises:
            UsageError: A setting is unknown, or a value has the wrong type or is out of range.
        """
        return config_from_flat(settings, "Config.of")


SECTIONS: dict[str, type] = {section.name: section.type for section in fields(Config)}  # type: ignore[misc]


def flatten(config: Config) -> dict[str, Any]:
    """Return ``{"section.field": value}`` of every setting, in the order of the schema."""
    return {
        f"{section}.{entry.name}": getattr(getattr(config, section), entry.name)
        for section, kind in SECTIONS.items()
        for entry in fields(kind)
    }


_SENTENCES = {
    "int_parsing": "expected a whole number",
    "int_type": "expected a whole number",
    "int_from_float": "expected a whole number",
    "int_parsing_size": "expected a smaller number",
    "float_parsing": "expected a number",
    "float_type": "expected a number",
    "finite_number": "expected a finite number",
    "bool_parsing": "expected true or false",
    "bool_type": "expected true or false",
    "string_type": "expected a text",
    "greater_than_equal": "expected at least {ge}",
    "greater_than": "expected more than {gt}",
    "less_than": "expected less than {lt}",
    "literal_error": "expected {expected}",
}


def config_from_flat(values: Mapping[str, Any], origin: str) -> Config:
    """Make the validated configuration of ``{"section.field": value}``; missing settings take their defaults."""
    known = flatten(Config())
    for name in values:
        require_setting(name, known, origin)
    return build({name: (value, f"{name} in {origin}") for name, value in values.items()})


def build(settings: Mapping[str, tuple[Any, str]]) -> Config:
    """Make the validated configuration of ``{"section.field": (value, origin)}``. Raises UsageError."""
    sections: dict[str, Any] = {}
    for section, kind in SECTIONS.items():
        hints = get_type_hints(kind, include_extras=True)
        values = {}
        for entry in fields(kind):
            name = f"{section}.{entry.name}"
            if name in settings:
                value, origin = settings[name]
                values[entry.name] = _convert(hints[entry.name], value, origin)
        try:
            sections[section] = kind(**values)
        except ValueError as error:
            raise UsageError(str(error)) from None
    return Config(**sections)


def _convert(hint: Any, value: Any, origin: str) -> Any:
    if hint is str and isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)  # a duration may be written as a plain number
    if get_origin(hint) is dict:
        return _table(value, origin)
    if isinstance(value, bool) and hint is not bool:
        raise UsageError(f"{origin} = {str(value).lower()}: expected a value other than true or false")
    from pydantic import TypeAdapter, ValidationError  # it is slow to import, and rank 0 alone reads settings

    try:
        converted = TypeAdapter(hint).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        sentence = _SENTENCES.get(first["type"], first["msg"][:1].lower() + first["msg"][1:])
        shown = repr(value) if isinstance(value, str) else str(value)
        raise UsageError(f"{origin} = {shown[:80]}: {sentence.format(**first.get('ctx', {}))}") from None
    if isinstance(converted, float) and not math.isfinite(converted):
        raise UsageError(f"{origin} = {value}: expected a finite number")
    return converted


def _table(value: Any, origin: str) -> dict[str, Any]:
    """Return a table of plain values from a TOML table, or from the text of an inline one such as ``{hidden = 64}``."""
    if isinstance(value, str):
        try:
            value = tomllib.loads(f"table = {value}")["table"]
        except (tomllib.TOMLDecodeError, RecursionError):
            raise UsageError(f"{origin} = {value[:80]!r}: expected a TOML table such as {{hidden = 64}}") from None
    plain = isinstance(value, dict) and all(isinstance(entry, int | float | str | bool) for entry in value.values())
    if not plain:
        raise UsageError(f"{origin}: expected a table of numbers, texts, true and false")
    return dict(value)


def require_setting(name: str, known: Mapping[str, Any], origin: str) -> None:
    """Refuse a setting that is not among the known ones. Raises UsageError.

    Args:
        name: The name of the setting.
        known: The settings that there are.
        origin: The text by which messages name the place where it stands.
    """
    if name not in known:
        raise UsageError(f'{origin}: unknown setting "{name}"{nearest(name, known)}')


def nearest(name: str, choices: Any) -> str:
    """Return the part of a message that names what was probably meant, or what there is."""
    found = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.5)
    return f': did you mean "{found[0]}"?' if found else f": valid are {', '.join(list(choices)[:8])} ..."


READ_BY_HIERMPI = {
    "model": frozenset({"family", "vocab_size", "context_length", "symmetry_order"}),
    "optimizer": frozenset(
        {"rule", "schedule", "learning_rate", "min_learning_rate", "warmup_steps", "decay_steps", "placement"}
    ),
}
"""The settings that have an effect with every family or rule from outside the package. Other settings that the
outside code does not read have no effect, which is logged.
"""


class WatchedTable(dict[str, Any]):
    """A table that notes which of its entries are read, as ``options.NAME``.

    Args:
        entries: The entries.
        seen: The set that receives the names of the entries that are read.
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
        self.seen.update(f"options.{name}" for name in dict.keys(self))


class WatchedModelConfig(ModelConfig):
    """The settings of a model, which add the names of the settings that are read to the set ``seen``."""

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if not name.startswith("_"):
            seen = super().__getattribute__("__dict__").get("_seen")
            if seen is not None:
                seen.add(name)
                return WatchedTable(value, seen) if name == "options" else value
        return value


def watched(config: ModelConfig, seen: set[str]) -> ModelConfig:
    """Return the same settings as an object that adds the names of those that are read to ``seen``."""
    made = WatchedModelConfig(**{entry.name: getattr(config, entry.name) for entry in fields(config)})
    object.__setattr__(made, "_seen", seen)
    return made


def unread(section: str, config: ModelConfig | OptimizerConfig, seen: set[str]) -> list[str]:
    """Return the settings of a section that differ from their default and that no code reads.

    Args:
        section: The name of the section, ``model`` or ``optimizer``.
        config: The settings of the section.
        seen: The names of the settings that code from outside has read.
    """
    default, found = type(config)(), []
    for entry in fields(config):
        value = getattr(config, entry.name)
        if entry.name == "options":
            found += [f"options.{name}" for name in value if f"options.{name}" not in seen]
        elif value != getattr(default, entry.name) and entry.name not in seen | READ_BY_HIERMPI[section]:
            found.append(entry.name)
    return [f"{section}.{name}" for name in found]
