"""What each rank tells at the end of a run: where its time went, and how much it computed."""

import os
import socket
from typing import Any

from hiermpi.communication.agreement import gather_objects
from hiermpi.communication.communicators import Communicators
from hiermpi.training.trainer import Trainer


def gather_ranks(
    trainer: Trainer, comms: Communicators, first_step: int, elapsed: float
) -> list[dict[str, Any]] | None:
    """One record per rank, at the root; None elsewhere. Collective over the world.

    Args:
        trainer: of this rank.
        comms: the hierarchy.
        first_step: steps finished before this start.
        elapsed: seconds since it.
    """
    phases = trainer.phases
    record = {
        "rank": comms.rank,
        "role": str(comms.role),
        "group": comms.group_index,
        "host": socket.gethostname(),
        "cores": os.cpu_count() or 1,
        "first_step": first_step,
        "last_step": trainer.progress.step,
        "elapsed": round(elapsed, 6),
        "sequences": trainer.sequences,
        "tokens": trainer.tokens,
        "owned_rows": trainer.optimizer.rows if trainer.optimizer else 0,
        "owned_parameters": trainer.optimizer.elements if trainer.optimizer else 0,
        "phases": {name: round(seconds, 6) for name, seconds in phases.seconds.items()},
        "waits": {name: round(seconds, 6) for name, seconds in phases.waits.items()},
        "waiting_cpu": round(phases.waiting_cpu, 6),
        "cpu": {name: round(seconds, 6) for name, seconds in phases.cpu.items()},
    }
    if trainer.source is not None:
        router = trainer.source.router
        record |= {
            "loads": router.loads.tolist(),
            "routed_tokens": router.tokens,
            "own_tokens": router.own_tokens,
        }
    return gather_objects(comms.world, record, comms.waiter)
