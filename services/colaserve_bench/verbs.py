"""What makes a function a verb of `colaserve bench`: options that several share, and what becomes of the results."""

import asyncio
import multiprocessing
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import click

from colaserve_bench.engines import Compute
from colaserve_bench.report import Report
from colaserve_client.cli.options import Listed
from colaserve_services.errors import UsageError
from colaserve_services.launch.options import run_or_explain
from colaserve_services.model.flow import SamplerSettings
from colaserve_services.model.loading import DTYPES

POSITIVE = click.IntRange(min=1)
FOLDER = click.Path(file_okay=False, path_type=Path)
_FILE = click.Path(dir_okay=False, path_type=Path)
T = TypeVar("T")
Option = Callable[[Any], Any]
Measure = Callable[..., Coroutine[Any, Any, Report]]


def benchmark(name: str, *options: Option, quick: Mapping[str, Any]) -> Callable[[Measure], click.Command]:
    """A verb of a function that measures: with its own options, --json and --quick, which replaces settings."""

    def make(measure: Measure) -> click.Command:
        @wraps(measure)
        def verb(json_file: Path | None, is_quick: bool, **settings: Any) -> None:
            def work() -> None:
                chosen = {**settings, **(quick if is_quick else {})}
                report = asyncio.run(measure(**chosen))
                click.echo(report.text())
                if json_file is not None:
                    chosen.pop("key", None)  # a secret
                    report.write_json(json_file, name, chosen)
                    click.echo(f"written: {json_file}")

            run_or_explain(work)

        outputs = (
            click.option("--json", "json_file", type=_FILE, help="Write everything as JSON."),
            click.option("--quick", "is_quick", is_flag=True, help="Only see that it works: short measurements."),
        )
        for option in reversed((*options, *outputs)):
            verb = option(verb)
        return click.command(name)(verb)

    return make


def numbers(name: str, default: str | None, about: str, kind: click.ParamType[Any] = POSITIVE) -> Option:
    """An option of numbers with commas: 1,4,16."""
    return click.option(name, default=default, show_default=True, help=about, type=Listed(kind))


DTYPE_OPTION = click.option("--dtype", type=click.Choice(list(DTYPES)), default="bfloat16", show_default=True)
DEVICE_OPTION = click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N.")
THREADS_OPTION = click.option("--threads", type=POSITIVE, help="CPU threads of one process [torch's choice].")
COMPUTE_OPTIONS = (
    click.option("--model", type=FOLDER, required=True, help="Checkpoint."),
    DTYPE_OPTION,
    DEVICE_OPTION,
    THREADS_OPTION,
)
SAMPLER_OPTIONS = (
    click.option("--steps", type=POSITIVE, default=16, show_default=True, help="Steps a block."),
    click.option("--guidance", type=float, default=7.0, show_default=True, help="Guidance scale."),
    click.option("--solver", type=click.Choice(["euler", "ab2", "heun"]), default="euler", show_default=True),
)


def rounds(default: int, name: str = "--rounds") -> Option:
    """How often everything is measured."""
    return click.option(name, type=POSITIVE, default=default, show_default=True)


def compute_of(options: Mapping[str, Any]) -> Compute:
    """Of COMPUTE_OPTIONS."""
    return Compute(options["model"], options["dtype"], options["device"], options["threads"])


def sampler_of(options: Mapping[str, Any]) -> SamplerSettings:
    """Of SAMPLER_OPTIONS."""
    return SamplerSettings(steps=options["steps"], guidance_scale=options["guidance"], solver=options["solver"])


def in_own_process(function: Callable[..., T], *arguments: Any) -> T:
    """What a function returns in a fresh process. Raises UsageError if that dies."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        try:
            return process.submit(function, *arguments).result()
        except BrokenProcessPool as error:
            raise UsageError("the process that measures died; what it said is above") from error


def say(line: str) -> None:
    """Progress, beside the results."""
    click.echo(line, err=True)
