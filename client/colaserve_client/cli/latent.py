"""The verbs of the latent space: encode, decode, logprobs, score, interpolate, reconstruct, plot, embed."""

import math
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import click
import numpy as np

from colaserve_client.blocking import Client
from colaserve_client.cli import options, output
from colaserve_client.cli.generate import read_prompt_file
from colaserve_client.errors import invalid
from colaserve_client.latents import Latents, load_latents, save_latents
from colaserve_client.pictures import Trajectory
from colaserve_client.settings import LogprobsDtype, NoiseSeed, Pooling, Sampling, Scoring
from colaserve_client.writing import write_file

option = options.option
_PICTURES = (".png", ".svg", ".pdf")


def _texts(values: dict[str, Any]) -> list[str]:
    found = [*values.pop("texts"), *map(read_prompt_file, values.pop("files"))]
    if not found:
        raise click.UsageError("give one or more texts, or --file")
    return found


_file = option("--file", "files", multiple=True, type=options.EXISTING_FILE, help="A text from a file; - is standard "
               "input.")  # fmt: skip
texts_options = options.grouped("texts", (click.argument("texts", nargs=-1), _file), _texts)


def _chosen(latents: dict[str, Latents], file: Path, name: str | None) -> dict[str, Latents]:
    """The sequences of a file, or the one of a name."""
    if name is not None and name not in latents:
        raise click.UsageError(f"{file} has no {name!r}; it has {', '.join(latents)}")
    return latents if name is None else {name: latents[name]}


@click.command(cls=options.SectionedCommand)
@texts_options
@option("--output", "output_file", type=options.FILE, help="Write the latents to a safetensors file.")
@option("--variance", is_flag=True, help="With --json: also the posterior's log variance.")
@options.json_option
@options.client_options
def encode(*, client: Client, texts: Sequence[str], output_file: Path | None, variance: bool, as_json: bool) -> None:
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
    rows = []
    for text, each in zip(texts, encodings, strict=True):
        shown = text if len(text) <= 50 else f"{text[:47]}..."
        rows.append(("x".join(map(str, each.latents.shape)), len(each.token_ids), each.latents.space, repr(shown)))
    output.answer_each(texts, encodings, as_json, ("LATENTS", "TOKENS", "SPACE", "TEXT"), rows, name="text")


@click.command(cls=options.SectionedCommand)
@click.argument("file", type=options.LATENTS_FILE)
@option("--name", help="Only the sequence of this name.  [default: all]")
@option("--token-count", type=int, help="Tokens to return.  [default: all up to the first end or pad token]")
@option("--top-logprobs", type=int, help="With --json: log-probabilities, and those of so many likely tokens.")
@options.sampling_options
@options.json_option
@options.client_options
def decode(
    *, client: Client, file: Path, name: str | None, token_count: int | None, top_logprobs: int | None,
    sampling: Sampling, as_json: bool,
) -> None:  # fmt: skip
    """Turn the latents in FILE (safetensors, as `colaserve encode --output` writes it) into text.

    \b
      colaserve encode "The capital of France is Paris." --output france.safetensors
      colaserve decode france.safetensors
    """
    latents = _chosen(load_latents(file), file, name)
    decoded = [
        client.decode_latents(each, sampling=sampling, top_logprobs=top_logprobs, token_count=token_count)
        for each in latents.values()
    ]
    found = [{"name": each, **output.plain(result)} for each, result in zip(latents, decoded, strict=True)]
    rows = [(each["name"], each["text"]) for each in found]
    output.answer(found, as_json, lambda: rows[0][1] if len(rows) == 1 else output.pairs(rows))


@click.command(cls=options.SectionedCommand)
@click.argument("start")
@click.argument("end")
@option("--points", type=int, default=5, show_default=True, help="Points, both ends included, 2 to 256.")
@option("--path", type=click.Choice(["slerp", "lerp"]), default="slerp", show_default=True,
        help="Along the great circle, or the straight line.")  # fmt: skip
