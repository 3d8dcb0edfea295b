"""Many prompts out of a file: JSON lines in, JSON lines out, interrupted and resumed at will."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

import click

from colaserve_client.blocking import Client
from colaserve_client.cli import exits, output
from colaserve_client.errors import InvalidRequest, NotAuthenticated, Unavailable
from colaserve_client.fields import fields_of, flat_fields
from colaserve_client.reading import Unreadable, name_of, parse_json, read_json_lines, read_lines
from colaserve_client.settings import GenerationRequest, NoiseSeed, Sampler, Sampling
from colaserve_client.writing import named, write_file

ItemId = str | int
KNOWN = {"id", "prompt", *flat_fields(GenerationRequest, Sampler, Sampling, NoiseSeed)}


def run_batch(
    client: Client, input_file: Path, output_file: Path | None, defaults: GenerationRequest, *, concurrency: int,
    resume: bool,
) -> int:  # fmt: skip
    """Answer every line; return the exit code."""
    if output_file is not None and output_file.exists() and input_file.exists() and output_file.samefile(input_file):
        raise click.UsageError(f"--input and --output are both {output_file}: give the answers a file of their own")
    items = read_items(input_file, defaults)
    done = _answered(output_file, resume)
    if unknown := done - items.keys():
        raise click.UsageError(f"--output has answers to ids that --input lacks, such as {min(map(str, unknown))}")
    waiting = {name: request for name, request in items.items() if name not in done}
    # A bar on standard error; none when the answers themselves are on the terminal.
    hidden = sys.stderr is None or (output_file is None and sys.stdout.isatty())
    bar: Any = click.progressbar(
        length=len(items), label="prompts", file=sys.stderr, show_pos=True, show_eta=True, hidden=hidden
    )
    bar.update(len(done))
    with _opened(output_file) as out, bar:
        failed = _answer(client, waiting, concurrency, out, bar)
    if failed:
        click.echo(f"{failed} of {len(waiting)} failed and have an error instead; --resume tries them again.", err=True)
    return exits.ERROR if failed else exits.OK


def _answer(
    client: Client, waiting: Mapping[ItemId, GenerationRequest], concurrency: int, out: TextIO, bar: Any
) -> int:
    """Write a line an item as it is answered; return how many failed."""
    failed = 0
    with closing(client.generate_many(waiting.values(), concurrency=concurrency)) as outcomes:
        for name, outcome in zip(waiting, outcomes, strict=True):
            error, answer = outcome.error, output.plain(outcome.result)
            if isinstance(error, Unavailable | NotAuthenticated):  # every other line would fail as well
                raise error
            if error is not None:
                field = {"field": error.field} if isinstance(error, InvalidRequest) and error.field else {}
                answer = {"error": {"type": type(error).__name__, "message": str(error), **field}}
            output.print_json({"id": name, "prompt": outcome.request.prompt, **answer}, out)
            failed += error is not None
            bar.update(1)
    return failed


# Input


def read_items(path: Path, defaults: GenerationRequest) -> dict[ItemId, GenerationRequest]:
    """All lines; a wrong one is refused before anything is sent. A line without an id goes by its number, from 1."""
    items: dict[ItemId, GenerationRequest] = {}
    for number, line in read_json_lines(path):
        try:
            name, request = _item(line, number, defaults)
            if name in items:
                raise click.UsageError(f"the id {name!r} appears twice")
        except click.UsageError as error:
            raise click.UsageError(f"{name_of(path)}:{number}: {error.message}") from error
        items[name] = request
    return items


def _item(fields: Mapping[str, Any], number: int, defaults: GenerationRequest) -> tuple[ItemId, GenerationRequest]:
    """The id of a line, and the options' request with what the line says otherwise."""
    line = {name: value for name, value in fields.items() if value is not None}  # null: as if it were not there
    prompt, name = line.get("prompt"), line.get("id", number)
    if not isinstance(prompt, str | list):
        raise click.UsageError('expected an object with a "prompt", a text or a list of token ids')
    if isinstance(prompt, list) and not all(type(each) is int for each in prompt):
        raise click.UsageError("prompt: expected a text or a list of token ids, whole numbers")
    if unknown := sorted(fields.keys() - KNOWN):
        raise click.UsageError(f"unknown field {unknown[0]!r}; known are {', '.join(sorted(KNOWN))}")
    if type(name) not in (str, int):
        raise click.UsageError(f"id: expected a text or a whole number, got {name!r}")
    seed = chosen(line, NoiseSeed)
    if seed.keys() == {"sample_id"} and defaults.seed is None:
        raise click.UsageError("sample_id tells samples of one seed apart: give both")
    known = defaults.seed if isinstance(defaults.seed, NoiseSeed) else NoiseSeed(0)
    own = {**chosen(line, GenerationRequest), "seed": replace(known, **seed) if seed else defaults.seed}
    sampler = replace(defaults.sampler or Sampler(), **chosen(line, Sampler))
    sampling = replace(defaults.sampling or Sampling(), **chosen(line, Sampling))
    return name, replace(defaults, prompt=prompt, sampler=sampler, sampling=sampling, **own)


def chosen(line: Mapping[str, Any], kind: type) -> dict[str, Any]:
    """What the line says of the fields of a dataclass."""
    return {name: line[field.flat] for name, field in fields_of(kind).items() if field.flat in line}


# Output


def _answered(path: Path | None, resume: bool) -> set[ItemId]:
    """The ids that have an answer. What has none (errors, a line that was cut off) is dropped from the file."""
    if path is None:
        if resume:
            raise click.UsageError("--resume continues a file: give --output")
        return set()
    if not path.exists() or path.stat().st_size == 0:
        return set()
    if not resume:
        raise click.UsageError(f"{path} exists already: --resume continues it, or remove it")
    done, kept = set[ItemId](), []
    for number, text in read_lines(path, whole=True):
        try:
            line = parse_json(text, str(path), number)
            name = line["id"]
            if type(name) not in (str, int):
                raise TypeError(f"no id: {name!r}")
        except (Unreadable, TypeError, KeyError) as error:
            raise click.UsageError(f"{path}:{number}: no answer of a batch; is --output the right file?") from error
        if "error" not in line:
            done.add(name)
            kept.append(f"{text}\n")
    write_file(path, "".join(kept))
    return done


@contextmanager
def _opened(path: Path | None) -> Iterator[TextIO]:
    if path is None:
        yield output.standard_output()
        return
    with named(path), path.open("a", encoding="utf-8", newline="\n") as file:
        yield file
