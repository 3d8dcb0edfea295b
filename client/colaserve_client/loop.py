"""The event loop of the blocking clients, in a thread of its own, and what becomes of it in a forked process.

A fork copies one thread. gRPC's own handlers make its core usable in the child, but not while the thread with which
grpc.aio polls is inside it. So before a fork the clients are disconnected and that thread ends; parent and child each
connect anew with their next call. Where this would break off a call, or where asyncio clients are connected to another
event loop, nothing is touched: the parent continues, and the child refuses every call at once, since it would hang.
"""

import asyncio
import atexit
import gc
import os
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, InvalidStateError, wait
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar
from weakref import WeakSet

import grpc.aio

from colaserve_client.errors import Unavailable

if TYPE_CHECKING:
    from colaserve_client.base import AsyncBaseClient

P = ParamSpec("P")
T = TypeVar("T")

_SIGNAL_CHECK_SECONDS = 0.2  # a signal just before a wait does not end that wait, so waits are no longer than this
_STOP_SECONDS = 5.0
_WAIT_SECONDS = 1.0  # how long a fork waits for the calls of other threads
_SETTLE_SECONDS = 0.05  # what gRPC's own threads have for the rest of their work after the last channel
_POLLING = "(_poll_wrapper)"  # the name of grpc.aio's thread ends so
_NOBODY = "ipv4:127.0.0.1:1"
_OFF = {"0", "false", "no", "n", "f"}
_FORKED = (
    "this process was forked from one in which a call was running or an asyncio client was connected, which gRPC does "
    "not survive: end calls and close asyncio clients before the fork, or start the process with the spawn method"
)
_NO_SUPPORT = (
    "this process was forked from one that had used gRPC, and GRPC_ENABLE_FORK_SUPPORT switches gRPC's support of that "
    "off: remove the variable, or start the process with the spawn method"
)


