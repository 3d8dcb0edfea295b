"""A fleet changes its checkpoint replica by replica while requests run, and before that its prior alone, as after
fine-tuning it."""

import asyncio
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from safetensors.torch import load_file, save_file

from tests.chaos.fleet import STAGES, Fleet, Replica
from tests.chaos.load import Job, Tally, undisturbed
from tests.chaos.rolling import asking, restart

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
