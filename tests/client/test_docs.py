"""Every example in a docstring and in docs/client.md runs as it stands."""

import ast
import asyncio
import doctest
import importlib
import io
import pkgutil
import re
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest

import colaserve_client
from colaserve_client import Client, Latents
from colaserve_client.cli.batch import KNOWN
from tests.client.fakes import FakeServer

ROOT = Path(__file__).resolve().parents[2]
SKIPPED = ("colaserve_eval", "colaserve_client.cli", "colaserve_client.__main__")


def modules() -> list[Any]:
    found = pkgutil.walk_packages(colaserve_client.__path__, "colaserve_client.")
    names = [module.name for module in found if not module.name.startswith(SKIPPED)]
    return [colaserve_client, *(importlib.import_module(name) for name in names)]


def examples_of(module: Any) -> Iterator[doctest.DocTest]:
    return (test for test in doctest.DocTestFinder().find(module) if test.examples)


EXAMPLES = [test for module in modules() for test in examples_of(module)]
AWAITING = [test for test in EXAMPLES if ".Async" in test.name]
BLOCKING = [test for test in EXAMPLES if test not in AWAITING]


@pytest.mark.parametrize("test", BLOCKING, ids=lambda test: test.name)
def test_blocking_examples_do_what_they_show(test: doctest.DocTest, server: FakeServer, client: Client) -> None:
    test.globs = {**vars(colaserve_client), **test.globs, "target": server.target, "client": client}
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert runner.run(test).failed == 0


@pytest.mark.parametrize("test", AWAITING, ids=lambda test: test.name)
async def test_asyncio_examples_do_what_they_show(test: doctest.DocTest, server: FakeServer, async_client: Any) -> None:
    names = {**vars(colaserve_client), **test.globs, "target": server.target, "client": async_client}
    for example in test.examples:
        shown = await run_awaiting(example.source, names)
        assert doctest.OutputChecker().check_output(example.want, shown, 0), f"{example.source}gave {shown}"


async def run_awaiting(source: str, names: dict[str, Any]) -> str:
    """What a prompt that understands `await` would print."""
    code = compile(source, "<example>", "single", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    with redirect_stdout(io.StringIO()) as printed:
        result = eval(code, names)
        if asyncio.iscoroutine(result):
            await result
    return printed.getvalue()


def test_every_public_method_of_the_clients_is_shown() -> None:
    shown = {test.name.rpartition(".")[2] for test in BLOCKING if "blocking.Client." in test.name}
    inherited = {"healthy", "wait_until_ready", "close", "target"}
    assert shown == {name for name in dir(Client) if not name.startswith("_")} - inherited


def test_the_page_of_the_command_line_names_every_field_of_a_batch() -> None:
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    named = page.partition("overrides an option:")[2].partition(". Null")[0]
    assert set(re.findall(r"`(\w+)`", named)) == KNOWN - {"id", "prompt"}


def test_the_guide_does_what_it_shows(server: FakeServer, client: Client, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "client.md").read_text(encoding="utf-8").replace("```", "")
    names = {**vars(colaserve_client), "target": server.target, "client": client, "Latents": Latents}
    test = doctest.DocTestParser().get_doctest(text, names, "docs/client.md", None, 0)
    assert len(test.examples) > 10
    assert doctest.DocTestRunner(verbose=False).run(test, out=sys.stdout.write).failed == 0
