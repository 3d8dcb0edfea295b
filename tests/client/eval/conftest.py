"""A client that answers from a table, and a way to run the verbs against it."""

import asyncio
import json
from collections.abc import Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace

import click
import pytest
from click.testing import CliRunner

from colaserve_client.cli import exits
from colaserve_client.cli.options import Server
from colaserve_client.errors import ColaserveError, Details, Overloaded, Unavailable
from colaserve_client.reading import read_json_lines
from colaserve_client.results import Usage
from colaserve_client.settings import Sampler, Sampling
from colaserve_eval.commands import evaluate
from tests.client.cli.conftest import Ran


class FakeClient:
    """Answers a prompt by a function of (prompt, sampler); counts what it was asked and how much at once."""

    def __init__(self, answer: Callable[[str, Sampler], str] = lambda prompt, sampler: f" {prompt.upper()}\nmore"):
        self.answer, self.name, self.steps = answer, "tiny", 16
        self.asked: list[tuple[str, dict]] = []
        self.down_for: set[str] = set()
        self.overloaded_times = 0
        self.in_flight = self.most_in_flight = 0

    @property
    def prompts(self) -> list[str]:
        return [prompt for prompt, _ in self.asked]

    async def generate(self, prompt: str, **settings: object) -> SimpleNamespace:
        self.asked.append((prompt, settings))
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            await asyncio.sleep(0.001 * (len(self.asked) % 3))
            if self.overloaded_times:
                self.overloaded_times -= 1
                raise Overloaded("busy", Details(retry_after=0.01))
            if prompt in self.down_for:
                raise Unavailable("the prior is down")
            usage = Usage(prompt_tokens=3, completion_tokens=5, blocks=2, wasted_blocks=1)
            return SimpleNamespace(text=self.answer(prompt, settings["sampler"]), finish_reason="stop", usage=usage)
        finally:
            self.in_flight -= 1

    async def reconstruct(self, texts: Sequence[str]) -> list[SimpleNamespace]:
        """Tokens are characters; every "x" comes back as "y" and costs 2 bits, any other token costs half a bit."""
        self.asked.append(("", {"texts": len(texts)}))
        return [_round_trip(text) for text in texts]

    async def info(self, **options: object) -> SimpleNamespace:
        return SimpleNamespace(
            name=self.name,
            space="0123456789abcdef",
            stages=[SimpleNamespace(stage="prior", server=SimpleNamespace(dtype="float32"))],
            default_max_new_tokens=32,
            default_sampler=Sampler(steps=self.steps),
            default_sampling=Sampling(temperature=0.0),
        )


def _round_trip(text: str) -> SimpleNamespace:
    came = text.replace("x", "y")
    bits = sum(2.0 if letter == "x" else 0.5 for letter in text) / len(text)
    ids = tuple(map(ord, text))
    return SimpleNamespace(text=came, token_ids=tuple(map(ord, came)), original_ids=ids, bits_per_token=bits)


@pytest.fixture
def client() -> FakeClient:
    return FakeClient()


def run_eval(arguments: Sequence[object], connect: Callable[[Server], object] | None = None) -> Ran:
    """Runs `colaserve eval ...` as the command line does; `connect` gives another client than the real one."""
    result = CliRunner().invoke(evaluate, [str(argument) for argument in arguments], obj=connect, standalone_mode=False)
    error = result.exception
    if error is None:
        return Ran(0, result.stdout, result.stderr)
    if not isinstance(error, click.ClickException | ColaserveError | OSError):
        raise error
    return Ran(exits.code_of(error), result.stdout, result.stderr + exits.line_of(error) + "\n")


@pytest.fixture
def colaserve_eval(client: FakeClient) -> Callable[..., Ran]:
    """Runs `colaserve eval ...` against the fake client."""

    @asynccontextmanager
    async def connect(server: Server):
        yield client

    return lambda *arguments: run_eval(arguments, connect)


@pytest.fixture
def write_questions(tmp_path: Path) -> Callable[..., Path]:
    """Writes a file of questions whose right answer is the prompt; returns its path."""

    def write(*prompts: str, name: str = "task", **fields: object) -> Path:
        path = tmp_path / f"{name}.jsonl"
        lines = [{"id": at, "prompt": text, "ground_truth": text, **fields} for at, text in enumerate(prompts)]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return path

    return write


def read_lines(path: Path) -> list[dict]:
    """The objects of a jsonl file."""
    return [value for _, value in read_json_lines(path)]
