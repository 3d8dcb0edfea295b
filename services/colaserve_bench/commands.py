"""`colaserve bench ...`: make-checkpoint, engine, solvers, stall, load, prefix, serve."""

from __future__ import annotations

import asyncio
import secrets
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from colaserve_bench import compare as comparison
from colaserve_bench import engine as engine_bench
from colaserve_bench import memory
from colaserve_bench import prefix as prefix_bench
from colaserve_bench import serve as serve_bench
from colaserve_bench import solvers as solvers_bench
from colaserve_bench import stall as stall_bench
from colaserve_bench.options import (
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
from colaserve_bench.presets import PRESETS
from colaserve_bench.report import Report
from colaserve_bench.requests import Mix
from colaserve_bench.system import SystemSettings, running
from colaserve_bench.weights import DTYPES, make_checkpoint
from colaserve_client import Sampler
from colaserve_services.commands import run_or_explain
from colaserve_services.errors import UsageError


@click.group()
def bench() -> None:
    """Measure speed and memory; JSON with --json, a picture with --plot. docs/performance.md explains it."""


@bench.command("make-checkpoint")
@click.argument("directory", type=click.Path(file_okay=False, path_type=Path))
@click.option("--preset", type=click.Choice(list(PRESETS)), required=True, help="Size of the model.")
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="float32", show_default=True, help="As stored.")
@click.option("--seed", type=click.IntRange(0, 2**64 - 1), default=0, show_default=True)
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
@click.option("--sessions", type=Numbers(), default="8", show_default=True, help="Running sessions.")
@click.option("--prompt", type=Numbers(), default="4096", show_default=True, help="Latents of the one that joins.")
@sampler_options
@click.option("--rounds", type=POSITIVE, default=3, show_default=True)
@output_options
def stall(
    sessions: tuple[int, ...], prompt: tuple[int, ...], rounds: int, json_file: Path | None, plot_file: Path | None,
    quick: bool, **options: Any,
) -> None:  # fmt: skip
    """How much running sessions wait while one with a long prompt joins them."""

    def work() -> None:
        settings = stall_bench.StallSettings(
            compute(*(options[name] for name in ("model", "dtype", "device", "threads"))),
            sessions,
            prompt,
            sampler=sampler(*(options[name] for name in ("steps", "guidance", "solver"))),
            rounds=1 if quick else rounds,
        )
        report = asyncio.run(stall_bench.stall(settings, say))
        publish(report, json_file, plot_file, "sessions", "prompt", stall_bench.PANELS)

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


target_options = together(
    click.option("--target", help="Address of a running coordinator or `colaserve up`, host:port."),
    click.option("--key", envvar="COLASERVE_KEY", help="Bearer key for --target."),
    click.option("--model", type=click.Path(file_okay=False, path_type=Path), help="Checkpoint, with --start."),
    click.option(
        "--dtype", type=click.Choice(list(DTYPES)), default="bfloat16", show_default=True, help="With --start."
    ),
    click.option("--device", default="cpu", show_default=True, help="With --start."),
    click.option("--threads", type=POSITIVE, help="Of the one process, with --start [torch's choice]."),
    click.option("--split-threads", type=POSITIVE, help="Of each process when split [`up --split` chooses]."),
    click.option("--up-option", multiple=True, help="Further option of `colaserve up`, such as --max-running=64."),
    click.option("--timeout", type=float, default=300.0, show_default=True, help="Seconds, of one request."),
    click.option("--seed", type=int, help="Of the prompts [random, so that no cache has seen them]."),
)


