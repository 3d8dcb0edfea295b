"""Random requests to the three engines, some of which make the networks fail: python -m tests.stress --seconds 300"""

import asyncio
import logging
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import click
import torch

from colaserve_services.decoder.engine import DecodeJob
from colaserve_services.engine.limits import EngineLimits
from colaserve_services.errors import ColaserveError, Overloaded, StepFailed
from colaserve_services.model.flow import SamplerSettings
from colaserve_services.model.sampling import SamplingSettings
from colaserve_services.prior.sampling_run import SampleJob
from tests.conftest import GOLDEN
from tests.services.engines import faults
from tests.services.engines.conftest import Engines, engines
from tests.services.engines.faults import Fault, Network, marked_ids, marked_job, marked_latents
from tests.services.engines.runs import freed, noise

REQUESTS: Final = 12  # different ones of each stage
FAILURES: Final[dict[str, tuple[Fault, type[ColaserveError]]]] = {
    "exception": (faults.raises, StepFailed),
    "exception in the last layer": (faults.raises_late, StepFailed),
    "NaN": (faults.not_finite, StepFailed),
    "out of memory": (faults.lacks_memory, Overloaded),
}
HANG: Final = "hang"
LATENTS: Final = dict(zip([*FAILURES, HANG], range(71, 80), strict=False))  # the mark of each kind
TOKENS: Final = dict(zip([*FAILURES, HANG], range(471, 480), strict=False))

Answer = list[Any]


