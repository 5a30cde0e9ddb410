"""The choice of a reduction: the one that is named, or the fastest for this vector on these ranks."""

import logging
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from hiermpi.communication.agreement import agreed
from hiermpi.communication.communicators import Communicators
from hiermpi.communication.reduction import Reduction, Vectors
from hiermpi.config.registry import REDUCTIONS
from hiermpi.errors import PluginError, UserError, plugin_errors
from hiermpi.hierarchy.ownership import Ownership
from hiermpi.kernels.memory import give_back_memory, lazy_zeros

FALLBACK = "tree"
"""Takes the place of a reduction of the package's that cannot be had on these ranks."""
ABOUT_AS_FAST = 1.1
"""Of candidates within this factor of the fastest the first is taken, so that noise seldom decides."""
HOPELESS = 2.0
"""Times the fastest: a candidate that once takes longer is not timed again."""
ROUNDS = 7
BUDGET_SECONDS = 1.0
METHODS = (
    *("gradient_vector", "parameter_slots", "state_slots", "reduce", "exchange", "broadcast", "share"),
    *("sum_everywhere", "free"),
)
ATTRIBUTES = ("name", "ownership", "keeps_gradients", "decides", "shares_memory")

logger = logging.getLogger("hiermpi")


class MakesReduction(Protocol):
    """What a registered name, or ``package.module:object``, must be: a subclass of Reduction, or a function like one.

    It may have ``usable(comms) -> bool``: whether a timed choice should try it; the same on every rank.
    """

    def __call__(self, comms: Communicators, ownership: Ownership, vectors: Vectors) -> Reduction:
        """Make the reduction. Collective over the hierarchy."""


class Chosen(NamedTuple):
    """A reduction, and how it was chosen."""

    reduction: Reduction
    seconds: Mapping[str, float]
    """Median seconds of each candidate, by its text in the setting; empty where nothing was timed."""
    name: str
    """Its text in the setting: what a run keeps, and gives as ``known`` at its next start."""


class Arguments(NamedTuple):
    """What a reduction is made with."""

    comms: Communicators
    ownership: Ownership
    vectors: Vectors


def make_reduction(
    setting: str | MakesReduction,
    comms: Communicators,
    ownership: Ownership,
    vectors: Vectors,
    known: str = "",
) -> Chosen:
    """Make the reduction that ``hierarchy.reduction`` asks for. Collective over the hierarchy.

    Where several are named, or ``auto``, it is ``known`` if an earlier start chose that among them, else the fastest:
    each candidate sums the vector and hands it down a few times, in turns. Where shared memory cannot be had, ``tree``
    takes its place, and the log says so.

    Args:
        setting: a registered name, ``package.module:object``, ``auto`` for all registered ones, or a list of these with
            commas between them; or the class itself.
        comms: the communicators of the hierarchy.
        ownership: the owner of each part of the vectors.
        vectors: types, slots and names of the vectors.
        known: an earlier choice.

    Raises:
        UsageError: on every rank, an unknown name, or an object that cannot be imported.
        PluginError: on every rank, an object from outside that does not keep the contract.
    """
    arguments = Arguments(comms, ownership, vectors)
    makers: dict[str, MakesReduction] = {}
    with agreed(comms.world, comms.waiter):
        if isinstance(setting, str):
            names = candidates(setting)
            makers = {name: REDUCTIONS.load(name) for name in ([known] if known in names else names)}
        else:
            makers = {getattr(setting, "__qualname__", repr(setting)): setting}
    if len(makers) > 1:
        return fastest(arguments, makers)
    name, maker = next(iter(makers.items()))
    made, complaint = try_to_make(arguments, name, maker)
    if made is not None:
        return Chosen(made, {}, name)
    if comms.rank == 0:
        logger.warning("%s; hierarchy.reduction = %s is used instead", complaint, FALLBACK)
    return fall_back(arguments)


def candidates(setting: str) -> list[str]:
    """Return the names that ``setting`` lists, in the order of preference; ``auto`` stands for all registered ones."""
    names: list[str] = []
    for entry in (text.strip() for text in setting.split(",")):
        names += REDUCTIONS if entry == "auto" else [entry] if entry else []
    return list(dict.fromkeys(names))


