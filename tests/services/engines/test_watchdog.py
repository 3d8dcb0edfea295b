"""A device thread that dies or hangs ends its process; one that is slow, stopped for a while or at a loss does not."""

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from colaserve_services.engine.device import DeviceThread
from colaserve_services.engine.watchdog import EXIT_CODE, Watchdog
from tests.waiting import wait_until


class Clock:
    """Stands still until it is moved on."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def alive() -> Iterator[threading.Thread]:
    over = threading.Event()
    thread = threading.Thread(target=over.wait)
    thread.start()
    yield thread
    over.set()
    thread.join()


def lasts(watchdog: Watchdog, clock: Clock, thread: threading.Thread, seconds: int, shape: object = None) -> str | None:
    """A step of so many seconds, looked at every second; what the watchdog said first."""
    with watchdog.step():
        watchdog.expect(shape)
        for _ in range(seconds):
            clock.now += 1
            reason = watchdog.look(thread)
            if reason is not None:
                return reason
    return watchdog.look(thread)


def known(clock: Clock, thread: threading.Thread, longest: int = 0) -> Watchdog:
    """One that saw the shape None, and a step that took so long."""
    watchdog = Watchdog(clock)
    for seconds in (0, longest):
        assert lasts(watchdog, clock, thread, seconds) is None
    return watchdog


@pytest.mark.parametrize(
    ("longest", "shape", "most"), [(0, None, 60), (10, None, 200), (0, "new", 600)],
    ids=["a minute", "twenty times the longest", "ten minutes where the shape is new"],
)  # fmt: skip
def test_a_step_may_last_so_long_and_no_longer(clock, alive, longest, shape, most):
    assert lasts(known(clock, alive, longest), clock, alive, most - 1, shape) is None
    reason = lasts(known(clock, alive, longest), clock, alive, most + 10, shape)
    assert f"has lasted {most + 1} s, longer than the {most} s it may" in reason


def test_a_long_first_step_of_a_shape_says_nothing_about_others(clock: Clock, alive: threading.Thread) -> None:
    watchdog = known(clock, alive)
    assert lasts(watchdog, clock, alive, 590, shape="new") is None
    assert lasts(watchdog, clock, alive, 70, shape="new") is not None


def test_many_short_steps_are_no_long_one(clock: Clock, alive: threading.Thread) -> None:
    watchdog = known(clock, alive)
    assert [lasts(watchdog, clock, alive, 1) for _ in range(500)] == [None] * 500


def test_time_in_which_the_process_was_stopped_does_not_count(clock: Clock, alive: threading.Thread) -> None:
    watchdog = known(clock, alive)
    with watchdog.step():
        assert watchdog.look(alive) is None
        clock.now += 3600
        assert watchdog.look(alive) is None


class Dies:
    """A worker that fails, and fails at failing."""

    computes = False

    def step(self, heavy: bool) -> bool:
        raise RuntimeError("no step")

    def next_deadline(self) -> float | None:
        return None

    def fail(self, error: Exception) -> None:
        raise RuntimeError("no way to fail either") from error


class Hangs(Dies):
    def __init__(self) -> None:
        self.over = threading.Event()

    computes = False

    def step(self, heavy: bool) -> bool:
        return self.over.wait()


@contextmanager
def device(watchdog: Watchdog, worker: Dies) -> Iterator[DeviceThread]:
    thread = DeviceThread(watchdog=watchdog)
    thread.register(worker)
    thread.start()
    yield thread
    thread.stop()


def test_a_device_thread_that_dies_is_noticed() -> None:
    reasons: list[str] = []
    with device(Watchdog(end=reasons.append, interval=0.01), Dies()):
        wait_until(lambda: reasons)
    assert reasons == ["the device thread is gone"]


def test_a_device_thread_that_hangs_is_noticed(clock: Clock) -> None:
    reasons: list[str] = []
    worker = Hangs()

    def hurry() -> float:
        clock.now += 1
        return clock.now

    with device(Watchdog(hurry, reasons.append, interval=0.01), worker):
        wait_until(lambda: reasons)
        worker.over.set()
    assert "a step on the device has lasted" in reasons[0]


def test_a_device_thread_that_is_stopped_is_not_gone() -> None:
    reasons: list[str] = []
    worker = Hangs()
    worker.over.set()
    watchdog = Watchdog(end=reasons.append, interval=0.001)
    with device(watchdog, worker):
        pass
    for _ in range(3):
        assert watchdog.look(threading.Thread()) is None
    assert reasons == []


def test_the_process_ends_with_a_clear_last_line() -> None:
    program = (
        "import threading\n"
        "from colaserve_services.engine.device import DeviceThread\n"
        "from colaserve_services.engine.watchdog import Watchdog\n"
        "from tests.services.engines.test_watchdog import Dies\n"
        "thread = DeviceThread(watchdog=Watchdog(interval=0.01))\n"
        "thread.register(Dies())\n"
        "thread.start()\n"
        "threading.Event().wait()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == EXIT_CODE
    assert done.stderr.splitlines()[-1].endswith("the device thread is gone; the process ends")


class Busy:
    """Has so many steps to do, each of so many seconds."""

    computes = False
    device: DeviceThread

    def __init__(self, name: str, seconds: float, steps: int, done: list[str], heavy: float = 0.0):
        self.name, self.seconds, self.steps, self.done, self.heavy = name, seconds, steps, done, heavy

    def step(self, heavy: bool) -> bool:
        if not self.steps or (self.heavy and not heavy):
            return False
        time.sleep(self.seconds)
        self.steps -= 1
        self.done.append(self.name)
        self.device.took(self.seconds, self.heavy)
        return True

    def next_deadline(self) -> float | None:
        return None

    def fail(self, error: Exception) -> None: ...


@contextmanager
def shared(*workers: Busy) -> Iterator[DeviceThread]:
    """Until they have nothing to do."""
    device = DeviceThread()
    for worker in workers:
        worker.device = device
        device.register(worker)
    device.start()
    yield device
    wait_until(lambda: not any(worker.steps for worker in workers))
    device.stop()


def test_workers_share_the_time_and_not_the_number_of_steps() -> None:
    done: list[str] = []
    with shared(Busy("long", 0.05, 10, done), Busy("short", 0.002, 100, done)):
        pass
    assert done[0] == "long"
    assert done[: done.index("short") + 60].count("long") <= 6


def test_what_a_worker_did_not_use_is_not_owed_to_it() -> None:
    done: list[str] = []
    late = Busy("late", 0.002, 0, done)
    with shared(Busy("always", 0.002, 100, done), late) as device:
        wait_until(lambda: len(done) > 50)
        late.steps = 20
        device.wake()
    first = done.index("late")
    assert "always" in done[first : first + 4]


def test_heavy_work_of_all_workers_has_half_of_the_time_while_there_is_other_work() -> None:
    done: list[str] = []
    heavy = (Busy(name, 0.05, 20, done, heavy=1.0) for name in ("long", "longer"))
    with shared(*heavy, Busy("short", 0.01, 30, done)):
        pass
    beside = done[: len(done) - done[::-1].index("short")]
    assert 3 <= len(beside) - beside.count("short") <= 9, "a third each would be 12"
    assert beside.count("long") < 7, "they share it"
    assert len(done) == 70, "heavy work goes on where it is all there is"
