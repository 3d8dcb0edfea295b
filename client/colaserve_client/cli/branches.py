"""The verbs `fork` and `embed`: several texts of one prefix, and vectors that stand for texts."""

from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path

import click

from colaserve_client.blocking import Client
from colaserve_client.cli import options, output
from colaserve_client.cli.generate import read_prompt
from colaserve_client.cli.latent import texts_options
from colaserve_client.latents import Latents
from colaserve_client.settings import ForkFields, GenerationRequest, Pooling

option = options.option
_BESIDE = {each.name for each in fields(GenerationRequest)} - ForkFields.__annotations__.keys() | {"preview_every"}


@click.command(cls=options.SectionedCommand)
@click.argument("prompt", required=False)
@option("--file", type=options.EXISTING_FILE, help="Read the prompt from a file; - is standard input.")
@option("--latents", "prefix", type=options.LATENTS_FILE, help="Continue the one sequence of this safetensors file.")
@option("--branches", type=click.IntRange(1, 128), default=4, show_default=True, help="How many texts.")
@partial(options.request_options, without=_BESIDE)
@options.json_option
@options.client_options
def fork(
    *,
    client: Client,
    request: GenerationRequest,
    prompt: str | None,
    file: Path | None,
    prefix: Path | None,
    branches: int,
    as_json: bool,
) -> None:
    """Continue PROMPT in several ways at once; the servers compute it once. Branch i is sample i of the seed.

    \b
      colaserve fork "Germany is a country in" --branches 8 --seed 7
      colaserve fork --latents france.safetensors --json
    """
    if prefix is not None and (prompt is not None or file is not None):
        raise click.UsageError("give PROMPT, --file or --latents, one of them")
    if not as_json and (request.top_logprobs is not None or request.with_probes):
        raise click.UsageError("--top-logprobs and --probes are seen with --json only")
    shared = {name: value for name, value in vars(request).items() if name not in _BESIDE}
    results = client.fork_all(read_prompt(prompt, file) if prefix is None else Latents.load(prefix), branches, **shared)
    rows = [(str(index), result.text) for index, result in enumerate(results)]
    output.answer(results, as_json, lambda: output.pairs(rows))


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
    rows = [
        (
            each.token_count,
            "x".join(map(str, each.values.shape)),
            " ".join(f"{one:.4g}" for one in each.values.flat[:4]),
            repr(text[:50]),
        )
        for text, each in zip(texts, found, strict=True)
    ]
    output.answer(
        [{"text": text, **output.plain(each)} for text, each in zip(texts, found, strict=True)],
        as_json,
        lambda: output.table(("TOKENS", "SHAPE", "BEGINS WITH", "TEXT"), rows),
    )