@bench.command()
@target_options
@click.option("--start", type=click.Choice(["up", "split", "both"]), help="Systems of our own instead, on --model.")
@click.option("--engine/--no-engine", default=True, help="With --start: also run `bench engine --decoder`.")
@click.option("--concurrency", type=Numbers(), default="1,4,16", show_default=True, help="Closed loops.")
@click.option("--rate", type=Numbers(float, 0.001), default=(), help="Open loops: requests a second.")
@click.option("--prompt-tokens", type=Numbers(), default="64", show_default=True, help="Drawn for each request.")
@click.option("--new-tokens", type=Numbers(), default="64,128,192", show_default=True, help="Drawn for each request.")
@sampler_options
@click.option("--warmup", type=float, default=5.0, show_default=True, help="Seconds that do not count.")
@click.option("--duration", type=float, default=30.0, show_default=True, help="Seconds measured, each load.")
@click.option("--rounds", type=POSITIVE, default=1, show_default=True)
@click.option("--slo-first", type=float, default=5.0, show_default=True, help="Objective: seconds to first block.")
@click.option("--slo-next", type=float, default=1.0, show_default=True, help="Objective: mean seconds between blocks.")
@output_options
def serve(
    target: str | None, key: str | None, start: str | None, engine: bool, json_file: Path | None,
    plot_file: Path | None, quick: bool, **options: Any,
) -> None:  # fmt: skip
    """A running system under load, as its clients see it; or systems of our own, compared."""

    def work() -> None:
        _check_target(target, start)
        settings = _serve_settings(quick, options)
        if target is not None:
            report = asyncio.run(serve_bench.serve(target, settings, say, key))
            series = "loop"
        else:
            systems = _systems(str(start), options)
            report = asyncio.run(comparison.compare(comparison.CompareSettings(settings, systems, engine), say))
            series = "series"
        publish(report, json_file, plot_file, "load", series, serve_bench.PANELS)

    run_or_explain(work)


def _serve_settings(quick: bool, options: dict[str, Any]) -> serve_bench.ServeSettings:
    chosen = Sampler(options["steps"], options["guidance"], options["solver"])
    return serve_bench.ServeSettings(
        Mix(options["prompt_tokens"], options["new_tokens"], chosen),
        options["concurrency"],
        options["rate"],
        warmup=0.5 if quick else options["warmup"],
        duration=2.0 if quick else options["duration"],
        rounds=1 if quick else options["rounds"],
        timeout=options["timeout"],
        objective=serve_bench.Objective(options["slo_first"], options["slo_next"]),
        seed=_seed(options),
    )


def _check_target(target: str | None, start: str | None) -> None:
    if (target is None) == (start is None):
        raise UsageError("--target or --start: expected one of them")


def _seed(options: dict[str, Any]) -> int:
    return secrets.randbits(32) if options["seed"] is None else int(options["seed"])


def _systems(start: str, options: dict[str, Any]) -> tuple[SystemSettings, ...]:
    if options["model"] is None:
        raise UsageError("--model: needed with --start")
    arguments = options["up_option"]
    one = compute(*(options[name] for name in ("model", "dtype", "device", "threads")))
    apart = replace(one, threads=options["split_threads"])
    systems = {"up": SystemSettings(one, False, arguments), "split": SystemSettings(apart, True, arguments)}
    return tuple(systems.values()) if start == "both" else (systems[start],)


@bench.command()
@target_options
@click.option("--start", type=click.Choice(["up", "split"]), help="A system of our own instead, on --model.")
@click.option("--prefix-tokens", type=Numbers(), default="2048", show_default=True, help="Length of the beginning.")
@click.option("--pairs", type=POSITIVE, default=5, show_default=True)
@output_options
def prefix(
    target: str | None, key: str | None, start: str | None, prefix_tokens: tuple[int, ...], pairs: int,
    json_file: Path | None, plot_file: Path | None, quick: bool, **options: Any,
) -> None:  # fmt: skip
    """Time to first block of prompts whose beginning the system has not, and has, seen before."""

    async def measured(settings: prefix_bench.PrefixSettings) -> Report:
        if target is not None:
            return await prefix_bench.prefix(target, settings, say, key)
        async with running(_systems(str(start), options)[0]) as started:
            return await prefix_bench.prefix(started, settings, say)

    def work() -> None:
        _check_target(target, start)
        settings = prefix_bench.PrefixSettings(
            prefix_tokens, pairs=1 if quick else pairs, timeout=options["timeout"], seed=_seed(options)
        )
        publish(asyncio.run(measured(settings)), json_file, plot_file, "prefix_tokens", "pairs", prefix_bench.PANELS)

    run_or_explain(work)
