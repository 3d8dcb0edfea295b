"""The verbs of the latent space: encode, decode, interpolate, infill, reconstruct."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from colaserve_client.blocking import Client
from colaserve_client.cli import options, output
from colaserve_client.cli.generate import read_prompt_file
from colaserve_client.cli.plot import chosen
from colaserve_client.latents import Latents, load_latents, save_latents
from colaserve_client.reading import read_text
from colaserve_client.results import TextEncoding
from colaserve_client.settings import NoiseSeed, Sampler, Sampling

option = options.option
_HOLE = re.compile(r"\[\[(\d+)\]\]")


def _texts(values: dict[str, Any]) -> list[str]:
    found = [*values.pop("texts"), *map(read_prompt_file, values.pop("files"))]
    if not found:
        raise click.UsageError("give one or more texts, or --file")
    return found


_file = option("--file", "files", multiple=True, type=options.EXISTING_FILE, help="A text from a file; - is standard "
               "input.")  # fmt: skip
texts_options = options.grouped("texts", (click.argument("texts", nargs=-1), _file), _texts)


@click.command(cls=options.SectionedCommand)
@texts_options
@option("--output", "output_file", type=options.FILE, help="Write the latents to a safetensors file.")
@option("--variance", is_flag=True, help="With --json: also the posterior's log variance.")
@options.json_option
@options.client_options
def encode(
    *,
    client: Client,
    texts: Sequence[str],
    output_file: Path | None,
    variance: bool,
    as_json: bool,
) -> None:
    """Turn TEXTS into latents.

    \b
      colaserve encode "The capital of France is Paris." --output france.safetensors
      colaserve encode "one text" "another" --json
    """
    if variance and not as_json:
        raise click.UsageError("--variance is seen with --json only")
    encodings = client.encode_text(texts, with_variance=variance)
    if output_file:
        width = len(str(len(texts) - 1))
        save_latents(output_file, {f"{index:0{width}}": each.latents for index, each in enumerate(encodings)})
    output.answer(
        [{"text": text, **output.plain(each)} for text, each in zip(texts, encodings, strict=True)],
        as_json,
        lambda: output.table(("LATENTS", "TOKENS", "SPACE", "TEXT"), list(map(_row, texts, encodings))),
    )


def _row(text: str, encoding: TextEncoding) -> tuple[object, ...]:
    shown = text if len(text) <= 50 else f"{text[:47]}..."
    shape = "x".join(map(str, encoding.latents.shape))
    return shape, len(encoding.token_ids), encoding.latents.space, repr(shown)


@click.command(cls=options.SectionedCommand)
@click.argument("file", type=options.LATENTS_FILE)
@option("--name", help="Only the sequence of this name.  [default: all]")
@option("--token-count", type=int, help="Tokens to return.  [default: all up to the first end or pad token]")
@option("--top-logprobs", type=int, help="With --json: log-probabilities, and those of so many likely tokens.")
@options.sampling_options
@options.json_option
@options.client_options
def decode(
    *,
    client: Client,
    file: Path,
    name: str | None,
    token_count: int | None,
    top_logprobs: int | None,
    sampling: Sampling,
    as_json: bool,
) -> None:
    """Turn the latents in FILE (safetensors, as `colaserve encode --output` writes it) into text.

    \b
      colaserve encode "The capital of France is Paris." --output france.safetensors
      colaserve decode france.safetensors
    """
    latents = chosen(load_latents(file), file, name)
    decoded = {
        each: client.decode_latents(values, sampling=sampling, top_logprobs=top_logprobs, token_count=token_count)
        for each, values in latents.items()
    }
    rows = [(each, result.text) for each, result in decoded.items()]
    output.answer(
        [{"name": each, **output.plain(result)} for each, result in decoded.items()],
        as_json,
        lambda: rows[0][1] if len(rows) == 1 else output.pairs(rows),
    )


@click.command(cls=options.SectionedCommand)
@click.argument("start")
@click.argument("end")
@option("--points", type=int, default=5, show_default=True, help="Points, both ends included, 2 to 256.")
@option(
    "--path",
    type=click.Choice(["slerp", "lerp"]),
    default="slerp",
    show_default=True,
    help="Along the great circle, or the straight line.",
)
@option("--latents", "as_latents", is_flag=True, help="START and END are safetensors files with one sequence each.")
@options.sampling_options
@options.json_option
@options.client_options
def interpolate(
    *,
    client: Client,
    start: str,
    end: str,
    points: int,
    path: Any,
    as_latents: bool,
    sampling: Sampling,
    as_json: bool,
) -> None:
    """Walk from START to END through the latent space and decode the points of the way.

    \b
      colaserve interpolate "The capital of France is Paris." "The capital of Japan is Tokyo." --points 7
    """
    file = options.LATENTS_FILE
    ends = [Latents.load(file.convert(each, None, None)) if as_latents else each for each in (start, end)]
    walk = client.interpolate(ends[0], ends[1], points=points, interpolation=path, sampling=sampling)
    output.answer(walk, as_json, lambda: output.pairs([(f"{point.weight:.2f}", point.text) for point in walk]))


@click.command(cls=options.SectionedCommand)
@click.argument("text", required=False)
@option("--file", type=options.EXISTING_FILE, help="Read the text from a file; - is standard input.")
@options.sampler_options
@options.sampling_options
@options.seed_options
@options.json_option
@options.client_options
def infill(
    *,
    client: Client,
    text: str | None,
    file: Path | None,
    sampler: Sampler,
    sampling: Sampling,
    seed: NoiseSeed | None,
    as_json: bool,
) -> None:
    """Write the holes of TEXT: [[8]] is a hole of 8 tokens. The rest comes back byte for byte.

    A hole sees what is left of it and what is in its own block; --resamples lets it agree better with that.

    \b
      colaserve infill "France is a country in Europe. Its capital is[[1]]. Its currency is the Euro."
      colaserve infill --file letter.txt --resamples 4 --seed 7
    """
    if (text is None) == (file is None):
        raise click.UsageError("give TEXT or --file, one of them")
    segments = split_holes(text if file is None else read_text(file))  # type: ignore[arg-type]
    result = client.infill(segments, sampler=sampler, sampling=sampling, seed=seed)
    output.answer(result, as_json, lambda: result.text)


def split_holes(text: str) -> list[str | int]:
    """The segments of a text with holes."""
    parts = _HOLE.split(text)
    if len(parts) == 1:
        raise click.UsageError("the text has no hole; [[8]] is one of 8 tokens")
    segments: list[str | int] = [_hole_size(part) if index % 2 else part for index, part in enumerate(parts)]
    return [segment for segment in segments if segment != ""]


def _hole_size(digits: str) -> int:
    if len(digits) > 9:
        raise click.UsageError(f"a hole's size has {len(digits)} digits; [[8]] is a hole of 8 tokens")
    return int(digits)


@click.command(cls=options.SectionedCommand)
@texts_options
@options.json_option
@options.client_options
def reconstruct(*, client: Client, texts: Sequence[str], as_json: bool) -> None:
    """Send TEXTS through the latent space and back: how faithful it is.

    \b
      colaserve reconstruct "The capital of France is Paris."
    """
    trips = client.reconstruct(texts)
    rows = [(f"{trip.token_accuracy:.1%}", f"{trip.bits_per_token:.3f}", repr(trip.text)) for trip in trips]
    output.answer(
        [{"original": text, **output.plain(trip)} for text, trip in zip(texts, trips, strict=True)],
        as_json,
        lambda: output.table(("TOKENS EQUAL", "BITS A TOKEN", "TEXT"), rows),
    )
