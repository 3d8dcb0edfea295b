"""`colaserve chat`: a conversation, with the prompts that the gateway makes."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace

import click

from colaserve_client.blocking import Client
from colaserve_client.cli import options, output
from colaserve_client.errors import Cancelled, ColaserveError
from colaserve_client.reading import read_lines, standard_input
from colaserve_client.settings import GenerationRequest, NoiseSeed, Sampler, Sampling

Turn = tuple[str, str]  # who speaks, "System", "User" or "Assistant", and what
_HELP = "/reset forgets the conversation, /exit (or Ctrl-D) ends it, Ctrl-C stops an answer"
_NEXT_TURN = "\nUser:"  # the model, which knows no roles, would write the other side too


def chat_prompt(turns: Sequence[Turn], frame: str) -> str:
    """The first message alone: in the checkpoint's frame, where it has one. Later: a transcript up to "Assistant:"."""
    speaker, text = turns[0]
    if len(turns) == 1 and speaker == "User":
        return frame.replace("{prompt}", text) if frame else text
    lines = [f"{speaker}:{'' if text[:1].isspace() else ' '}{text}" for speaker, text in turns]
    return "\n".join([*lines, "Assistant:"])


@click.command(cls=options.SectionedCommand)
@options.option("--system", help="An instruction before the conversation.")
@options.option("--max-new-tokens", type=int, help="Tokens of an answer at most.  [default: the server's]")
@options.sampler_options
@options.sampling_options
@options.seed_options
@options.client_options
def chat(
    *, client: Client, system: str | None, max_new_tokens: int | None, sampler: Sampler, sampling: Sampling,
    seed: NoiseSeed | None,
) -> None:  # fmt: skip
    """Talk with the model.

    The first message is put into the checkpoint's chat frame, where it has one; a longer conversation becomes a
    transcript with the roles' names. The model has no other memory than that. An answer that fails, or Ctrl-C in it,
    ends a conversation whose messages come from a file or another program.

    \b
      colaserve chat
      colaserve chat --system "Answer in one word." --temperature 0.7
    """
    with suppress(ImportError):  # where Python was built with it: editing and history of the lines
        import readline  # noqa: F401
    model = client.info()
    settings = GenerationRequest("", max_new_tokens, sampler, sampling, seed, stop=[_NEXT_TURN])
    before = [("System", system)] if system else []
    turns = list(before)
    if model.description:
        click.echo(f"{model.name}: {model.description}", err=True)
    click.echo(_HELP, err=True)
    for text in _messages():
        if text == "/reset":
            turns = list(before)
            continue
        prompt = chat_prompt([*turns, ("User", text)], model.chat_frame)
        answer = _answer(client, replace(settings, prompt=prompt))
        if answer is not None:
            turns += [("User", text), ("Assistant", answer)]


def _messages() -> Iterator[str]:
    """The user's messages, up to /exit or the end."""
    for line in _typed() if _interactive() else (line for _, line in read_lines("-")):
        text = line.strip()
        if text == "/exit":
            return
        if text.startswith("/") and text != "/reset":
            click.echo(_HELP, err=True)
        elif text:
            yield text


def _typed() -> Iterator[str]:
    while True:
        try:
            yield input("> ")
        except EOFError:
            output.echo()
            return
        except UnicodeDecodeError:
            click.echo("colaserve: that line is not UTF-8", err=True)


def _interactive() -> bool:
    """Whether someone types the messages, and not a file or a program whose next ones need all before."""
    return standard_input().isatty()


def _answer(client: Client, request: GenerationRequest) -> str | None:
    """Print an answer as it comes and return it; None when it was stopped, or failed while someone types."""
    text = ""
    try:
        with client.stream(**vars(request)) as stream:
            for chunk in stream:
                output.echo(chunk.text if text else chunk.text.lstrip(), end="")
                text += chunk.text
    except (KeyboardInterrupt, ColaserveError) as error:
        if not _interactive():
            raise
        if isinstance(error, KeyboardInterrupt | Cancelled):
            output.echo(" (stopped)")
        else:
            click.echo(f"colaserve: {options.by_option(error)}", err=True)
        return None
    output.echo()
    return text
