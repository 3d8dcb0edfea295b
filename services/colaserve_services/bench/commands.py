"""`colaserve bench ...`: make-checkpoint, engine, serve, prefix, load, solvers, ablate."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from colaserve_services.bench.presets import PRESETS
from colaserve_services.bench.weights import DTYPES, make_checkpoint
from colaserve_services.errors import ColaserveError


@click.group()
def bench() -> None:
    """Measure speed and memory; JSON with --json, a picture with --plot."""


@contextmanager
def _one_line() -> Iterator[None]:
    """An operator's mistake ends the command with its one line, not with a traceback."""
    try:
        yield
    except ColaserveError as error:
        raise click.ClickException(str(error)) from error


@bench.command("make-checkpoint")
@click.argument("directory", type=click.Path(file_okay=False, path_type=Path))
@click.option("--preset", type=click.Choice(list(PRESETS)), required=True, help="Size of the model.")
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="float32", show_default=True, help="As stored.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
def make_checkpoint_command(directory: Path, preset: str, dtype: str, seed: int) -> None:
    """Write random weights in the released layout, with a tokenizer of the right size, into DIRECTORY."""
    with _one_line():
        started = time.monotonic()
        parameters = make_checkpoint(preset, directory, dtype, seed)
        click.echo(f"{directory}: {parameters / 1e6:.1f} M parameters in {time.monotonic() - started:.1f} s")
