"""Command-line options that several benchmarks share, and what becomes of their results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import click

from colaserve_bench.report import Column, Report, plot
from colaserve_bench.stages import DTYPES, ComputeSettings
from colaserve_client.cli.verbs import pip_line
from colaserve_services.model.flow import SamplerSettings

F = TypeVar("F", bound=Callable[..., Any])
POSITIVE = click.IntRange(min=1)
_FILE = click.Path(dir_okay=False, path_type=Path)


class Numbers(click.ParamType):
    """Numbers with commas: 1,4,16."""

    name = "list"

    def __init__(self, kind: type[int] | type[float] = int, least: float = 1):
        self._kind, self._least = kind, least

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """A tuple; already converted values stay."""
        if isinstance(value, tuple):
            return value
        try:
            numbers = tuple(self._kind(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"got {value!r}, expected numbers with commas such as 1,4,16", param, ctx)
        if min(numbers) < self._least:
            self.fail(f"got {value!r}, expected numbers of at least {self._least}", param, ctx)
        return numbers


def together(*options: Callable[[F], F]) -> Callable[[F], F]:
    """One decorator of several."""

    def add(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return add


def _drawable(_context: click.Context, _option: click.Parameter, path: Path | None) -> Path | None:
    """Before anything is measured."""
    if path is not None and find_spec("matplotlib") is None:
        raise click.UsageError(f"--plot: needs matplotlib: {pip_line('plot')}")
    return path


compute_options = together(
    click.option("--model", type=click.Path(file_okay=False, path_type=Path), required=True, help="Checkpoint."),
    click.option("--dtype", type=click.Choice(list(DTYPES)), default="bfloat16", show_default=True),
    click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N."),
    click.option("--threads", type=POSITIVE, help="CPU threads [torch's choice]."),
)
sampler_options = together(
    click.option("--steps", type=POSITIVE, default=16, show_default=True, help="Steps a block."),
    click.option("--guidance", type=float, default=7.0, show_default=True, help="Guidance scale."),
    click.option("--solver", type=click.Choice(["euler", "ab2", "heun"]), default="euler", show_default=True),
)
output_options = together(
    click.option("--json", "json_file", type=_FILE, help="Write everything as JSON."),
    click.option("--plot", "plot_file", type=_FILE, callback=_drawable, help="Draw a PNG; needs matplotlib."),
    click.option("--quick", is_flag=True, help="Only see that it works: few rounds, short measurements."),
)


def compute(model: Path, dtype: str, device: str, threads: int | None) -> ComputeSettings:
    """Of `compute_options`."""
    return ComputeSettings(model, dtype, device, threads)


def sampler(steps: int, guidance: float, solver: str) -> SamplerSettings:
    """Of `sampler_options`."""
    return SamplerSettings(steps=steps, guidance_scale=guidance, solver=solver)


def publish(
    report: Report, json_file: Path | None, plot_file: Path | None, x: str, series: str, panels: Sequence[Column]
) -> None:
    """Table on the screen, JSON and plot where asked for."""
    click.echo(report.table())
    if json_file is not None:
        report.write_json(json_file)
        click.echo(f"written: {json_file}")
    if plot_file is not None:
        plot(plot_file, report.rows, x, series, panels)
        click.echo(f"written: {plot_file}")


def say(line: str) -> None:
    """Progress, beside the results."""
    click.echo(line, err=True)