class LoopThread:
    """Runs coroutines for other threads, which wait. The thread is started by the first call."""

    def __init__(self) -> None:
        self.connected: WeakSet[AsyncBaseClient] = WeakSet()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._lock = threading.RLock()  # held while a process forks; a signal handler may interrupt its owner
        self._running: set[Future[Any]] = set()
        self._used = self._unsafe = self._unproven = False
        self._settled = True
        self._refusal = ""

    def check(self) -> None:
        """Raises `Unavailable` in a forked process where a call would hang; called before every call of any client."""
        if self._unproven:
            self._prove()
        if self._refusal:
            raise Unavailable(self._refusal)
        self._used, self._settled = True, False

    def _prove(self) -> None:
        """In a forked process: look that gRPC works, which it does not where its own threads were busy at the fork."""
        with self._lock:
            if not self._unproven:
                return
            try:
                asyncio.run_coroutine_threadsafe(_short_call(), self._started()).result(_STOP_SECONDS)
            except TimeoutError:
                self._loop = self._thread = None
                self._refuse(_FORKED)
            self._unproven = False

    def _refuse(self, reason: str) -> None:
        self._refusal = reason
        grpc.aio.init_grpc_aio()  # counts one user more, so that the child's end does not wait for the lost thread

    @property
    def is_lost(self) -> bool:
        """Whether this is such a process: what its parent had open is not to be touched."""
        return bool(self._refusal)

    def submit(self, function: Callable[P, Coroutine[Any, Any, T]], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Start a coroutine function on the loop."""
        with self._lock:
            self.check()
            if self._thread is threading.current_thread():
                raise RuntimeError("a blocking client was called on the event loop of the blocking clients")
            future = Future[T]()
            self._running.add(future)
            future.add_done_callback(self._running.discard)
            try:
                self._started().call_soon_threadsafe(_begin, future, partial(function, *args, **kwargs))
            except BaseException:  # Ctrl-C, perhaps once the loop has it
                future.cancel()
                raise
        return future

    def run(self, function: Callable[P, Coroutine[Any, Any, T]], *args: P.args, **kwargs: P.kwargs) -> T:
        """What a coroutine function returns or raises. Ctrl-C cancels it."""
        return self.result(self.submit(function, *args, **kwargs))

    def result(self, future: Future[T]) -> T:
        """What comes of a submitted coroutine; it is cancelled when the wait is interrupted."""
        try:
            while not future.done():
                with suppress(TimeoutError):
                    return future.result(_SIGNAL_CHECK_SECONDS)
            return future.result()
        except BaseException:
            future.cancel()
            raise
        finally:
            del future  # no cycle of an error and this frame

    def call_soon(self, function: Callable[[], object]) -> None:
        """Have the loop call a function, which nobody waits for; nothing happens where no loop runs."""
        if (loop := self._loop) is not None:
            with suppress(RuntimeError):  # it was closed just now
                loop.call_soon_threadsafe(function)

    def spawn(self, function: Callable[[], Coroutine[Any, Any, object]]) -> None:
        """Run a coroutine function that nobody waits for; nothing happens where no loop runs."""
        self.call_soon(lambda: asyncio.run_coroutine_threadsafe(function(), asyncio.get_running_loop()))

    def _started(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._loop.run_forever, name="colaserve-calls", daemon=True)
            self._thread.start()
        return self._loop

    def stop(self) -> None:
        """Cancel what runs, disconnect all clients and end the thread; the next call starts another one."""
        with self._lock:
            loop, thread = self._loop, self._thread
            if loop is None or thread is None:
                return
            with suppress(TimeoutError):
                asyncio.run_coroutine_threadsafe(self._disconnect(), loop).result(_STOP_SECONDS)
            loop.call_soon_threadsafe(loop.stop)
            thread.join(_STOP_SECONDS)
            if not thread.is_alive():
                loop.close()
            self._loop = self._thread = None

    async def _disconnect(self) -> None:
        for each in list(self.connected):
            await each._disconnect()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def before_fork(self) -> None:
        """Disconnect where nothing runs; find out whether the child will be able to use gRPC."""
        self._lock.acquire()  # no call begins meanwhile
        running = wait(list(self._running), timeout=_WAIT_SECONDS).not_done
        busy = bool(running) or any(each._is_busy() for each in self.connected)
        if not (busy or self._settled):
            self.stop()
            time.sleep(_SETTLE_SECONDS)
            if _grpc_polls():
                gc.collect()  # errors that were kept may hold a call, and so its channel
            self._settled = True
        self._unsafe = _grpc_polls()

    def after_fork_in_parent(self) -> None:
        """Continue."""
        self._lock.release()

    def after_fork_in_child(self) -> None:
        """Leave to the parent what is the parent's."""
        self._lock = threading.RLock()
        if self._unsafe or self._loop is not None:
            self._keep_for_good()
        self._loop, self._thread, self._running = None, None, set()
        self._unproven = self._used and not self._unsafe
        if self._unsafe:
            self._refuse(_FORKED)
        elif self._used and os.environ.get("GRPC_ENABLE_FORK_SUPPORT", "").lower() in _OFF:
            self._refusal, self._unproven = _NO_SUPPORT, False

    def _keep_for_good(self) -> None:
        """Keep what the parent has open, at the end of the process too: giving up its calls would crash or hang."""
        kept: list[Any] = [self._loop, self._running]
        kept += [each for each in gc.get_objects() if str(getattr(type(each), "__module__", "")).startswith("grpc.")]
        kept.append(kept)  # nothing but the collector frees this, and the collector leaves alone what is frozen
        gc.freeze()


def _begin(future: Future[T], function: Callable[[], Coroutine[Any, Any, T]]) -> None:
    """On the loop: run a coroutine function for a future, which cancels it when it is cancelled itself."""
    if future.cancelled():
        return
    task = asyncio.get_running_loop().create_task(function())
    task.add_done_callback(partial(_end, future))
    future.add_done_callback(partial(_cancel, task))


def _cancel(task: asyncio.Task[T], future: Future[T]) -> None:
    loop = task.get_loop()
    if future.cancelled() and not loop.is_closed():
        loop.call_soon_threadsafe(task.cancel)


def _end(future: Future[T], task: asyncio.Task[T]) -> None:
    with suppress(InvalidStateError):  # it was cancelled
        if task.cancelled():
            future.cancel()
        elif (error := task.exception()) is not None:
            future.set_exception(error)
        else:
            future.set_result(task.result())


async def _short_call() -> None:
    """A call that ends within a moment where gRPC's threads run: with its deadline, since nobody answers."""
    async with grpc.aio.insecure_channel(_NOBODY) as channel:
        call = channel.unary_unary("/nobody/answers")(b"", timeout=0.001, wait_for_ready=True)
        await call.code()


def _grpc_polls() -> bool:
    return any(thread.name.endswith(_POLLING) for thread in threading.enumerate())


LOOP = LoopThread()
"""The one of this process: a loop costs a thread, and grpc.aio shares one of its own among all loops anyway."""

os.register_at_fork(
    before=LOOP.before_fork,
    after_in_parent=LOOP.after_fork_in_parent,
    after_in_child=LOOP.after_fork_in_child,
)
atexit.register(LOOP.stop)
