"""The verb plot: latents of a file as a picture. It needs no server."""

import math
from io import BytesIO
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import click
import numpy as np

from colaserve_client.cli import options
from colaserve_client.errors import invalid
from colaserve_client.latents import Latents, load_latents
from colaserve_client.pictures import Trajectory
from colaserve_client.writing import write_file

option = options.option
_KINDS = (".png", ".svg", ".pdf")


@click.command(cls=options.SectionedCommand)
@click.argument("file", type=options.LATENTS_FILE)
@option("-o", "--output", "output_file", type=options.FILE, required=True, help="The picture: .png, .svg or .pdf.")
@option("--name", help="Only the sequence of this name.  [default: all]")
@option("--map", "as_map", is_flag=True, help="A point for each sequence, in the plane where they differ most.")
def plot(*, file: Path, output_file: Path, name: str | None, as_map: bool) -> None:
    """Draw the latents in FILE: safetensors, as `colaserve encode --output` writes it, .npz or .npy with arrays (n, d).

    Each sequence is a heat map, positions from left to right and channels from top to bottom.

    \b
      colaserve encode "The capital of France is Paris." --output france.safetensors
      colaserve plot france.safetensors -o france.png
    """
    if output_file.suffix.lower() not in _KINDS:
        raise click.UsageError(f"--output: got {output_file}, expected a name that ends with {', '.join(_KINDS)}")
    found = chosen(_load(file), file, name)
    content = BytesIO()
    _figure(found, as_map).savefig(content, format=output_file.suffix[1:].lower(), dpi=120)
    write_file(output_file, content.getvalue())


def chosen(latents: dict[str, Latents], file: Path, name: str | None) -> dict[str, Latents]:
    """The sequences of a file, or the one of a name."""
    if name is not None and name not in latents:
        raise click.UsageError(f"{file} has no {name!r}; it has {', '.join(latents)}")
    return latents if name is None else {name: latents[name]}


def _load(file: Path) -> dict[str, Latents]:
    if file.suffix not in (".npz", ".npy"):
        return load_latents(file)
    try:
        with open(file, "rb") as opened:
            loaded: Any = np.load(opened, allow_pickle=False)
            arrays = dict(loaded) if hasattr(loaded, "files") else {"latents": loaded}
    except (ValueError, OSError, BadZipFile) as error:
        raise invalid("path", f"{file} has no arrays of numbers: {error}") from error
    return {name: Latents.of(array, name) for name, array in arrays.items()}


def _figure(latents: dict[str, Latents], as_map: bool) -> Any:
    from matplotlib.figure import Figure

    if not latents:
        raise click.UsageError("the file holds no latents")
    if as_map:
        figure = Figure((7, 5), layout="constrained")
        Trajectory(latents.values(), latents).plot(figure.subplots(), path=False)
        return figure
    columns = math.ceil(math.sqrt(len(latents)))
    rows = math.ceil(len(latents) / columns)
    figure = Figure((5 * columns, 3.5 * rows), layout="constrained")
    places = figure.subplots(rows, columns, squeeze=False).ravel()
    for place, (name, each) in zip(places, latents.items(), strict=False):
        each.plot(place).set_title(name, parse_math=False)
    for place in places[len(latents) :]:
        place.remove()
    return figure
