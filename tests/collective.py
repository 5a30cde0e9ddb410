"""What *assert* means on several ranks."""

from hiermpi.communication.agreement import broadcast_object, gather_objects
from hiermpi.communication.waiting import Waiter


def collective_assert(comm, ok, message=""):
    """Fail on every rank of ``comm`` if ``ok`` is false on any. Collective over ``comm``."""
    waiter = Waiter()
    verdicts = broadcast_object(comm, gather_objects(comm, (bool(ok), str(message)), waiter), waiter)
    failed = {rank: text for rank, (good, text) in enumerate(verdicts) if not good}
    assert not failed, f"failed on ranks {failed}"
