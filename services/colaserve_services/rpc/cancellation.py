"""Whose cancellation it is: grpc.aio raises CancelledError also in tasks that nobody cancelled.

It does so in whoever reads a call that was cancelled on this side, as a channel's closing does.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from grpc import StatusCode
from grpc.aio import AioRpcError, Metadata


def is_mine() -> bool:
    """Whether the running task was asked to stop; else a CancelledError in it is that of a call."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


@contextmanager
def of_calls_as_errors() -> Iterator[None]:
    """Raises a call's cancellation as AioRpcError, UNAVAILABLE: the work can be done on another channel."""
    try:
        yield
    except asyncio.CancelledError as error:
        if is_mine():
            raise
        details = "the call was cancelled on this side; its channel was closed"
        raise AioRpcError(StatusCode.UNAVAILABLE, Metadata(), Metadata(), details, None) from error
