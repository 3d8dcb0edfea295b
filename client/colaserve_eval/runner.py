"""Asking a served model the questions: many at a time, each output written down at once, resumable."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace
from typing import TypeVar

from colaserve_client.cli.output import plain
from colaserve_client.client import AsyncClient
from colaserve_client.errors import ColaserveError, Overloaded
from colaserve_client.settings import GenerationRequest, NoiseSeed
from colaserve_eval.records import EvalError, Record, RunFolder, Speed, Task

T = TypeVar("T")
OVERLOAD_PAUSE = 1.0  # seconds before an overloaded server is asked again, where it gave no hint
SAMPLE_IDS = 10_000  # of one base seed: noise differs between so many neighbouring questions


async def run_tasks(
    client: AsyncClient,
    request: GenerationRequest,
    folder: RunFolder,
    concurrency: int = 8,
    failures: int = 20,
    patience: float = 600.0,
    on_output: Callable[[int, Record], None] = lambda count, output: None,
) -> Speed:
    """Ask every question that has no output yet, as `request` but for its prompt; a question's position in its task
    picks its noise, the sample of the request's seed. Returns the speed of this attempt, which the folder counts too.

    An answer that fails is written with its error and asked again by the next attempt. `on_output` is called with 1
    and each output. Raises EvalError after so many `failures` in a row; a question waits `patience` seconds at most
    for an overloaded server.
    """
    began, answered, failed = time.monotonic(), list[Record](), 0

    async def ask(item: tuple[Task, int, Record]) -> None:
        nonlocal failed
        task, position, question = item
        seed = NoiseSeed(request.seed, position % SAMPLE_IDS) if isinstance(request.seed, int) else request.seed
        output = await _ask(client, replace(request, prompt=question.prompt, seed=seed), question, patience)
        folder.append(task, output)
        on_output(1, output)
        if output.error is None:
            answered.append(output)
        failed = 0 if output.error is None else failed + 1
        if failed >= failures:
            raise EvalError(
                f"{failed} answers in a row failed; the last: {output.error}. "
                "What was answered is kept: the same command continues from there"
            )

    def speed() -> Speed:
        tokens = sum((output.usage or {}).get("completion_tokens", 0) for output in answered)
        return Speed(time.monotonic() - began, tokens, len(answered))

    try:
        await work_through(folder.missing(), ask, concurrency)
    finally:
        if answered:
            folder.add_speed(speed())
    folder.sort()
    return speed()


async def _ask(client: AsyncClient, request: GenerationRequest, question: Record, patience: float) -> Record:
    """The question with its answer, or with the error that it failed with. An overloaded server has run nothing, so
    that is no failure of the question, which is asked again after a pause."""
    waited = 0.0
    while True:
        try:
            result = await client.generate(**vars(request))
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
