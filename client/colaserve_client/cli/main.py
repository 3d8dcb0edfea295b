"""The `colaserve` command: finds the verb, runs it, and turns whatever goes wrong into one line and an exit code."""

import io
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from difflib import get_close_matches
from typing import Any

import click

from colaserve_client.base import client_version
from colaserve_client.cli import exits
from colaserve_client.cli.output import printable
from colaserve_client.cli.verbs import VERBS, missing_extra

_NO_ARGUMENTS: Any = getattr(click.exceptions, "NoArgsIsHelpError", ())  # of click 8.2 and later


class LazyGroup(click.Group):
    """Lists all verbs without importing them; imports one when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        verb = VERBS.get(cmd_name)
        if verb is None:
            return None
        try:
            return verb.load(cmd_name)
        except ModuleNotFoundError as error:
            message = missing_extra(cmd_name, error)
            if message is None:
                raise

            def refuse(arguments: Sequence[str]) -> None:
                raise click.ClickException(message)

            anything = click.Argument(["arguments"], nargs=-1, type=click.UNPROCESSED)
            settings = {"ignore_unknown_options": True, "allow_extra_args": True}
            text = f"{verb.help}\n\nNot installed: {message}."
            return click.Command(cmd_name, settings, refuse, [anything], help=text)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            near = get_close_matches(args[0], VERBS, 1)
            if not near:
                raise
            raise click.UsageError(f"{error.message} Did you mean {near[0]!r}?", ctx) from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for section in dict.fromkeys(verb.section for verb in VERBS.values()):
            with formatter.section(section):
                rows = [(name, verb.help) for name, verb in VERBS.items() if verb.section == section]
                formatter.write_dl(rows)


_EXAMPLES = """Continuous latent diffusion language models, served and used.

\b
  colaserve up &                              # serve the bundled checkpoint
  colaserve status --wait 60                  # until it is ready
  colaserve generate "The capital of France is"
  colaserve infill "France is a country in Europe. Its capital is[[1]]."
  colaserve generate --input prompts.jsonl --output texts.jsonl --resume

Verbs that use a server find it by --target or COLASERVE_TARGET (127.0.0.1:50051).
"""
_EPILOG = "\b\nExit codes:\n" + "\n".join(f"{code:5}  {meaning}" for code, meaning in exits.MEANINGS.items())

cli = LazyGroup(
    "colaserve",
    help=_EXAMPLES,
    epilog=_EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
click.version_option(client_version(), prog_name="colaserve")(cli)
click.option(
    "--debug", is_flag=True, envvar="COLASERVE_DEBUG", show_envvar=True, expose_value=False,
    help="Show where in the code an error came from.",
)(cli)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    _prepare_streams()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        result = cli.main(arguments, prog_name="colaserve", standalone_mode=False)
        return result if isinstance(result, int) else exits.OK  # a verb may return its exit code
    except Exception as error:
        return _explain(error, arguments)


def _prepare_streams() -> None:
    """No connection gets the number of a closed stream, and what an encoding lacks is written as an escape."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _explain(error: Exception, arguments: Sequence[str]) -> int:
    debug = "--debug" in arguments
    with suppress(click.BadParameter):  # which was the error
        debug = debug or click.BOOL.convert(os.environ.get("COLASERVE_DEBUG") or "0", None, None)
    if debug:
        raise error
    if isinstance(error, ModuleNotFoundError):
        verb = next((argument for argument in arguments if argument in VERBS), "")
        error = click.ClickException(missing_extra(verb, error) or str(error))
    if isinstance(error, _NO_ARGUMENTS):
        click.echo(error.format_message(), err=True)
    elif line := exits.line_of(error):
        click.echo(f"colaserve: {printable(' '.join(line.split()))}", err=True)
    return exits.code_of(error)
