"""What the fleet is asked, over both roads: the client library to the coordinators, plain HTTP to a gateway."""

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

import httpx

from colaserve_client import AsyncClient, ColaserveError, Retry, Sampling
from tests.chaos.fleet import Fleet

DEADLINE = 60.0  # seconds of a request, retries included
ONCE = Retry(attempts=1)
WORDS = "the a red blue house tree river of and fox ran over under quickly nobody said that it was there"


@dataclass(frozen=True)
class Job:
    """A request whose answer is the same whenever it is asked."""

    prompt: str
    tokens: int
    seed: int
    temperature: float
    http: bool = False


@dataclass
class Outcome:
    """What became of one request."""

    job: Job
    seconds: float = 0.0
    text: str | None = None
    error: str = ""
    repeated: int = 0  # attempts that a caller made beyond the first


# Seconds in which a killed coordinator may still be what a request meets: connections to it are not yet known to be
# dead, and its twin, back from its own death, is found again within the channel's longest backoff.
_NOTICED = 4.0


@dataclass
class Tally:
    """What became of all."""

    outcomes: list[Outcome] = field(default_factory=list)
    expected: dict[Job, str] = field(default_factory=dict)

    @property
    def failed(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.error]

    @property
    def wrong(self) -> list[Outcome]:
        """Answers unlike the undisturbed ones."""
        return [o for o in self.outcomes if not o.error and o.text != self.expected[replace(o.job, http=False)]]

    def lines(self) -> Iterator[str]:
        """The figures, a line each."""
        seconds = sorted(outcome.seconds for outcome in self.outcomes)
        repeated = sum(outcome.repeated > 0 for outcome in self.outcomes)
        yield f"requests                 {len(self.outcomes)}"
        yield f"failed                   {len(self.failed)} {dict(Counter(o.error for o in self.failed)) or ''}"
        yield f"unlike the undisturbed   {len(self.wrong)}"
        yield f"repeated by their caller {repeated}"
        middle, late = seconds[len(seconds) // 2], seconds[int(len(seconds) * 0.99)]
        yield f"seconds p50, p99, most   {middle:.2f}, {late:.2f}, {seconds[-1]:.2f}"


def jobs(count: int, tokens: Sequence[int], seed: int = 0) -> list[Job]:
    """Different requests: every third one draws its tokens at random (with a seed), every other one goes over HTTP."""
    draw = random.Random(seed)
    return [
        Job(
            " ".join(draw.choices(WORDS.split(), k=draw.randint(1, 12))),
            draw.choice(tokens),
            draw.getrandbits(31),
            0.8 if index % 3 == 0 else 0.0,
            http=index % 2 == 1,
        )
        for index in range(count)
    ]


class Roads:
    """Asks the fleet. A caller whose coordinator may have died, since one was killed meanwhile, asks again."""

    def __init__(self, fleet: Fleet, client: AsyncClient, http: httpx.AsyncClient, deadline: float):
        self._fleet, self._client, self._http, self._deadline = fleet, client, http, deadline
        self.coordinator_died = float("-inf")  # when the latest one was killed
        self.gateways = list(fleet.replicas["gateway"])  # that a balancer would send requests to
        self._turn = 0

    async def ask(self, job: Job) -> Outcome:
        """Ask once; again, within the deadline, where that is allowed, as the client library does by itself before the
        first block."""
        outcome, started = Outcome(job), time.monotonic()
        while True:
            left = self._deadline - (time.monotonic() - started)
            try:
                async with asyncio.timeout(left + 20):  # a deadline that nobody keeps is a hang
                    outcome.text = await (self._over_http if job.http else self._over_grpc)(job, left)
                outcome.error = ""
            except TimeoutError:
                outcome.error = "HANG"
            except (ColaserveError, httpx.HTTPError, _Refused) as error:
                outcome.error = str(error) if isinstance(error, _Refused) else type(error).__name__
                lost = outcome.error in ("Unavailable", "503") and self.coordinator_died > started - _NOTICED
                if lost and outcome.repeated < 25:
                    outcome.repeated += 1
                    await asyncio.sleep(0.2)
                    continue
            outcome.seconds = time.monotonic() - started
            return outcome

    async def _over_grpc(self, job: Job, seconds: float) -> str:
        result = await self._client.generate(
            job.prompt,
            max_new_tokens=job.tokens,
            seed=job.seed,
            sampling=Sampling(temperature=job.temperature),
            ignore_end=True,
            timeout=seconds,
        )
        return result.text

    async def _over_http(self, job: Job, seconds: float) -> str:
        body = {
            "prompt": job.prompt, "max_tokens": job.tokens, "seed": job.seed, "temperature": job.temperature,
            "ignore_eos": True,
        }  # fmt: skip
        self._turn += 1
        gateway = self.gateways[self._turn % len(self.gateways)]
        headers = {"x-request-timeout": f"{seconds:.3f}"}
        answer = await self._http.post(f"http://{gateway.address}/v1/completions", json=body, headers=headers)
        if answer.status_code != 200:
            raise _Refused(str(answer.status_code))
        return str(answer.json()["choices"][0]["text"])

    async def balance(self) -> None:
        """Follow the gateways' readiness, as a balancer in front of them does; for ever."""
        while True:
            if ready := await self._fleet.serving("gateway"):
                self.gateways = ready
            await asyncio.sleep(0.2)


class _Refused(Exception):
    """An HTTP status that is no success."""


@asynccontextmanager
async def roads(fleet: Fleet, deadline: float = DEADLINE, retry: Retry = ONCE) -> AsyncIterator[Roads]:
    """Open roads to the fleet; by default every failure of the client library's calls is seen."""
    limits = httpx.Limits(max_connections=200)
    async with (
        AsyncClient(fleet.target, retry=retry) as client,
        httpx.AsyncClient(timeout=DEADLINE, limits=limits) as http,
    ):
        yield Roads(fleet, client, http, deadline)


async def undisturbed(fleet: Fleet, wanted: Sequence[Job]) -> dict[Job, str]:
    """The answers while nothing fails."""
    expected: dict[Job, str] = {}
    async with roads(fleet) as open_roads:

        async def one(job: Job) -> None:
            outcome = await open_roads.ask(replace(job, http=False))
            assert outcome.text is not None, f"undisturbed, and yet {outcome.error}"
            expected[replace(job, http=False)] = outcome.text

        await side_by_side(one, wanted, 4)
    return expected


async def side_by_side(work: Callable, items: Sequence[Job], concurrency: int) -> None:  # type: ignore[type-arg]
    """Do it for all, so many at once."""
    left = iter(items)

    async def worker() -> None:
        for item in left:
            await work(item)

    await asyncio.gather(*(worker() for _ in range(concurrency)))


async def endless(work: Callable[[Job], object], wanted: Sequence[Job], concurrency: int, stop: asyncio.Event) -> None:
    """Ask for the jobs again and again until stopped; what runs then is awaited."""

    async def worker(number: int) -> None:
        index = number
        while not stop.is_set():
            await work(wanted[index % len(wanted)])  # type: ignore[misc]
            index += concurrency

    await asyncio.gather(*(worker(number) for number in range(concurrency)))
