"""Ends a streaming call whose reader is away: its handler waits in a write that may never return."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any


@dataclass
class _Serving:
    """A task that serves a call, and what it was ended with."""

    task: asyncio.Task[Any]
    error: Exception | None = None
    over: bool = False


_serving: ContextVar[_Serving | None] = ContextVar("colaserve_serving", default=None)


@contextmanager
def endable() -> Iterator[None]:
    """What runs inside, in this task, can be ended by `end_call` in tasks that it starts: the error is raised here."""
    task = asyncio.current_task()
    assert task is not None
    serving = _Serving(task)
    token = _serving.set(serving)
    try:
        yield
    except asyncio.CancelledError:
        if serving.error is None:
            raise
        task.uncancel()
        raise serving.error from None
    finally:
        serving.over = True  # its task may do other things now
        _serving.reset(token)


def end_call(error: Exception) -> None:
    """End the call that is being served with this error, wherever its handler waits."""
    serving = _serving.get()
    if serving is not None and serving.error is None and not serving.over:
        serving.error = error
        serving.task.cancel()
