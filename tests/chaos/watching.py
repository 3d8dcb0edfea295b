"""Memory and open files of a fleet over time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import suppress

import psutil

from tests.chaos.fleet import Fleet

MIB = 1 << 20


class Watch:
    """`async with Watch(fleet) as watch:` looks at every process each second."""

    def __init__(self, fleet: Fleet):
        self._fleet = fleet
        self.memory: dict[str, list[tuple[float, float]]] = {}  # name -> (seconds, MiB resident)
        self.files: dict[str, list[int]] = {}

    async def __aenter__(self) -> Watch:
        self._begun = time.monotonic()
        self._task = asyncio.create_task(self._look())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task

    def slopes(self, settle: float) -> dict[str, float]:
        """MiB a minute of each process, after the first `settle` seconds; of the later half where that is less."""
        return {name: slope(_later(points, settle)) * 60 for name, points in self.memory.items()}

    def lines(self, settle: float) -> Iterator[str]:
        """The figures, a line each."""
        slopes = self.slopes(settle)
        for name, points in self.memory.items():
            files = self.files[name]
            quarters = ", ".join(f"{points[len(points) * i // 4 - 1][1]:.0f}" for i in range(1, 5))
            yield (
                f"{name:14} {slopes[name]:+.2f} MiB/min, {quarters} MiB at the quarters, "
                f"open files {files[0]} at first, {max(files)} at most, {files[-1]} at last"
            )

    async def _look(self) -> None:
        while True:
            for replica in self._fleet.all:
                with suppress(psutil.Error):
                    process = replica.memory()
                    point = time.monotonic() - self._begun, process.memory_info().rss / MIB
                    self.memory.setdefault(replica.name, []).append(point)
                    self.files.setdefault(replica.name, []).append(process.num_fds())
            await asyncio.sleep(1)


def _later(points: list[tuple[float, float]], settle: float) -> list[tuple[float, float]]:
    end = points[-1][0]
    return [point for point in points if point[0] >= min(settle, end / 2)]


def slope(points: list[tuple[float, float]]) -> float:
    """Of the straight line through the points with the least squares."""
    count = len(points)
    x_mean, y_mean = sum(x for x, _ in points) / count, sum(y for _, y in points) / count
    spread = sum((x - x_mean) ** 2 for x, _ in points)
    return sum((x - x_mean) * (y - y_mean) for x, y in points) / spread if spread else 0.0
