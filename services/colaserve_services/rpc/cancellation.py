"""Whose cancellation it is: grpc.aio raises CancelledError also in tasks that nobody cancelled.

It does so in whoever reads a call that was cancelled on this side, as a channel's closing does.
"""

import asyncio


def is_mine() -> bool:
    """Whether the running task was asked to stop; else a CancelledError in it is that of a call."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
