"""`colaserve bench ...`: make-checkpoint, engine, solvers, ablate, prefix, load, serve."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import click

from colaserve_services.bench import engine as engine_bench
from colaserve_services.bench import memory
from colaserve_services.bench import solvers as solvers_bench
from colaserve_services.bench.options import (
    POSITIVE,
    Numbers,
    compute,
    compute_options,
    output_options,
    publish,
    sampler,
    sampler_options,
    say,
    together,
)
from colaserve_services.bench.presets import PRESETS
from colaserve_services.bench.weights import DTYPES, make_checkpoint
from colaserve_services.commands import run_or_explain


@click.group()
def bench() -> None:
    """Measure speed and memory; JSON with --json, a picture with --plot. docs/benchmarks.md tells how to read it."""


@bench.command("make-checkpoint")
@click.argument("directory", type=click.Path(file_okay=False, path_type=Path))
@click.option("--preset", type=click.Choice(list(PRESETS)), required=True, help="Size of the model.")
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="float32", show_default=True, help="As stored.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
def make_checkpoint_command(directory: Path, preset: str, dtype: str, seed: int) -> None:
    """Write random weights in the released layout, with a tokenizer of the right size, into DIRECTORY."""

    def work() -> None:
        started = time.monotonic()
        parameters = make_checkpoint(preset, directory, dtype, seed)
        click.echo(f"{directory}: {parameters / 1e6:.1f} M parameters in {time.monotonic() - started:.1f} s")

    run_or_explain(work)


engine_options = together(
    compute_options,
    click.option("--sessions", type=Numbers(), default="1,4,16", show_default=True, help="Sessions at once."),
    click.option("--context", type=Numbers(int, 0), default="64", show_default=True, help="Latents before each."),
    sampler_options,
    click.option("--blocks", type=POSITIVE, default=3, show_default=True, help="Of each session; one is warm-up."),
    click.option("--rounds", type=POSITIVE, default=3, show_default=True),
)


def _engine_settings(quick: bool, options: dict[str, Any], **more: Any) -> engine_bench.EngineSettings:
    """Of `engine_options`."""
    return engine_bench.EngineSettings(
        compute(*(options[name] for name in ("model", "dtype", "device", "threads"))),
        sessions=options["sessions"],
        contexts=options["context"],
        blocks=options["blocks"],
        rounds=1 if quick else options["rounds"],
        sampler=sampler(*(options[name] for name in ("steps", "guidance", "solver"))),
        peak_seconds=0.05 if quick else 0.5,
        **more,
    )


@bench.command()
@engine_options
@click.option("--decoder", "decode", is_flag=True, help="Every block also goes through the decoder.")
@click.option("--profile/--no-profile", default=True, show_default=True, help="Also tell where the time goes.")
@output_options
def engine(
    decode: bool, profile: bool, json_file: Path | None, plot_file: Path | None, quick: bool, **options: Any
) -> None:
    """The prior alone: blocks and tokens a second, and the share of the speed of its matrix products alone."""

    def work() -> None:
        settings = _engine_settings(quick, options, decode=decode, profile=profile)
        report = asyncio.run(engine_bench.engine(settings, say))
        publish(report, json_file, plot_file, "sessions", "context", engine_bench.PANELS)

    run_or_explain(work)


@bench.command()
@engine_options
@output_options
def solvers(json_file: Path | None, plot_file: Path | None, quick: bool, **options: Any) -> None:
    """What fewer steps with a higher-order solver and a guidance interval save."""

    def work() -> None:
        report = asyncio.run(solvers_bench.solvers(_engine_settings(quick, options), say))
        publish(report, json_file, plot_file, "sessions", "variant", solvers_bench.PANELS)

    run_or_explain(work)


@bench.command()
@compute_options
@click.option("--rounds", type=POSITIVE, default=2, show_default=True)
@output_options
def load(json_file: Path | None, plot_file: Path | None, quick: bool, rounds: int, **options: Any) -> None:
    """Time and memory of reading the weights: each role alone, then all in one process."""

    def work() -> None:
        settings = memory.LoadSettings(compute(**options), 1 if quick else rounds)
        publish(memory.load(settings, say), json_file, plot_file, "role", "role", memory.PANELS)

    run_or_explain(work)
