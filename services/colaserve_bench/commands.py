"""The verbs of `colaserve bench`."""

import time
from pathlib import Path

import click

from colaserve_bench.checkpoint import PRESETS, make_checkpoint
from colaserve_bench.engine import engine, solvers, stall
from colaserve_bench.load import load
from colaserve_bench.savings import fork, prefix, stable
from colaserve_bench.serve import serve
from colaserve_bench.verbs import FOLDER
from colaserve_services.launch.options import run_or_explain


@click.group()
def bench() -> None:
    """Measure speed and memory; JSON with --json. docs/performance.md explains it."""


@bench.command("make-checkpoint")
@click.argument("directory", type=FOLDER)
@click.option("--preset", type=click.Choice(list(PRESETS)), required=True, help="Size of the model.")
@click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True, help="As stored."
)
@click.option("--seed", type=click.IntRange(0, 2**64 - 1), default=0, show_default=True)
def make_checkpoint_command(directory: Path, preset: str, dtype: str, seed: int) -> None:
    """Write random weights in the released layout, with a tokenizer of the right size, into DIRECTORY."""

    def work() -> None:
        started = time.monotonic()
        parameters = make_checkpoint(PRESETS[preset], directory, dtype, seed)
        click.echo(f"{directory}: {parameters / 1e6:.1f} M parameters in {time.monotonic() - started:.1f} s")

    run_or_explain(work)


for _verb in (engine, solvers, stable, stall, load, prefix, fork, serve):
    bench.add_command(_verb)
