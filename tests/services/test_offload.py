"""The thread for long Python work."""

import time

from colaserve_services.offload import Offload


def computed() -> tuple[float, float, float]:
    """When it began and ended, and the seconds of CPU between."""
    begun, cpu = time.monotonic(), time.thread_time()
    while time.thread_time() < cpu + 0.01:
        pass
    return begun, time.monotonic(), time.thread_time() - cpu


async def test_a_thread_rests_after_each_piece_of_work_in_proportion_to_it() -> None:
    for rest in (0, 5):
        offload = Offload("test", rest)
        _, ended, cpu = await offload(computed)
        begun, _, _ = await offload(computed)
        assert begun - ended >= rest * cpu