@option("--latents", "as_latents", is_flag=True, help="START and END are safetensors files with one sequence each.")
@options.sampling_options
@options.json_option
@options.client_options
def interpolate(
    *, client: Client, start: str, end: str, points: int, path: Any, as_latents: bool, sampling: Sampling, as_json: bool
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
@option("--latents", "file", type=options.LATENTS_FILE, help="Latents (safetensors, one sequence) instead of TEXT.")
@option("--top-logprobs", type=int, default=0, help="With --json: those of so many likely tokens beside each.")
@option("--id", "logprob_ids", type=int, multiple=True, help="With --json: of this token at every position, too.")
@option("--all", "all_logprobs", is_flag=True, help="With --json: of every token of the vocabulary.")
@option("--dtype", "logprobs_dtype", type=click.Choice(["float32", "float16"]), help="Wire type of --id and --all.")
@options.json_option
@options.client_options
def logprobs(
    *, client: Client, text: str | None, file: Path | None, top_logprobs: int, logprob_ids: Sequence[int],
    all_logprobs: bool, logprobs_dtype: LogprobsDtype | None, as_json: bool,
) -> None:  # fmt: skip
    """Log-probability of each token of TEXT as the model reconstructs it, or of the likeliest tokens of latents.

    \b
      colaserve logprobs "The capital of France is Paris."
      colaserve logprobs --latents france.safetensors --id 17 --json
    """
    if (text is None) == (file is None):
        raise click.UsageError("give TEXT or --latents, one of them")
    if not as_json and (top_logprobs or logprob_ids or all_logprobs or logprobs_dtype):
        raise click.UsageError("--top-logprobs, --id, --all and --dtype are seen with --json only")
    found = client.logprobs(
        text,
        latents=None if file is None else Latents.load(file),
        top_logprobs=top_logprobs,
        logprob_ids=logprob_ids,
        all_logprobs=all_logprobs,
        logprobs_dtype=logprobs_dtype,
    )
    rows = [(each.token_id, f"{each.logprob:z.3f}", repr(each.text)) for each in found.logprobs]
    output.answer(found, as_json, lambda: output.table(("ID", "LOGPROB", "TOKEN"), rows))


@click.command(cls=options.SectionedCommand)
@click.argument("text")
@option("--prefix", default="", help="What comes before TEXT.")
@options.scoring_options
@options.seed_options
@options.json_option
@options.client_options
def score(*, client: Client, text: str, prefix: str, scoring: Scoring, seed: NoiseSeed | None, as_json: bool) -> None:
    """How likely the model finds TEXT: a lower bound of its log-likelihood, in nats.

    Likelihood and quality need not agree. Compare texts of as many tokens.

    \b
      colaserve score " Lima." --prefix "The capital of Peru is"
      colaserve score " Lima." --prefix "The capital of Peru is" --samples 2 --probes 4 --json
    """
    found = client.score(text, prefix, seed=seed, **vars(scoring))
    names = ("log_likelihood", "standard_error", "decoder_term", "posterior_entropy", "prior_log_density")
    rows = [(name.replace("_", " "), f"{getattr(found, name):z.3f}") for name in names]
    output.answer(found, as_json, lambda: output.pairs([*rows, ("tokens", len(found.token_ids))]))


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
    output.answer_each(texts, trips, as_json, ("TOKENS EQUAL", "BITS A TOKEN", "TEXT"), rows, name="original")


@click.command(cls=options.SectionedCommand)
@texts_options
@option("--pooling", type=click.Choice(["mean", "last_block", "per_block"]), default="mean", show_default=True,
        help="Mean of all latents, of those of the last block, or of each block.")  # fmt: skip
@option("--normalize", is_flag=True, help="Scale each vector to length 1.")
@options.json_option
@options.client_options
def embed(*, client: Client, texts: Sequence[str], pooling: Pooling, normalize: bool, as_json: bool) -> None:
    """Turn TEXTS into vectors: means of their latents.

    \b
      colaserve embed "The capital of France is Paris." "The capital of Japan is Tokyo."
      colaserve embed "one text" "another" --normalize --json
    """
    found = client.embed(texts, pooling=pooling, normalize=normalize)
    rows = []
    for text, each in zip(texts, found, strict=True):
        shape, begin = "x".join(map(str, each.values.shape)), " ".join(f"{one:.4g}" for one in each.values.flat[:4])
        rows.append((each.token_count, shape, begin, repr(text[:50])))
    output.answer_each(texts, found, as_json, ("TOKENS", "SHAPE", "BEGINS WITH", "TEXT"), rows, name="text")


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
    if output_file.suffix.lower() not in _PICTURES:
        raise click.UsageError(f"--output: got {output_file}, expected a name that ends with {', '.join(_PICTURES)}")
    if file.suffix in (".npz", ".npy"):
        try:
            with open(file, "rb") as opened:
                loaded: Any = np.load(opened, allow_pickle=False)
                arrays = dict(loaded) if hasattr(loaded, "files") else {"latents": loaded}
        except (ValueError, OSError, BadZipFile) as error:
            raise invalid("path", f"{file} has no arrays of numbers: {error}") from error
        latents = {each: Latents.of(array, each) for each, array in arrays.items()}
    else:
        latents = load_latents(file)
    found = _chosen(latents, file, name)
    content = BytesIO()
    _figure(found, as_map).savefig(content, format=output_file.suffix[1:].lower(), dpi=120)
    write_file(output_file, content.getvalue())


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
