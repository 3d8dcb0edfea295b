"""How workers share the device thread."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from colaserve_services.engine.device import DeviceThread
from tests.waiting import wait_until


class Busy:
    """Has so many steps to do, each of so many seconds."""

    def __init__(self, name: str, seconds: float, steps: int, done: list[str]):
        self.name, self.seconds, self.steps, self.done = name, seconds, steps, done

    def step(self) -> bool:
        if not self.steps:
            return False
        time.sleep(self.seconds)
        self.steps -= 1
        self.done.append(self.name)
        return True

    def next_deadline(self) -> float | None:
        return None

    def fail(self, error: Exception) -> None: ...


@contextmanager
def shared(*workers: Busy) -> Iterator[DeviceThread]:
    """Until they have nothing to do."""
    device = DeviceThread()
    for worker in workers:
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
