"""What a process says beside its log: where it serves, and why it ends. A full disk behind it stops nothing."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

import click

from colaserve_services.rpc.logs import JsonFormatter


def announce(role: str, as_json: bool, text: str, description: str, **fields: Any) -> None:
    """Print to standard output: the text and what the model can do, or one JSON object with the text's first line."""
    if as_json:
        said = {"description": description} if description else {}
        _print(sys.stdout, _json(role, logging.INFO, text.splitlines()[0], fields={**fields, **said}))
    else:
        _print(sys.stdout, "\n".join(filter(None, (text, description))))


@contextmanager
def errors_as_json(role: str) -> Iterator[None]:
    """An error that ends the command is one JSON object on standard error, with the exit code that it has."""
    try:
        yield
    except click.ClickException as error:
        _print(sys.stderr, _json(role, logging.ERROR, error.format_message()))
        raise SystemExit(error.exit_code) from error
    except Exception as error:
        _print(sys.stderr, _json(role, logging.CRITICAL, str(error), exc_info=sys.exc_info()))
        raise SystemExit(1) from error


def flush_or_drop() -> None:
    """Flush the standard streams. What a full disk does not take is dropped: else the exit code would be another."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            with suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _print(stream: TextIO, line: str) -> None:
    with suppress(OSError):
        stream.write(line + "\n")
        stream.flush()


def _json(role: str, level: int, message: str, fields: Any = None, exc_info: Any = None) -> str:
    record = logging.LogRecord("colaserve_services.launch", level, "", 0, message, None, exc_info)
    record.fields = fields
    return JsonFormatter(role).format(record)
