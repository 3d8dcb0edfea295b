"""Watches the prior's steps, and tells the steady ones from those of joining, prefill and leaving."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Any

import torch

from colaserve_services.engine.observer import EngineObserver


def new_profile() -> Any:
    """A profiler of operators; to be used once on the main thread first, or its library complains on stderr."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")
    return torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])


@dataclass(frozen=True)
class Step:
    """One forward pass; `ended` is time.monotonic() seconds."""

    ended: float
    seconds: float
    rows: int  # latent positions
    sessions: int

    @property
    def began(self) -> float:
        return self.ended - self.seconds


class StepRecorder(EngineObserver):
    """Keeps the steady steps of a run: from when all sessions have a first block and step again until one has its last.

    With `profile_steps`, that many of them run under torch.profiler instead and are kept apart.
    """

    def __init__(self) -> None:
        self.begin(1)

    def begin(self, sessions: int, profile_steps: int = 0) -> None:
        """Forget what was; `sessions` are about to start. While no session runs."""
        self._sessions, self._profile_steps = sessions, profile_steps
        self._first_blocks = 0
        self._is_steady = self._profiling = False
        self.steady: list[Step] = []
        self.profiled: list[Step] = []
        self.profile: Any = None

    def block(self, seconds: float, first: bool) -> None:
        self._first_blocks += first

    def queued(self, waiting: int, running: int) -> None:
        if self._is_steady and running < self._sessions:
            self._is_steady = False
            self._stop_profile()

    def stepped(self, seconds: float, rows: int, sessions: int) -> None:
        step = Step(time.monotonic(), seconds, rows, sessions)
        if self._profiling:
            self.profiled.append(step)
            if len(self.profiled) == self._profile_steps:
                self._stop_profile()
        elif self._is_steady:
            self.steady.append(step)
        elif self._first_blocks == sessions == self._sessions:
            self._begin_steady()

    def _begin_steady(self) -> None:
        self._first_blocks += 1  # once a run
        self._is_steady = True
        if self._profile_steps:
            self._profiling, self.profile = True, new_profile()
            self.profile.start()

    def _stop_profile(self) -> None:
        if self._profiling:
            self._profiling = False
            self.profile.stop()