@dataclass
class Outcome:
    """What was seen."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        return [*(f"{name:<44}{count:>7}" for name, count in sorted(self.counts.items())), *self.wrong]


async def encode(number: int, stages: Engines, kind: str | None) -> Answer:
    rng = random.Random(number)
    ids = [rng.randrange(100, 400) for _ in range(rng.choice((1, 7, 30, 90)))]
    (encoded,), _ = await stages.encoder.encode([marked_ids(ids, TOKENS[kind]) if kind else ids])
    return encoded.latents.flatten().tolist()


async def write(number: int, stages: Engines, kind: str | None) -> Answer:
    rng = random.Random(number)
    sampler = SamplerSettings(
        steps=rng.choice((2, 3, 5)), guidance_scale=rng.choice((1.0, 3.0)), solver=rng.choice(("euler", "ab2", "heun")),
        resamples=rng.choice((1, 1, 2)),
    )  # fmt: skip
    job = SampleJob(noise(1 + 4 * rng.randrange(20), number), rng.choice((1, 2, 6)), sampler=sampler, base_seed=number)
    async with stages.prior.session(marked_job(job, LATENTS[kind]) if kind else job) as session:
        return [x async for block in session for x in block.latents.flatten().tolist()]


async def decode(number: int, stages: Engines, kind: str | None) -> Answer:
    rng = random.Random(number)
    prefix, count, largest = noise(4 * rng.randrange(20), number), rng.choice((1, 2, 6)), rng.random() < 0.2
    job = DecodeJob(prefix, SamplingSettings(seed=number), max_latents=256 if largest else len(prefix) + 4 * count)
    ids: list[int] = []
    async with stages.decoder.session(job) as session:
        for block in range(count):
            latents = noise(4, 1000 * number + block)
            if kind is not None and block == count - 1:
                latents = marked_latents(latents, LATENTS[kind])
            ids += (await session.decode(latents)).token_ids
    return ids


STAGES: Final = {"encoder": encode, "prior": write, "decoder": decode}


class Stress:
    """Callers that ask at random until the time is up."""

    def __init__(self, stages: Engines, networks: list[Network], seed: int, hang: float):
        self._stages, self._networks, self._hang = stages, networks, hang
        self._rng, self.outcome = random.Random(seed), Outcome()
        self._undisturbed: dict[tuple[str, int], Answer] = {}

    async def run(self, seconds: float, callers: int) -> Outcome:
        for stage, ask in STAGES.items():
            for number in range(REQUESTS):
                self._undisturbed[stage, number] = await ask(number, self._stages, None)
        for kind, (fault, _) in FAILURES.items():
            self._break(kind, fault)
        end = time.monotonic() + seconds
        await asyncio.gather(*(self._caller(end) for _ in range(callers)))
        await freed(self._stages)
        return self.outcome

    def _break(self, kind: str, fault: Fault) -> None:
        for network in self._networks:
            network.faults |= {LATENTS[kind]: fault, TOKENS[kind]: fault}

    async def _caller(self, end: float) -> None:
        while time.monotonic() < end:
            stage, number, draw = self._rng.choice([*STAGES]), self._rng.randrange(REQUESTS), self._rng.random()
            if 0.17 <= draw < 0.3:
                await self._leaving(stage, number, self._rng.choice([None, *FAILURES]))
                continue
            kind = self._rng.choice([*FAILURES]) if draw < 0.15 else HANG if draw < 0.17 else None
            if kind == HANG:  # it resumes when the network does
                self._break(HANG, faults.hangs(self._hang))
            await self._asked(stage, number, kind)

    async def _asked(self, stage: str, number: int, kind: str | None) -> None:
        """Innocent requests end as undisturbed, guilty ones with their error, those that hung with a result."""
        try:
            got: Any = await self._patiently(stage, number, kind)
        except ColaserveError as error:
            got = error
        if kind in FAILURES:
            expected = FAILURES[kind][1]
            name, right = f"{kind}, {expected.__name__}", isinstance(got, expected)
        else:
            name = "hung and resumed" if kind else "innocent, as undisturbed"
            right = not isinstance(got, ColaserveError) and (kind or self._same(got, self._undisturbed[stage, number]))
        self.outcome.counts[f"{stage}: {name}"] += bool(right)
        if not right:
            ended = f"{got!r}" if isinstance(got, ColaserveError) else "other results"
            self.outcome.wrong.append(f"{stage} {number}: expected {name}; it ended with {ended}")

    async def _leaving(self, stage: str, number: int, kind: str | None) -> None:
        asking = asyncio.ensure_future(STAGES[stage](number, self._stages, kind))
        await asyncio.wait([asking], timeout=self._rng.random() * 0.1)
        asking.cancel()
        (ended,) = await asyncio.gather(asking, return_exceptions=True)
        left = isinstance(ended, asyncio.CancelledError)
        self.outcome.counts[f"{stage}: {'left' if left else 'was to leave, and ended before'}"] += 1

    async def _patiently(self, stage: str, number: int, kind: str | None) -> Answer:
        """Ask again while the engine is full."""
        while True:
            try:
                return await STAGES[stage](number, self._stages, kind)
            except Overloaded as error:
                if "the device has no memory" in str(error):
                    raise
                await asyncio.sleep(0.05)

    @staticmethod
    def _same(got: Answer, expected: Answer) -> bool:
        if got and isinstance(got[0], int):
            return got == expected
        return len(got) == len(expected) and torch.allclose(
            torch.tensor(got), torch.tensor(expected), rtol=1e-3, atol=1e-3
        )


class _Tracebacks(logging.Handler):
    """Errors in the log that are not those of a step that failed with one session alone."""

    def __init__(self, outcome: Outcome):
        super().__init__(logging.ERROR)
        self._outcome = outcome

    def emit(self, record: logging.LogRecord) -> None:
        if not record.getMessage().startswith("a step failed with one session alone"):
            self._outcome.wrong.append(f"in the log: {record.getMessage()}")


async def stress(
    seconds: float, seed: int, hang: float, callers: int = 12, model: Path = GOLDEN / "tiny_b4", say: Any = None
) -> Outcome:
    """Innocent requests end as undisturbed, guilty ones with a true error, hung ones go on, and all is freed."""
    networks: list[Network] = []

    def network(found: Any) -> Network:
        networks.append(Network(found, {}))
        return networks[-1]

    limits = EngineLimits(max_context=256, max_running=6, kv_bytes=1 << 20, prefill_chunk=32)
    with engines(model, limits, network=network) as stages:
        it = Stress(stages, networks, seed, hang)
        handler = _Tracebacks(it.outcome)
        logging.getLogger().addHandler(handler)
        try:
            return await it.run(seconds, callers)
        finally:
            logging.getLogger().removeHandler(handler)


@click.command()
@click.option("--seconds", default=300.0, show_default=True)
@click.option("--seed", default=None, type=int, help="Of the random choices; drawn and printed when not given.")
@click.option("--hang", default=3.0, show_default=True, help="Seconds that a network hangs.")
def main(seconds: float, seed: int | None, hang: float) -> None:
    """Random requests to the three engines, some of which make the networks fail."""
    seed = random.randrange(1 << 32) if seed is None else seed
    logging.getLogger("colaserve_services").setLevel(logging.CRITICAL)
    outcome = asyncio.run(stress(seconds, seed, hang))
    print(f"seed {seed}", *outcome.lines(), sep="\n")
    raise SystemExit(bool(outcome.wrong))


if __name__ == "__main__":
    main()
