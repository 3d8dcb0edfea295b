"""A way to run the command line against the fake server."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import click
import pytest
from click.testing import CliRunner

from colaserve_client.cli import main as entry
from tests.client.fakes import FakeServer


@dataclass(frozen=True)
class Ran:
    """What a command line did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Ran]


@pytest.fixture
def run(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs `colaserve ARGUMENTS`, errors handled as in the real program."""
    monkeypatch.setenv("COLASERVE_TARGET", server.target)

    def ran(*arguments: str, stdin: str | bytes | None = None, env: dict[str, str] | None = None) -> Ran:
        codes: list[int] = []
        command = click.Command("test", callback=lambda: codes.append(entry.main(list(map(str, arguments)))))
        result = CliRunner().invoke(command, [], input=stdin, env=env)
        if result.exception is not None:
            raise result.exception
        return Ran(codes[0], result.stdout, result.stderr)

    return ran
