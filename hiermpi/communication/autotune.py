"""This module chooses a reduction: the one that is named, or the fastest for this vector on these ranks."""

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
"""The reduction that is used where one of the package cannot be made on these ranks."""
ABOUT_AS_FAST = 1.1
"""The factor of the fastest time within which the first candidate is taken, so that noise seldom decides."""
HOPELESS = 2.0
"""The factor of the fastest time beyond which a candidate is not timed again."""
ROUNDS = 7
"""The most rounds in which candidates are timed."""
BUDGET_SECONDS = 1.0
"""The seconds after which no further round begins."""
METHODS = (
    *("gradient_vector", "parameter_slots", "state_slots", "reduce", "exchange", "broadcast", "share"),
    *("sum_everywhere", "free"),
)
ATTRIBUTES = ("name", "ownership", "keeps_gradients", "decides", "shares_memory")

logger = logging.getLogger("hiermpi")


class MakesReduction(Protocol):
    """The interface of a registered reduction: a subclass of Reduction, or a function with the same arguments.

    It may have ``usable(comms) -> bool``, which tells whether a timed choice should try it, the same on every rank.
    """

    def __call__(self, comms: Communicators, ownership: Ownership, vectors: Vectors) -> Reduction:
        """Make the reduction; this is collective over the hierarchy.

        Args:
            comms: The communicators of the hierarchy.
            ownership: The owner of each part of the vectors.
            vectors: The types, slots and names of the vectors.
        """


class Chosen(NamedTuple):
    """A reduction with the times by which it was chosen."""

    reduction: Reduction
    seconds: Mapping[str, float]
    """The median seconds of each candidate by its name in the setting; empty where nothing was timed."""
    name: str
    """The name of the reduction in the setting, which a run stores and passes as ``known`` at its next start."""


class Arguments(NamedTuple):
    """The arguments with which a reduction is made."""

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
    """Make the reduction that ``hierarchy.reduction`` names; this is collective over the hierarchy.

    Where the setting names several, or ``auto``, the choice is ``known`` if that is among them. Otherwise the fastest
    is chosen: each candidate sums and broadcasts the vector a few times, in turns. Where shared memory is not
    available, ``tree`` is used instead, with a warning in the log.

    Args:
        setting: A registered name, ``package.module:object``, ``auto`` for all registered ones, or a list of these with
            commas between them; or the class itself.
        comms: The communicators of the hierarchy.
        ownership: The owner of each part of the vectors.
        vectors: The types, slots and names of the vectors.
        known: The name that an earlier start of the run chose, or an empty text.

    Raises:
        UsageError: A name is unknown, or an object cannot be imported; every rank raises it.
        PluginError: An object from outside breaks the contract; every rank raises it.
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
    """Make a reduction if that is possible on all ranks; this is collective over the hierarchy.

    Args:
        arguments: The arguments of the reduction.
        name: The name of the reduction in the setting.
        maker: The class or function that makes it.

    Returns:
        The reduction and None; or None and the error, where one of the package cannot be made on some rank.

    Raises:
        PluginError: A reduction from outside cannot be made or does not work; every rank raises it.
    """
    comms, made = arguments.comms, None
    if REDUCTIONS.outside(name):
        return make_outside(arguments, name, maker), None
    try:
        # Making a reduction is collective, so a rank that fails must do so before others wait for it.
        with agreed(comms.world, comms.waiter):
            made = maker(*arguments)
    except UserError as error:
        return None, error
    return made, None


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
        with plugin_errors(f"{REDUCTIONS.described(name)} cannot be constructed"):
            made = maker(*arguments)
        require_contract(name, made)
    assert made is not None
    try_out(arguments, name, made, world)
    world.Free()
    return made


def fall_back(arguments: Arguments) -> Chosen:
    """Make the reduction that works on all ranks everywhere."""
    return Chosen(REDUCTIONS[FALLBACK](*arguments), {}, FALLBACK)


def fastest(arguments: Arguments, makers: Mapping[str, MakesReduction]) -> Chosen:
    """Make the fastest of the candidates; this is collective over the hierarchy."""
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
    # One gradient vector serves all candidates, as their parameters too: only those that share memory have their own.
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
    give_back_memory()  # messages took 6 MB and more, which ranks that do not compute never use again
    return Chosen(made[name], seconds, name)


def is_usable(name: str, maker: MakesReduction, comms: Communicators) -> bool:
    """Tell whether a timed choice should try a reduction. Raises PluginError."""
    with plugin_errors(f"{REDUCTIONS.described(name)}: usable" if REDUCTIONS.outside(name) else ""):
        return bool(getattr(maker, "usable", lambda _: True)(comms))


def time_in_turns(
    comms: Communicators, reductions: Mapping[str, Reduction], gradients: NDArray
) -> dict[str, float]:
    """Return the median seconds of a sum and a broadcast with each candidate, the same on every rank.

    It is collective over the hierarchy.

    Args:
        comms: The communicators of the hierarchy.
        reductions: The candidates by name.
        gradients: The zeroed vector that candidates without shared memory sum; it becomes scratch.
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
    """Return the seconds that ``reduction`` takes for one step; this is collective over the hierarchy.

    Args:
        comms: The communicators of the hierarchy.
        reduction: The reduction.
        gradients: The vector that it sums where it does not share memory.
    """
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
    """Return the name of the first candidate that is about as fast as the fastest."""
    best = min(seconds.values())
    return next(name for name, taken in seconds.items() if taken <= ABOUT_AS_FAST * best)