def try_to_make(arguments: Arguments, name: str, maker: MakesReduction) -> tuple[Reduction | None, UserError | None]:
    """Make a reduction, or say why one of the package's cannot be had on some rank. Collective over the hierarchy.

    Raises:
        PluginError: on every rank, where one from outside the package cannot be made or does not work.
    """
    comms, made = arguments.comms, None
    if is_outside(name):
        return make_outside(arguments, name, maker), None
    try:
        # Making is collective, so whoever fails there must do so before others wait for it.
        with agreed(comms.world, comms.waiter):
            made = maker(*arguments)
    except UserError as error:
        return None, error
    return made, None


def is_outside(name: str) -> bool:
    """Tell whether the reduction of this name comes from outside the package."""
    return name not in REDUCTIONS or bool(REDUCTIONS.outside(name))


def make_outside(arguments: Arguments, name: str, maker: MakesReduction) -> Reduction:
    """Make a reduction from outside and have it do a step. Collective over the hierarchy.

    Raises:
        PluginError: On every rank, where it cannot be made or does not work; on the rank that fails alone, where the
            others do not come to know of it, as they wait for that rank inside of the reduction.
    """
    comms, made = arguments.comms, None
    # Agreement has a communicator of its own: some ranks may be inside of a collective operation of the reduction's.
    world, duplicated = comms.world.Idup()
    comms.waiter.wait(duplicated)
    with agreed(world, comms.waiter, patient=False):
        with plugin_errors(f"{described(name)} cannot be constructed"):
            made = maker(*arguments)
        require_contract(name, made)
    assert made is not None
    try_out(arguments, name, made, world)
    world.Free()
    return made


def fall_back(arguments: Arguments) -> Chosen:
    """Make the reduction that can always be had."""
    return Chosen(REDUCTIONS[FALLBACK](*arguments), {}, FALLBACK)


def fastest(arguments: Arguments, makers: Mapping[str, MakesReduction]) -> Chosen:
    """Make the fastest of the candidates. Collective over the hierarchy."""
    comms, ownership, vectors = arguments
    with agreed(comms.world, comms.waiter):
        usable = [name for name, maker in makers.items() if is_usable(name, maker, comms)]
    names = usable or list(makers)
    if comms.size == 1:
        del names[1:]
    attempts = {name: try_to_make(arguments, name, makers[name])[0] for name in names}
    made = {name: reduction for name, reduction in attempts.items() if reduction is not None}
    if len(made) < 2:
        return next((Chosen(reduction, {}, name) for name, reduction in made.items()), None) or fall_back(arguments)
    # One gradient vector serves all, and as their parameters too: only those that share memory have their own.
    sharing = [reduction for reduction in made.values() if reduction.shares_memory]
    leaf = comms.topology.is_leaf(comms.rank)
    gradients = (sharing or list(made.values()))[0].gradient_vector() if leaf else None
    if gradients is None:
        gradients = lazy_zeros(ownership.size, vectors.gradients)
    seconds = time_in_turns(comms, made, gradients)
    name = preferred(seconds)
    for vector in [reduction.gradient_vector() for reduction in sharing] if leaf else []:
        vector[:] = 0
    for other, reduction in made.items():
        if other != name:
            reduction.free()
    del gradients
    give_back_memory()  # that messages took: 6 MB and more, which ranks that do not compute would never use again
    return Chosen(made[name], seconds, name)


def is_usable(name: str, maker: MakesReduction, comms: Communicators) -> bool:
    """Tell whether a timed choice should try a reduction. Raises PluginError."""
    with plugin_errors(f"{described(name)}: usable" if is_outside(name) else ""):
        return bool(getattr(maker, "usable", lambda _: True)(comms))


def time_in_turns(
    comms: Communicators, reductions: Mapping[str, Reduction], gradients: NDArray
) -> dict[str, float]:
    """Return median seconds of a sum and a broadcast with each candidate, the same on every rank. Collective.

    Args:
        comms: the communicators of the hierarchy.
        reductions: the candidates by name.
        gradients: zeros; scratch for those that do not share memory.
    """
    names = list(reductions)
    times: dict[str, list[float]] = {name: [] for name in names}
    begun, running, done = time.perf_counter(), set(names), False
    while not done:
        taken = np.zeros(len(names) + 1)
        for index, name in enumerate(names):
            if name in running:
                taken[index] = time_once(comms, reductions[name], gradients)
        taken[-1] = time.perf_counter() - begun
        comms.waiter.wait(comms.world.Iallreduce(MPI.IN_PLACE, taken, op=MPI.MAX))
        best = min(taken[index] for index, name in enumerate(names) if name in running)
        for index, name in enumerate(names):
            if name in running:
                times[name].append(float(taken[index]))
                running -= {name} if taken[index] > HOPELESS * best and len(times[name]) > 1 else set()
        rounds = max(len(entry) for entry in times.values())
        done = rounds > 1 and (len(running) == 1 or rounds > ROUNDS or taken[-1] > BUDGET_SECONDS)
    return {name: statistics.median(entry[1:]) for name, entry in times.items()}


