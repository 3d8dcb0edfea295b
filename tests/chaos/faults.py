"""A proxy between coordinators and stages, which speak TLS, does harm while requests run."""

from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace

from tests.authority import make_authority
from tests.chaos.fleet import STAGES, Fleet, FleetSettings, eventually, free_port
from tests.chaos.load import DEADLINE, Job, Tally, roads, side_by_side
from tests.chaos.proxy import Harm, Proxy

HARMS = {
    "delay": Harm(delay=0.05),
    "cut": Harm(cut=0.01),
    "half-open": Harm(swallow=0.003),
    "corrupt": Harm(corrupt=0.01),
    "all": Harm(delay=0.02, cut=0.005, swallow=0.002, corrupt=0.005),
}


@asynccontextmanager
async def harmed_fleet(settings: FleetSettings) -> AsyncIterator[tuple[Fleet, list[Proxy]]]:
    """A fleet whose coordinators reach each replica of each stage through a proxy of its own, with TLS."""
    authority = make_authority(settings.folder / "tls")
    authority.issue_folder("stages", ca=False)
    (authority.folder / "coordinators").mkdir()
    (authority.folder / "coordinators" / "ca.crt").write_bytes(authority.ca.read_bytes())
    ports = {stage: [free_port() for _ in range(settings.sizes[stage])] for stage in STAGES}
    through = {stage: ",".join(f"127.0.0.1:{port}" for port in ports[stage]) for stage in STAGES}
    fleet = Fleet(replace(settings, through=through, tls=authority.folder))
    async with AsyncExitStack() as stack:
        proxies = [
            await stack.enter_async_context(Proxy(port, replica.port, seed=port))
            for stage in STAGES
            for port, replica in zip(ports[stage], fleet.replicas[stage], strict=True)
        ]
        yield await stack.enter_async_context(fleet), proxies


async def under_harm(
    fleet: Fleet,
    proxies: list[Proxy],
    harm: Harm,
    wanted: list[Job],
    expected: dict[Job, str],
    concurrency: int,
    deadline: float = DEADLINE,
) -> tuple[Tally, Counter[str], bool]:
    """Ask for all while the proxies do this; then whether all KV is free again."""
    tally, before = Tally(expected=expected), sum((proxy.done for proxy in proxies), Counter())
    for proxy in proxies:
        proxy.harm = harm
    async with roads(fleet, deadline) as open_roads:

        async def one(job: Job) -> None:
            tally.outcomes.append(await open_roads.ask(job))

        await side_by_side(one, wanted, concurrency)
    for proxy in proxies:
        proxy.harm = Harm()
    done = sum((proxy.done for proxy in proxies), Counter()) - before
    return tally, done, await eventually(lambda: kv_free(fleet), 60)


async def kv_free(fleet: Fleet) -> bool:
    """Whether no stage holds KV or a session."""
    held = [await fleet.metric(name, STAGES) for name in ("colaserve_engine_kv_bytes", "colaserve_engine_running")]
    return not any(value for values in held for value in values.values())


def hangs(tally: Tally) -> int:
    """Requests that outlived their deadline."""
    return sum(outcome.error == "HANG" for outcome in tally.outcomes)
