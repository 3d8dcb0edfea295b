"""How workers share the device thread."""

import time

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


def test_workers_share_the_time_and_not_the_number_of_steps() -> None:
    done: list[str] = []
    device = DeviceThread()
    workers = [Busy("long", 0.05, 10, done), Busy("short", 0.002, 100, done)]
    for worker in workers:
        device.register(worker)
    device.start()
    wait_until(lambda: not any(worker.steps for worker in workers))
    device.stop()
    assert done[0] == "long"
    assert done[: done.index("short") + 60].count("long") <= 6


def test_what_a_worker_did_not_use_is_not_owed_to_it() -> None:
    done: list[str] = []
    device = DeviceThread()
    always, late = Busy("always", 0.002, 100, done), Busy("late", 0.002, 0, done)
    for worker in (always, late):
        device.register(worker)
    device.start()
    wait_until(lambda: len(done) > 50)
    late.steps = 20
    device.wake()
    wait_until(lambda: not (always.steps or late.steps))
    device.stop()
    first = done.index("late")
    assert "always" in done[first : first + 4]
