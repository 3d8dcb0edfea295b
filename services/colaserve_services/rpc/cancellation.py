"""Ends calls whose readers stay away, and tells a task's own cancellation from that of a call which it reads."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_end: ContextVar[Callable[[Exception], None]] = ContextVar("colaserve_end", default=lambda error: None)


@contextmanager
def endable() -> Iterator[None]:
    """What runs inside, in this task, can be ended by `end_call` in tasks that it starts: the error is raised here."""
    task, errors, running = asyncio.current_task(), list[Exception](), True
    assert task is not None

    def end(error: Exception) -> None:
        if running and not errors:  # later the task may do other things
            errors.append(error)
            task.cancel()

    token = _end.set(end)
    try:
        yield
    except asyncio.CancelledError:
        if not errors:
            raise
        task.uncancel()
        raise errors[0] from None
    finally:
        running = False
        _end.reset(token)


def end_call(error: Exception) -> None:
    """End the call that is being served with this error, wherever its handler waits."""
    _end.get()(error)


def is_mine() -> bool:
    """Whether the running task was asked to stop. A CancelledError in another one is that of a call which it reads, and
    which was cancelled on this side, for instance because its channel was closed: grpc.aio raises it there too."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