def require_contract(name: str, made: Reduction) -> None:
    """Check that an object has the methods and attributes of a reduction. Raises PluginError."""
    missing = [method for method in METHODS if not callable(getattr(made, method, None))]
    missing += [attribute for attribute in ATTRIBUTES if not hasattr(made, attribute)]
    if missing:
        raise PluginError(
            f"{REDUCTIONS.described(name)} has no {', '.join(missing)}: derive it from hiermpi.Reduction, which has "
            "them all"
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
    comms, what = arguments.comms, REDUCTIONS.described(name)
    with agreed(world, comms.waiter, patient=False), plugin_errors(f"{what} fails in its first step"):
        gradients, slots, states = made.gradient_vector(), made.parameter_slots(), made.state_slots()
        require_memory(arguments, name, gradients, slots, states)
    with agreed(world, comms.waiter, patient=False):
        with plugin_errors(f"{what} fails in its first step"):
            complaint = first_step(arguments, name, made, gradients, slots[0])
        if complaint:
            raise PluginError(f"{what}: {complaint}")
    # All ranks have checked the results, so memory that they share can be zeroed.
    gradients[:] = 0
    slots[0][:] = 0
    comms.waiter.wait(comms.world.Ibarrier())


def first_step(
    arguments: Arguments, name: str, made: Reduction, gradients: NDArray, parameters: NDArray[np.float32]
) -> str:
    """Sum ones and broadcast the owners' numbers; this is collective over the hierarchy.

    Args:
        arguments: The arguments with which the reduction was made.
        name: The name of the reduction in the setting.
        made: The reduction.
        gradients: The vector that gradient_vector() returned.
        parameters: The first slot that parameter_slots() returned.

    Returns:
        What is wrong with the results; an empty text where they are right.
    """
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
    """Check the vectors of a reduction against the contract.

    Args:
        arguments: The arguments with which the reduction was made.
        name: The name of the reduction in the setting.
        gradients: The vector that gradient_vector() returned.
        slots: The vectors that parameter_slots() returned.
        states: The vectors by name that state_slots() returned.

    Raises:
        PluginError: A vector is not what the contract says.
    """
    size, vectors = arguments.ownership.size, arguments.vectors
    require_vector(name, "gradient_vector()", gradients, size, np.dtype(vectors.gradients))
    require_slots(name, "parameter_slots()", slots, vectors.slots)
    require_slots(name, "state_slots()", states, vectors.slots)
    for slot in slots:
        require_vector(name, "parameter_slots()", slot, size, np.dtype(np.float32))
    for state in states:
        if set(state) != set(vectors.state):
            names = f"{sorted(state)}, not {sorted(vectors.state)}"
            raise PluginError(f"{REDUCTIONS.described(name)}: state_slots() has {names}")
        for vector in state.values():
            require_vector(name, "state_slots()", vector, size, np.dtype(np.float32))


def require_slots(name: str, what: str, slots: Sequence[object], count: int) -> None:
    """Check that there are ``count`` slots.

    Args:
        name: The name of the reduction in the setting.
        what: The method that returned the slots, for the message.
        slots: The slots.
        count: The expected number.

    Raises:
        PluginError: The number is another one.
    """
    if len(slots) != count:
        raise PluginError(f"{REDUCTIONS.described(name)}: {what} has {len(slots)} slots, not {count}")


def require_vector(name: str, what: str, vector: object, size: int, dtype: np.dtype) -> None:
    """Check that an object is a contiguous vector of ``size`` elements of ``dtype``.

    Args:
        name: The name of the reduction in the setting.
        what: The method that returned the object, for the message.
        vector: The object.
        size: The expected number of elements.
        dtype: The expected element type.

    Raises:
        PluginError: The object is something else.
    """
    found = type(vector).__name__
    if isinstance(vector, np.ndarray):
        if vector.shape == (size,) and vector.dtype == dtype and vector.flags.c_contiguous:
            return
        found = f"{vector.dtype} of shape {vector.shape}{'' if vector.flags.c_contiguous else ', with gaps'}"
    raise PluginError(f"{REDUCTIONS.described(name)}: {what} is {found}, not {dtype} of shape {(size,)}")


def guarded(made: Reduction, name: str) -> Reduction:
    """Return a reduction that tells errors of one from outside in one sentence; one of the package's stays as it is."""
    return OutsideReduction(made, name) if REDUCTIONS.outside(name) else made


class OutsideReduction(Reduction):
    """A reduction from outside; what it raises or breaks in a step is told in one sentence that names it.

    Args:
        made: The reduction.
        name: What the setting calls it.
    """

    def __init__(self, made: Reduction, name: str) -> None:
        super().__init__(made.comms, made.ownership, made.vectors)
        self.made = made
        self.setting_name = name
        self.what = REDUCTIONS.described(name)
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
        require_vector(self.setting_name, "what reduce() returns", total, self.ownership.size, gradients.dtype)
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
