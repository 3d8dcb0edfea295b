"""The verbs of likelihood: logprobs and score."""

from collections.abc import Sequence
from pathlib import Path

import click

from colaserve_client.blocking import Client
from colaserve_client.cli import options, output
from colaserve_client.latents import Latents
from colaserve_client.settings import LogprobsDtype, NoiseSeed, Scoring

option = options.option


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
    *,
    client: Client,
    text: str | None,
    file: Path | None,
    top_logprobs: int,
    logprob_ids: Sequence[int],
    all_logprobs: bool,
    logprobs_dtype: LogprobsDtype | None,
    as_json: bool,
) -> None:
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
