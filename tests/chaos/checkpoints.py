"""A fleet changes its checkpoint replica by replica while requests run, and before that its prior alone, as after
fine-tuning it: python -m tests.chaos.checkpoints"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import click
from safetensors.torch import load_file, save_file

from tests.chaos.fleet import SIZES, STAGES, Fleet, FleetSettings, Replica
from tests.chaos.load import Job, Tally, jobs, undisturbed
from tests.chaos.rolling import asking, restart
from tests.conftest import GOLDEN

PRIOR = ("cola_dit",)
ALL = ("cola_dit", "cola_vae")


def varied(model: Path, folder: Path, parts: Sequence[str]) -> Path:
    """A copy of a checkpoint with other weights in these of its folders."""
    shutil.copytree(model, folder)
    for part in parts:
        for path in (folder / "cola_dlm" / part).glob("**/*.safetensors"):
            save_file({name: tensor * 1.1 for name, tensor in load_file(path).items()}, path)
    return folder


async def change_under_load(
    fleet: Fleet, some: list[Job], concurrency: int, steps: Sequence[Sequence[Replica]], model: Path, kill: bool = False
) -> tuple[Tally, dict[Job, str], dict[Job, str]]:
    """Restart the replicas with this model, those of a step at once, while requests run; with `kill` all but those of
    the last step end abruptly, and their runs go on elsewhere. Also the texts of before and of after."""
    tally, before = Tally(), await undisturbed(fleet, some)
    async with asking(fleet, some, concurrency, tally):
        for number, step in enumerate(steps, 1):
            for replica in step:
                replica.settings = replace(replica.settings, model=model)
            codes = await asyncio.gather(*(restart(replica, kill and number < len(steps)) for replica in step))
            assert not any(codes), codes
    return tally, before, await undisturbed(fleet, some)


def torn(tally: Tally, before: dict[Job, str], after: dict[Job, str]) -> list[str]:
    """Texts that neither checkpoint writes: begun by one and gone on with by the other."""
    asked = [(replace(outcome.job, http=False), outcome.text) for outcome in tally.outcomes if not outcome.error]
    return [text or "" for job, text in asked if text not in (before[job], after[job])]


def of_the_prior(fleet: Fleet) -> list[list[Replica]]:
    """Its replicas, one after the other."""
    return [[replica] for replica in fleet.replicas["prior"]]


def of_the_checkpoint(fleet: Fleet) -> list[list[Replica]]:
    """One replica of each stage first, then the coordinators, which have the tokenizer, then the rest of the stages: so
    there are stages for the old coordinators until the last one is gone, and for the new ones from the first on."""
    others = [replica for stage in STAGES for replica in fleet.replicas[stage][1:]]
    return [
        [fleet.replicas[stage][0] for stage in STAGES],
        *([replica] for replica in fleet.replicas["coordinator"]),
        *([replica] for replica in others),
    ]


@click.command()
@click.option("--concurrency", default=8, show_default=True)
@click.option("--distinct", default=40, show_default=True, help="Different requests.")
@click.option("--tokens", default=96, show_default=True, help="Most tokens of a request.")
@click.option("--model", default=GOLDEN / "tiny_b4", type=click.Path(path_type=Path, exists=True))
@click.option("--logs", default=None, type=click.Path(path_type=Path), help="Folder for the processes' logs.")
def main(concurrency: int, distinct: int, tokens: int, model: Path, logs: Path | None) -> None:
    """Rolling changes of the prior and of the checkpoint under load: 0 failed requests, every text of one model."""
    asyncio.run(_main(concurrency, distinct, tokens, model, logs or Path(tempfile.mkdtemp())))


async def _main(concurrency: int, distinct: int, tokens: int, model: Path, logs: Path) -> None:
    some, bad = jobs(distinct, (tokens // 4, tokens // 2, tokens)), False
    async with Fleet(FleetSettings(logs, model, SIZES)) as fleet:
        for name, parts, steps in (("prior", PRIOR, of_the_prior), ("checkpoint", ALL, of_the_checkpoint)):
            started, model = time.monotonic(), varied(model, logs / f"new-{name}", parts)
            tally, before, after = await change_under_load(
                fleet, some, concurrency, steps(fleet), model, kill=parts == PRIOR
            )
            left_out = sum((await fleet.metric("colaserve_stage_faults_total", label='kind="model"')).values())
            tally.expected = after
            print(f"-- {name} changed in {time.monotonic() - started:.0f} s, logs in {logs}")
            print("\n".join(tally.lines()).replace("unlike the undisturbed  ", "of the model before      "))
            print(f"of neither model         {len(torn(tally, before, after))}")
            print(f"looks at others' models  {left_out:.0f}", flush=True)
            bad |= bool(tally.failed or torn(tally, before, after) or before == after)
    raise SystemExit(bad)


if __name__ == "__main__":
    main()
