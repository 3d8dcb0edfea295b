"""SIGTERM, SIGHUP and SIGINT, for work that they end."""

import asyncio
import contextlib
import signal
from collections.abc import Awaitable


class Signals:
    """SIGTERM, SIGHUP and SIGINT as they come, none lost. Made inside of an event loop, which it is for.

    SIGHUP, which a closing terminal sends, stays ignored where the process was started so, as by nohup.
    """

    def __init__(self) -> None:
        self._queue: asyncio.Queue[int] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        for number in (signal.SIGTERM, signal.SIGINT, *(() if ignored else (signal.SIGHUP,))):
            loop.add_signal_handler(number, self._queue.put_nowait, number)

    async def next(self) -> int:
        """The next one."""
        return await self._queue.get()

    async def ended(self, work: Awaitable[None]) -> int | None:
        """Do the work. The signal that ended it; None when it came to its own end. Raises what the work raises."""
        task, stop = asyncio.ensure_future(work), asyncio.ensure_future(self.next())
        await asyncio.wait([task, stop], return_when=asyncio.FIRST_COMPLETED)
        number = stop.result() if stop.done() else None
        if number is not None and task.done():
            self._queue.put_nowait(number)  # for what comes next
            number = None
        for pending in (task, stop):
            pending.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        return number
