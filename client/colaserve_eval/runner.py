"""Asking a served model the questions: many at a time, each output written down at once, resumable."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from colaserve_client.cli.output import plain
from colaserve_client.client import AsyncClient
from colaserve_client.errors import ColaserveError, Overloaded
from colaserve_client.settings import NoiseSeed, Sampler, Sampling
from colaserve_eval.folder import RunFolder, Speed, Task
from colaserve_eval.records import EvalError, Record

T = TypeVar("T")
OVERLOAD_PAUSE = 1.0  # seconds before an overloaded server is asked again, where it gave no hint
SERVER_SAMPLER, SERVER_SAMPLING = Sampler(), Sampling()  # every field as the server has it
SAMPLE_IDS = 10_000  # of one base seed: noise differs between so many neighbouring questions


@dataclass(frozen=True)
class GenerationSettings:
    """How every question of a run is asked. None: what the server has as its default."""

    max_new_tokens: int | None = None
    sampler: Sampler = SERVER_SAMPLER
    sampling: Sampling = SERVER_SAMPLING
    seed: int = 0  # of the noise: the same questions get the same answers
    stop: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """By field name."""
        return dict(plain(self))


@dataclass(frozen=True)
class Limits:
    """How hard to press, and when to give up."""

    concurrency: int = 8  # questions in flight
    failures: int = 20  # failed answers in a row after which no more are asked
    patience: float = 600.0  # seconds that a question waits for an overloaded server


async def run_tasks(
    client: AsyncClient,
    settings: GenerationSettings,
    folder: RunFolder,
    limits: Limits = Limits(),
    on_output: Callable[[int, Record], None] = lambda count, output: None,
) -> Speed:
    """Ask every question that has no output yet. Returns the speed of this attempt, which the folder counts too.

    An answer that fails is written with its error and asked again by the next attempt. `on_output` is called with 1
    and each output. Raises EvalError after `limits.failures` failures in a row.
    """
    began, answered, failures = time.monotonic(), list[Record](), 0

    async def ask(item: tuple[Task, int, Record]) -> None:
        nonlocal failures
        task, position, question = item
        output = await _ask(client, settings, question, position, limits.patience)
        folder.append(task, output)
        on_output(1, output)
        if output.error is None:
            answered.append(output)
        failures = 0 if output.error is None else failures + 1
        if failures >= limits.failures:
            raise EvalError(
                f"{failures} answers in a row failed; the last: {output.error}. "
                "What was answered is kept: the same command continues from there"
            )

    def speed() -> Speed:
        tokens = sum((output.usage or {}).get("completion_tokens", 0) for output in answered)
        return Speed(time.monotonic() - began, tokens, len(answered))

    try:
        await work_through(folder.missing(), ask, limits.concurrency)
    finally:
        if answered:
            folder.add_speed(speed())
    folder.sort()
    return speed()


async def _ask(
    client: AsyncClient, settings: GenerationSettings, question: Record, position: int, patience: float
) -> Record:
    """The question with its answer, or with the error that it failed with.

    Its position in its task picks its noise: it is the sample id of the run's seed. An overloaded server has run
    nothing, so that is no failure of the question, which is asked again after a pause.
    """
    waited = 0.0
    while True:
        try:
            result = await client.generate(
                question.prompt,
                max_new_tokens=settings.max_new_tokens,
                sampler=settings.sampler,
                sampling=settings.sampling,
                seed=NoiseSeed(settings.seed, position % SAMPLE_IDS),
                stop=settings.stop,
            )
        except ColaserveError as error:
            if not isinstance(error, Overloaded) or waited >= patience:
                return replace(question, error=f"{type(error).__name__}: {error}")
            pause = error.retry_after or OVERLOAD_PAUSE
            waited += pause
            await asyncio.sleep(pause)
        else:
            usage = plain(result.usage)
            return replace(question, generate=result.text, finish_reason=result.finish_reason, usage=usage)


async def work_through(items: Iterable[T], work: Callable[[T], Awaitable[None]], concurrency: int) -> None:
    """Do the work for every item, `concurrency` at a time, taken in order. The first failure ends the others."""
    queue = iter(items)

    async def worker() -> None:
        for item in queue:
            await work(item)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(worker())
    except ExceptionGroup as failed:
        first = failed.exceptions[0]
        raise first from first.__cause__
