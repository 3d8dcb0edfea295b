"""Long runs of the harm in this folder, on one machine: python -m tests.chaos [OPTIONS] COMMAND"""

import asyncio
import functools
import tempfile
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from tests.chaos import checkpoints, faults
from tests.chaos.fleet import ROLES, SIZES, SMALL, STAGES, Fleet, FleetSettings
from tests.chaos.kill import kill_under_load
from tests.chaos.load import Job, Tally, jobs, undisturbed
from tests.chaos.rolling import roll_under_load
from tests.chaos.soak import soak as soaked
from tests.conftest import GOLDEN


@dataclass(frozen=True)
class Setup:
    """What all commands are given."""

    concurrency: int
    distinct: int
    tokens: int
    model: Path
    logs: Path

    def jobs(self) -> list[Job]:
        """Different requests."""
        return jobs(self.distinct, (self.tokens // 4, self.tokens // 2, self.tokens))

    def settings(self, **more: Any) -> FleetSettings:
        """Of a fleet."""
        return FleetSettings(self.logs, self.model, **more)


@click.group()
@click.option("--concurrency", default=12, show_default=True, help="Requests at once.")
@click.option("--distinct", default=60, show_default=True, help="Different requests.")
@click.option("--tokens", default=96, show_default=True, help="Most tokens of a request.")
@click.option("--model", default=GOLDEN / "tiny_b4", type=click.Path(path_type=Path, exists=True))
@click.option("--logs", default=None, type=click.Path(path_type=Path), help="Folder for the processes' logs.")
@click.pass_context
def main(context: click.Context, logs: Path | None, **options: Any) -> None:
    """Harm to a fleet of real processes under load; the exit code is 0 where the promises hold."""
    context.obj = Setup(logs=logs or Path(tempfile.mkdtemp()), **options)
    click.echo(f"logs in {context.obj.logs}")


def command(name: str) -> Callable[[Callable[..., Coroutine[Any, Any, bool]]], click.Command]:
    """A command of an async function, which tells whether a promise was broken."""

    def made(work: Callable[..., Coroutine[Any, Any, bool]]) -> click.Command:
        @functools.wraps(work)
        def run(setup: Setup, **options: Any) -> None:
            raise SystemExit(asyncio.run(work(setup, **options)))

        return main.command(name)(click.pass_obj(run))

    return made


def report(tally: Tally, *lines: str) -> None:
    """Print what became of the requests, and more."""
    click.echo("\n".join((*lines, *tally.lines())))


@command("kill")
@click.option("--requests", default=300, show_default=True)
@click.option("--period", default=3.0, show_default=True, help="Seconds between two kills.")
async def kill(setup: Setup, requests: int, period: float) -> bool:
    """SIGKILL of random replicas under load: 0 failed requests, every answer as undisturbed."""
    async with Fleet(setup.settings(sizes=SIZES)) as fleet:
        tally, killer = await kill_under_load(fleet, setup.jobs(), setup.concurrency, period, requests)
        resumed = await fleet.metric("colaserve_failovers_total", ("coordinator",), 'outcome="resumed"')
    report(tally, f"killed                   {killer.killed.total()} {dict(killer.killed)}")
    click.echo(f"failovers of those left  {sum(resumed.values()):.0f}")
    return bool(tally.failed or tally.wrong)


@command("rolling")
@click.option("--rounds", default=1, show_default=True, help="Times that every replica is restarted.")
async def rolling(setup: Setup, rounds: int) -> bool:
    """SIGTERM restarts of every role under load: 0 failed requests though nobody asks twice, exit codes 0."""
    bad, sizes = False, {**SIZES, "gateway": 2}  # of a single gateway nobody could take over
    async with Fleet(setup.settings(sizes=sizes)) as fleet:
        for _ in range(rounds):
            tally, codes = await roll_under_load(fleet, setup.jobs(), setup.concurrency, ROLES)
            failed = {name: code for name, code in codes.items() if code}
            report(tally, f"restarted                {len(codes)}, exit codes not 0: {failed or 0}")
            bad |= bool(tally.failed or tally.wrong or failed)
    return bad


@command("faults")
@click.option("--requests", default=100, show_default=True, help="For each kind of harm.")
async def harm(setup: Setup, requests: int) -> bool:
    """Delayed, cut, half-open and corrupted connections with TLS: no hang, no wrong text, no leaked KV."""
    some, bad = setup.jobs(), False
    wanted = [some[index % len(some)] for index in range(requests)]
    async with faults.harmed_fleet(setup.settings(sizes=SIZES)) as (fleet, proxies):
        expected = await undisturbed(fleet, some)
        for name, kind in faults.HARMS.items():
            tally, done, free = await faults.under_harm(fleet, proxies, kind, wanted, expected, setup.concurrency)
            ended = [replica.name for replica in fleet.all if not replica.running]
            report(tally, f"-- {name}: {dict(done)}")
            click.echo(f"beyond their deadline    {faults.hangs(tally)}\nKV free at the end       {free}")
            click.echo(f"processes that ended     {ended or 0}")
            bad |= bool(tally.wrong or faults.hangs(tally) or not free or ended)
    return bad


@command("checkpoints")
async def change(setup: Setup) -> bool:
    """Rolling changes of the prior and of the checkpoint under load: 0 failed requests, every text of one model."""
    some, bad, model = setup.jobs(), False, setup.model
    changes = (("prior", checkpoints.PRIOR, checkpoints.of_the_prior),)
    changes += (("checkpoint", checkpoints.ALL, checkpoints.of_the_checkpoint),)
    async with Fleet(setup.settings(sizes=SIZES)) as fleet:
        for name, parts, steps in changes:
            model, abruptly = checkpoints.varied(model, setup.logs / f"new-{name}", parts), name == "prior"
            tally, before, after = await checkpoints.change_under_load(
                fleet, some, setup.concurrency, steps(fleet), model, abruptly
            )
            left_out = sum((await fleet.metric("colaserve_stage_faults_total", label='kind="model"')).values())
            tally.expected, torn = after, checkpoints.torn(tally, before, after)
            report(tally, f"-- {name} changed; unlike the undisturbed: of the model before")
            click.echo(f"of neither model         {len(torn)}\nlooks at others' models  {left_out:.0f}")
            bad |= bool(tally.failed or torn or before == after)
    return bad


@command("soak")
@click.option("--minutes", default=20.0, show_default=True)
@click.option("--settle", default=120.0, show_default=True, help="Seconds until the memory's slope counts.")
async def soak(setup: Setup, minutes: float, settle: float) -> bool:
    """A fifth of the requests is left early, a twentieth passes its deadline; memory, files and KV must not grow."""
    async with Fleet(setup.settings(sizes={**dict.fromkeys(SMALL, 1), "gateway": 0})) as fleet:
        ended, watch, free = await soaked(fleet, setup.jobs(), setup.concurrency, minutes * 60)
        held = await fleet.metric("colaserve_engine_kv_bytes", STAGES)
    click.echo(f"requests                 {ended.total()} {dict(ended)}")
    click.echo("\n".join((*watch.lines(settle), f"KV bytes at the end      {held}")))
    return not free


if __name__ == "__main__":
    main()