def time_once(comms: Communicators, reduction: Reduction, gradients: NDArray) -> float:
    """Return the seconds that ``reduction`` takes for what a step asks of it. Collective over the hierarchy."""
    ownership, parameters = reduction.ownership, gradients.view(np.float32)
    if reduction.shares_memory:
        gradients, parameters = reduction.gradient_vector(), reduction.parameter_slots()[0]
    sums, verdict = np.zeros(8), np.ones(8)
    findings = np.zeros((1, len(ownership.owners))) if reduction.decides else None
    comms.waiter.wait(comms.world.Ibarrier())
    start = time.perf_counter()
    reduction.reduce(sums, gradients)
    if ownership.shared_out:
        reduction.exchange(findings)
    reduction.broadcast(verdict, parameters[: ownership.size])
    return time.perf_counter() - start


def preferred(seconds: Mapping[str, float]) -> str:
    """Return the first candidate that is about as fast as the fastest."""
    best = min(seconds.values())
    return next(name for name, taken in seconds.items() if taken <= ABOUT_AS_FAST * best)


def require_contract(name: str, made: Reduction) -> None:
    """Refuse what does not have the methods and attributes of a reduction. Raises PluginError."""
    missing = [method for method in METHODS if not callable(getattr(made, method, None))]
    missing += [attribute for attribute in ATTRIBUTES if not hasattr(made, attribute)]
    if missing:
        raise PluginError(
            f"{described(name)} has no {', '.join(missing)}: derive it from hiermpi.Reduction, which has them all"
        )


def try_out(arguments: Arguments, name: str, made: Reduction, world: MPI.Comm) -> None:
    """Have a reduction from outside do a step with known results. Collective over the hierarchy.

    Args:
        arguments: What the reduction was made with.
        name: What the setting calls it.
        made: The reduction.
        world: All ranks, to agree on errors.

    Raises:
        PluginError: As :func:`make_outside` says.
    """
    comms = arguments.comms
    with agreed(world, comms.waiter, patient=False), plugin_errors(f"{described(name)} fails in its first step"):
        gradients, slots, states = made.gradient_vector(), made.parameter_slots(), made.state_slots()
        require_memory(arguments, name, gradients, slots, states)
    with agreed(world, comms.waiter, patient=False):
        with plugin_errors(f"{described(name)} fails in its first step"):
            complaint = first_step(arguments, name, made, gradients, slots[0])
        if complaint:
            raise PluginError(f"{described(name)}: {complaint}")
    # All ranks have compared: memory that they share can be zeroed.
    gradients[:] = 0
    slots[0][:] = 0
    comms.waiter.wait(comms.world.Ibarrier())


def first_step(
    arguments: Arguments, name: str, made: Reduction, gradients: NDArray, parameters: NDArray[np.float32]
) -> str:
    """Sum ones, hand down the owners' numbers, and say what is wrong with them. Collective over the hierarchy."""
    comms, ownership, vectors = arguments
    number = ownership.number(comms.rank)
    mine = [] if number is None else ownership.spans_of(number)
    gradients[:] = comms.topology.is_leaf(comms.rank)
    sums, verdict = np.ones(3), np.array([1.0, 7.0] if made.decides else [0.0, 0.0])
    total = made.reduce(sums, gradients)
    require_vector(name, "what reduce() returns", total, ownership.size, np.dtype(vectors.gradients))
    summed = all(bool((total[start:stop] == comms.topology.n_leaves).all()) for start, stop, _ in mine)
    found = np.zeros((1, len(ownership.owners))) if made.decides else None
    if found is not None and number is not None:
        found[:, ownership.blocks_of(number)] = number + 1
    if ownership.shared_out:
        made.exchange(found)
        if found is not None and not np.array_equal(found[0], ownership.owners + 1):
            return "exchange() does not give a rank that decides what the owners found"
    for start, stop, owner in mine:
        parameters[start:stop] = owner + 1
    made.broadcast(verdict, parameters)
    received = all(bool((parameters[start:stop] == owner + 1).all()) for start, stop, owner in ownership.spans)
    if not summed or (made.decides and not (sums == comms.size).all()):
        return "reduce() gives wrong sums: ones do not add up to how many there are"
    if not received or verdict.tolist() != [1.0, 7.0]:
        return "broadcast() does not give every rank what the owners have"
    return ""


