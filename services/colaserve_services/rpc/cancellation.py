"""grpc.aio raises CancelledError also in tasks that were not cancelled: in those that read a call which was cancelled
on this side, for instance because its channel was closed."""

import asyncio


def is_mine() -> bool:
    """Whether the running task was asked to stop; else a CancelledError in it is that of a call."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
