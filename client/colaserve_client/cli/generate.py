"""The verbs that write: generate (one prompt, streamed to the terminal, or many out of a file), infill, fork."""

import re
import time
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import click

from colaserve_client.blocking import Client
from colaserve_client.cli import exits, options, output
from colaserve_client.cli.batch import run_batch
from colaserve_client.latent_client import generation_result
from colaserve_client.latents import Latents
from colaserve_client.reading import read_text, standard_input
from colaserve_client.results import GenerationResult
from colaserve_client.settings import ForkFields, GenerationRequest, NoiseSeed, Sampler, Sampling

option = options.option
_BESIDE = {each.name for each in fields(GenerationRequest)} - ForkFields.__annotations__.keys() | {"preview_every"}


@click.command(cls=options.SectionedCommand)
@click.argument("prompt", required=False)
@option("--file", type=options.EXISTING_FILE, help="Read the prompt from a file; - is standard input.")
@option("--echo", is_flag=True, help="Print the prompt before the text.")
@option("--watch", is_flag=True, help="Show the block under way where it will stand, on a terminal.")
@option("--stats", is_flag=True, help="Print tokens, time and seed on standard error.")
@option("--input", "input_file", type=options.EXISTING_FILE, help="A batch: JSON lines with a prompt each.")
@option("--output", "output_file", type=options.FILE, help="Where a batch's answers go.  [default: standard output]")
@option("--resume", is_flag=True, help="Continue the batch of --output: only what has no answer yet.")
@option("--concurrency", type=click.IntRange(1), default=8, show_default=True, help="Prompts of a batch at a time.")
@options.request_options
@options.json_option
@options.client_options
def generate(
    *, client: Client, request: GenerationRequest, prompt: str | None, file: Path | None, echo: bool, watch: bool,
    stats: bool, input_file: Path | None, output_file: Path | None, resume: bool, concurrency: int, as_json: bool,
) -> int:  # fmt: skip
    """Continue PROMPT and print the text as it is written.

    The prompt is taken as it is, without a template. Without PROMPT it is read from --file or standard input, less
    one newline at the end.

    \b
      colaserve generate "The capital of France is"
      colaserve generate "Germany is a country in" --max-new-tokens 100 --temperature 0.8 --seed 7
      echo "The capital of France is" | colaserve generate --json
      colaserve generate "The capital of France is" --watch

    A batch has a JSON object on each line: a prompt (text, or a list of token ids) and, where it differs from the
    options, max_new_tokens, stop, seed, temperature and so on. Answers come in the same order, with the line's id
    (or its number). Answers are kept when the batch is interrupted; --resume continues it.

    \b
      colaserve generate --input prompts.jsonl --output texts.jsonl --max-new-tokens 64
      colaserve generate --input prompts.jsonl --output texts.jsonl --max-new-tokens 64 --resume
    """
    if input_file:
        if prompt is not None or file or echo or watch or stats:
            raise click.UsageError("--input is a batch: it goes without PROMPT, --file, --echo, --watch and --stats")
        return run_batch(client, input_file, output_file, request, concurrency=concurrency, resume=resume)
    if output_file or resume:
        raise click.UsageError("--output and --resume belong to a batch: give --input")
    if not as_json and (request.top_logprobs is not None or request.with_latents or request.with_probes):
        raise click.UsageError("--top-logprobs, --latents and --probes are seen with --json only")
    if request.preview_every and not (as_json or watch):
        raise click.UsageError("--preview-every: previews are seen with --json or --watch only")
    if watch and (as_json or not output.standard_output().isatty()):
        raise click.UsageError("--watch draws on a terminal: it goes without --json, and without a file or a pipe")
    request = replace(request, preview_every=request.preview_every or 1) if watch else request
    started = time.monotonic()
    request = replace(request, prompt=read_prompt(prompt, file))
    result = client.generate(**vars(request)) if as_json else _write(client, request, echo)
    if as_json:
        output.print_json({"prompt": request.prompt, **output.plain(result)})
    if stats:
        click.echo(output.summary(result, time.monotonic() - started), err=True)
    return exits.OK


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """The prompt of the argument, a file or standard input."""
    if prompt is not None and file is not None:
        raise click.UsageError("give PROMPT or --file, not both")
    if prompt is not None:
        return prompt
    if file is None and standard_input().isatty():
        raise click.UsageError("give PROMPT, --file or something on standard input")
    return read_prompt_file(file or Path("-"))


def read_prompt_file(file: Path) -> str:
    """A file's text, less one line end at the end; - is standard input."""
    text = read_text(file)
    return text.removesuffix("\r\n") if text.endswith("\r\n") else text.removesuffix("\n")


def _write(client: Client, request: GenerationRequest, echo: bool) -> GenerationResult:
    """Generate and print block by block."""
    chunks = []
    with client.stream(**vars(request)) as stream, output.Screen() as screen:
        if echo:
            screen.write(str(request.prompt))
        for chunk in stream:
            chunks.append(chunk)
            if chunk.preview:
                screen.show(chunk.preview.text)
            else:
                screen.write(chunk.text)
    output.echo()
    return generation_result(chunks, stream.request_id)


@click.command(cls=options.SectionedCommand)
@click.argument("text", required=False)
@option("--file", type=options.EXISTING_FILE, help="Read the text from a file; - is standard input.")
@options.sampler_options
@options.sampling_options
@options.seed_options
@options.json_option
@options.client_options
def infill(
    *, client: Client, text: str | None, file: Path | None, sampler: Sampler, sampling: Sampling,
    seed: NoiseSeed | None, as_json: bool,
) -> None:  # fmt: skip
    """Write the holes of TEXT: [[8]] is a hole of 8 tokens. The rest comes back byte for byte.

    A hole sees what is left of it and what is in its own block; --resamples lets it agree better with that.

    \b
      colaserve infill "France is a country in Europe. Its capital is[[1]]. Its currency is the Euro."
      colaserve infill --file letter.txt --resamples 4 --seed 7
    """
    if (text is None) == (file is None):
        raise click.UsageError("give TEXT or --file, one of them")
    parts = re.split(r"\[\[(\d+)\]\]", read_text(file) if file else text or "")  # every second one is a hole's size
    if len(parts) == 1:
        raise click.UsageError("the text has no hole; [[8]] is one of 8 tokens")
    if (digits := max(map(len, parts[1::2]))) > 9:
        raise click.UsageError(f"a hole's size has {digits} digits; [[8]] is a hole of 8 tokens")
    segments = [int(part) if index % 2 else part for index, part in enumerate(parts) if part]
    result = client.infill(segments, sampler=sampler, sampling=sampling, seed=seed)
    output.answer(result, as_json, lambda: result.text)


@click.command(cls=options.SectionedCommand)
@click.argument("prompt", required=False)
@option("--file", type=options.EXISTING_FILE, help="Read the prompt from a file; - is standard input.")
@option("--latents", "prefix", type=options.LATENTS_FILE, help="Continue the one sequence of this safetensors file.")
@option("--branches", type=click.IntRange(1, 128), default=4, show_default=True, help="How many texts.")
@partial(options.request_options, without=_BESIDE)
@options.json_option
@options.client_options
def fork(
    *, client: Client, request: GenerationRequest, prompt: str | None, file: Path | None, prefix: Path | None,
    branches: int, as_json: bool,
) -> None:  # fmt: skip
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