def require_memory(
    arguments: Arguments,
    name: str,
    gradients: NDArray,
    slots: Sequence[NDArray[np.float32]],
    states: Sequence[Mapping[str, NDArray[np.float32]]],
) -> None:
    """Refuse vectors of a reduction that are not what the contract says. Raises PluginError."""
    size, vectors = arguments.ownership.size, arguments.vectors
    require_vector(name, "gradient_vector()", gradients, size, np.dtype(vectors.gradients))
    require_slots(name, "parameter_slots()", slots, vectors.slots)
    require_slots(name, "state_slots()", states, vectors.slots)
    for slot in slots:
        require_vector(name, "parameter_slots()", slot, size, np.dtype(np.float32))
    for state in states:
        if set(state) != set(vectors.state):
            raise PluginError(f"{described(name)}: state_slots() has {sorted(state)}, not {sorted(vectors.state)}")
        for vector in state.values():
            require_vector(name, "state_slots()", vector, size, np.dtype(np.float32))


def require_slots(name: str, what: str, slots: Sequence[object], count: int) -> None:
    """Refuse any number of slots but ``count``. Raises PluginError."""
    if len(slots) != count:
        raise PluginError(f"{described(name)}: {what} has {len(slots)} slots, not {count}")


def require_vector(name: str, what: str, vector: object, size: int, dtype: np.dtype) -> None:
    """Refuse what is not a contiguous vector of ``size`` elements of ``dtype``. Raises PluginError."""
    found = type(vector).__name__
    if isinstance(vector, np.ndarray):
        if vector.shape == (size,) and vector.dtype == dtype and vector.flags.c_contiguous:
            return
        found = f"{vector.dtype} of shape {vector.shape}{'' if vector.flags.c_contiguous else ', with gaps'}"
    raise PluginError(f"{described(name)}: {what} is {found}, not {dtype} of shape {(size,)}")


def described(name: str) -> str:
    """Return how messages call the choice."""
    return name if name.startswith("hierarchy.reduction = ") else f"hierarchy.reduction = {name}"


def guarded(made: Reduction, name: str) -> Reduction:
    """Return a reduction that tells errors of one from outside in one sentence; one of the package's stays as it is."""
    return OutsideReduction(made, name) if is_outside(name) else made


class OutsideReduction(Reduction):
    """A reduction from outside; what it raises or breaks in a step is told in one sentence that names it.

    Args:
        made: The reduction.
        name: What the setting calls it.
    """

    def __init__(self, made: Reduction, name: str) -> None:
        super().__init__(made.comms, made.ownership, made.vectors)
        self.made = made
        self.what = described(name)
        self.name = made.name
        self.keeps_gradients = made.keeps_gradients
        self.shares_memory = made.shares_memory
        self.decides = made.decides

    def gradient_vector(self) -> NDArray:
        with plugin_errors(self.what):
            return self.made.gradient_vector()

    def parameter_slots(self) -> list[NDArray[np.float32]]:
        with plugin_errors(self.what):
            return self.made.parameter_slots()

    def state_slots(self) -> list[dict[str, NDArray[np.float32]]]:
        with plugin_errors(self.what):
            return self.made.state_slots()

    def reduce(self, sums: NDArray[np.float64], gradients: NDArray) -> NDArray:
        with plugin_errors(self.what):
            total = self.made.reduce(sums, gradients)
        require_vector(self.what, "what reduce() returns", total, self.ownership.size, gradients.dtype)
        return total

    def exchange(self, values: NDArray[np.float64] | None) -> None:
        with plugin_errors(self.what):
            self.made.exchange(values)

    def broadcast(self, verdict: NDArray[np.float64], parameters: NDArray[np.float32]) -> None:
        with plugin_errors(self.what):
            self.made.broadcast(verdict, parameters)

    def share(self, parameters: NDArray[np.float32]) -> None:
        with plugin_errors(self.what):
            self.made.share(parameters)

    def sum_everywhere(self, values: NDArray[np.float64]) -> None:
        with plugin_errors(self.what):
            self.made.sum_everywhere(values)

    def free(self) -> None:
        with plugin_errors(self.what):
            self.made.free()
