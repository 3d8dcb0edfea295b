"""Asking a served model the questions: many at a time, each output written down at once, resumable."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from colaserve_client.errors import ColaserveError, Overloaded
from colaserve_client.results import GenerationResult, Usage
from colaserve_client.settings import NoiseSeed, Sampler, Sampling
from colaserve_eval.folder import OutputLog, RunFolder, Speed, Task
from colaserve_eval.pool import work_through
from colaserve_eval.records import EvalError, Output, Question

USAGE_FIELDS = ("prompt_tokens", "completion_tokens", "blocks", "wasted_blocks")
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
        return {**asdict(self), "stop": list(self.stop)}


class Model(Protocol):
    """What the runner needs of a client; `colaserve_client.AsyncClient` is one."""

    async def generate(
        self,
        prompt: str,
        *,
        max_new_tokens: int | None,
        sampler: Sampler | None,
        sampling: Sampling | None,
        seed: int | NoiseSeed | None,
        stop: Sequence[str],
    ) -> GenerationResult:
        """The whole continuation of a prompt."""


@dataclass(frozen=True)
class Limits:
    """How hard to press, and when to give up."""

    concurrency: int = 8  # questions in flight
    failures: int = 20  # failed answers in a row after which no more are asked
    patience: float = 600.0  # seconds that a question waits for an overloaded server


OnOutput = Callable[[Output], None]


async def run_tasks(
    model: Model,
    settings: GenerationSettings,
    folder: RunFolder,
    tasks: Sequence[Task],
    limits: Limits = Limits(),
    on_output: OnOutput = lambda output: None,
) -> Speed:
    """Ask every question that has no output yet. Returns the speed of this attempt, which the folder counts too.

    An answer that fails is written with its error and asked again by the next attempt. Raises EvalError after
    `limits.failures` failures in a row.
    """
    attempt = _Attempt(model, settings, limits, on_output)
    logs = [(task, folder.log(task)) for task in tasks]
    pending = ((log, *item) for task, log in logs for item in log.missing(task.questions))
    try:
        await work_through(pending, attempt.ask, limits.concurrency)
    finally:
        if attempt.speed.answers:
            folder.add_speed(attempt.speed)
    for task, log in logs:
        log.sort(task.questions)
    return attempt.speed


class _Attempt:
    """One go at the questions that are left."""

    def __init__(self, model: Model, settings: GenerationSettings, limits: Limits, on_output: OnOutput):
        self._model, self._settings, self._limits, self._on_output = model, settings, limits, on_output
        self._began = time.monotonic()
        self._tokens = self._answers = self._failures = 0

    @property
    def speed(self) -> Speed:
        return Speed(time.monotonic() - self._began, self._tokens, self._answers)

    async def ask(self, item: tuple[OutputLog, int, Question]) -> None:
        """Ask one question and write the output down."""
        log, position, question = item
        output = await self._answer(question, position)
        log.append(output)
        self._count(output)
        self._on_output(output)

    async def _answer(self, question: Question, position: int) -> Output:
        """An overloaded server has run nothing: it is no failure of the question, which waits and is asked again."""
        waited = 0.0
        while True:
            try:
                return await ask_once(self._model, self._settings, question, position)
            except Overloaded as error:
                if waited >= self._limits.patience:
                    return failed(question, error)
                pause = error.retry_after or OVERLOAD_PAUSE
                waited += pause
                await asyncio.sleep(pause)

    def _count(self, output: Output) -> None:
        if output.error is None:
            self._answers, self._failures = self._answers + 1, 0
            self._tokens += (output.usage or {}).get("completion_tokens", 0)
            return
        self._failures += 1
        if self._failures >= self._limits.failures:
            raise EvalError(
                f"{self._failures} answers in a row failed; the last: {output.error}. "
                "What was answered is kept: the same command goes on from there"
            )


async def ask_once(model: Model, settings: GenerationSettings, question: Question, position: int) -> Output:
    """One question's output; a failure of the service is part of it, but for `Overloaded`, which is raised.

    The question's place in its task picks its noise: it is the sample id of the run's seed.
    """
    try:
        result = await model.generate(
            question.prompt,
            max_new_tokens=settings.max_new_tokens,
            sampler=settings.sampler,
            sampling=settings.sampling,
            seed=NoiseSeed(settings.seed, position % SAMPLE_IDS),
            stop=settings.stop,
        )
    except Overloaded:
        raise
    except ColaserveError as error:
        return failed(question, error)
    return Output(question, result.text, result.finish_reason, usage_json(result.usage))


def failed(question: Question, error: ColaserveError) -> Output:
    """The output of a question without an answer."""
    return Output(question, "", error=f"{type(error).__name__}: {error}")


def usage_json(usage: Usage) -> Mapping[str, int]:
    """The counts that an output records, by name."""
    return {name: getattr(usage, name) for name in USAGE_FIELDS}
