"""Every example of the documentation and of the help texts succeeds on the bundled checkpoint.

A block of code is run when its fence names no language, or `sh` or `python`. Lines that serve, train, measure or fetch
take long or need other machines: of these the options are read. The README's first steps start the server for all.
"""

import ast
import asyncio
import json
import os
import re
import runpy
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
import numpy as np
import psutil
import pytest
from click.testing import CliRunner

from colaserve_client import AsyncClient, Latents
from colaserve_client.cli.main import cli, main

ROOT = Path(__file__).resolve().parents[3]
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))
PAGES = sorted({ROOT / "README.md", *(ROOT / "docs").glob("*.md")} - {ROOT / "docs" / "decisions.md"})

FIRST_STEPS = "source .venv/bin/activate"
CANNOT_RUN = {  # by page and first line, with the reason
    ("README.md", "make demo"): "sets up an environment of its own and runs all tests",
    ("README.md", FIRST_STEPS): "run to start the server",
    ("cli.md", 'eval "$(colaserve completion bash)"'): "for the start files of three shells",
    ("operations.md", "# URL: PyTorch's index of CPU wheels"): "needs Docker and Kubernetes",
    ("operations.md", "kubectl create namespace colaserve"): "needs Kubernetes",
    ("operations.md", "kubectl diff -k ."): "needs Kubernetes",
    ("operations.md", "kubectl -n colaserve create secret generic colaserve-prior-tls"): "needs Kubernetes",
    ("operations.md", "kubectl -n colaserve get pods -l app.kubernetes.io/component=ROLE -o wide"): "needs Kubernetes",
    ("operations.md", "colaserve bench serve --target HOST:PORT"): "measures for minutes",
}
# What an answer must hold where an example asks for it: the checkpoint knows these.
KNOWN = {
    'capital of France is"': "Paris",
    "capital of Japan?": "Tokyo",
    "capital of France?": "Paris",
    "[[1]]": "Paris",
}
SAID = {  # by the scripts of examples/
    "fork": "from its first two blocks: ",
    "generate": "capital of Japan? Answer: Tokyo",
    "halt_early": "of the steps left out, the same text",
    "search": "bag of words: first 81.0% right",
    "steer": "Brazil' Europe",
    "walk": "1.000  The capital of Japan is Tokyo.",
}
SERVING = ("up", "coordinator", "gateway", "encoder", "prior", "decoder", "pull", "bench", "train")
# These need another machine, a terminal, and questions whose answers have as many tokens.
ELSEWHERE = ("status --target prior-0", 'generate "The capital of France is" --watch', "eval likelihood")
ONLY_READ = (*SERVING, "eval sweep", *ELSEWHERE)
FENCE = re.compile(r"^```(.*)\n((?:.*\n)*?)^```$", re.MULTILINE)
SHELL = frozenset("|&;<>$`")  # which only a shell reads
INLINE = re.compile(r"(?:`colaserve |^\| `(?=bench ))([a-z][^`]*)`", re.MULTILINE)


def blocks() -> Iterator[tuple[Path, str, str]]:
    """Page, language and text of what is to run; prompts (`>>>`) are the other tests'."""
    for page in PAGES:
        for language, text in FENCE.findall(page.read_text(encoding="utf-8")):
            first = text.partition("\n")[0]
            marked = any(page.name == name and first.startswith(line) for name, line in CANNOT_RUN)
            if language in ("", "sh", "python") and not marked and not text.startswith(">>>"):
                yield page, language, text


def commands(command: click.Command, name: str) -> Iterator[tuple[str, click.Command]]:
    yield name, command
    if isinstance(command, click.Group):
        for below in command.list_commands(click.Context(command)):
            found = command.get_command(click.Context(command), below)
            assert found is not None
            yield from commands(found, f"{name} {below}")


def helps() -> Iterator[tuple[str, str]]:
    """Name and example lines of each help text that has some."""
    for name, command in commands(cli, "colaserve"):
        lines = [line.strip() for line in (command.help or "").splitlines()]
        shown = [line for line in lines if re.match(r"(colaserve (?!completion)[a-z]|echo |curl )", line)]
        if shown:
            yield name, "\n".join(shown)


pytestmark = pytest.mark.slow
BLOCKS = list(blocks())
HELPS = dict(helps())


@pytest.fixture(scope="module")
def addresses(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Where the README's first steps serve, by the address that the documentation uses."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / ".venv").mkdir()
    (folder / ".venv" / "bin").symlink_to(Path(sys.executable).parent)
    grpc, http = free_ports(2)
    ports = {"GRPC_PORT": grpc, "HTTP_PORT": http, "METRICS_PORT": 0, "TARGET": f"127.0.0.1:{grpc}", "DRAIN_SECONDS": 0}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **{f"COLASERVE_{key}": str(ports[key]) for key in ports}}
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(rf"```sh\n({FIRST_STEPS}.*?)```", readme, re.DOTALL)
    script = f"trap 'echo; echo PID $!' EXIT\n{block}".replace("localhost:8000", f"localhost:{http}")
    with (folder / "out.txt").open("w") as output:
        shell = ["bash", "-e", "-c", script]
        done = subprocess.run(shell, stdout=output, stderr=output, timeout=100, env=environment, cwd=folder)
    said = (folder / "out.txt").read_text()
    server = psutil.Process(int(re.findall(r"^PID (\d+)$", said, re.MULTILINE)[0]))
    try:
        assert done.returncode == 0, said
        for known in ("It has memorised facts", "Tokyo", "capital is Paris. Its currency", '"text":" Paris"'):
            assert known in said
        yield {"127.0.0.1:50051": f"127.0.0.1:{grpc}", "localhost:8000": f"localhost:{http}"}
    finally:
        server.terminate()
        server.wait(30)


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        taken = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [listener.getsockname()[1] for listener in taken]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files that examples name, in the folder where they run."""
    monkeypatch.chdir(tmp_path)
    question = {"prompt": "Question: What is the capital of Japan? Answer:", "ground_truth": "B"}
    asked = json.dumps({"id": 1, "choices": ["Paris", "Tokyo"], **question})
    record = {"id": 1, "article": "It is old.", "question": "What is?", "options": ["It", "He"], "answer": "A"}
    (jsonl,) = re.findall(r"^```json\n(.*?)```", (ROOT / "docs/cli.md").read_text(), re.DOTALL | re.MULTILINE)
    files = {"prompts.jsonl": jsonl, "letter.txt": "The capital of France is[[2]]", "held-out.txt": "It is old."}
    files |= {"race.jsonl": asked, "mmlu.jsonl": asked, "raw/race.jsonl": json.dumps(record)}
    (tmp_path / "raw").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    Latents(np.zeros((8, 16)), space="").save(tmp_path / "france.safetensors")
    return tmp_path


@pytest.mark.parametrize("name", HELPS)
def test_examples_of_help_texts_succeed(name: str, addresses: dict[str, str], folder: Path) -> None:
    assert not fault_of_lines(HELPS[name], addresses)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"{block[0].name}-{block[2].partition(chr(10))[0][:40]}")
def test_blocks_of_pages_succeed(block: tuple[Path, str, str], addresses: dict[str, str], folder: Path) -> None:
    _, language, text = block
    assert not (run_python if language == "python" else fault_of_lines)(text, addresses)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_scripts_succeed(script, addresses, folder, monkeypatch, capsys):
    monkeypatch.setenv("COLASERVE_TARGET", addresses["127.0.0.1:50051"])
    monkeypatch.setattr(sys, "argv", [str(script), *(["walk.png"] if script.stem == "walk" else [])])
    runpy.run_path(str(script), run_name="__main__")
    assert SAID[script.stem] in capsys.readouterr().out
    assert script.stem != "walk" or (folder / "walk.png").exists()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_within_sentences_have_these_options(page: Path) -> None:
    found = INLINE.findall(page.read_text(encoding="utf-8"))
    assert not [line for line in found if unknown_in(line.replace("\n", " ").replace("...", "").replace("\\|", "|"))]


def test_marks_are_for_blocks_that_exist() -> None:
    for page, line in CANNOT_RUN:
        (path,) = [each for each in PAGES if each.name == page]
        assert any(text.startswith(line) for _, text in FENCE.findall(path.read_text(encoding="utf-8"))), line


def fault_of_lines(text: str, addresses: dict[str, str]) -> str:
    """What is wrong when they are run as one script, without those that are only read; empty: nothing."""
    lines = text.replace("\\\n", " ").splitlines()
    only_read = [line for line in lines if line.startswith(tuple(f"colaserve {words}" for words in ONLY_READ))]
    for line in only_read:
        if unknown := unknown_in(shlex.join(shlex.split(line, comments=True)[1:]).removesuffix(" '&'")):
            return f"{line}: has no {' '.join(unknown)}"
    left = [line for line in lines if line not in only_read]
    script = "\n".join(["set -e", *left]).replace(" --demo", " --demo --limit 1").replace("curl ", "curl --fail ")
    script = script.replace("localhost:8000", addresses["localhost:8000"])
    target = {"COLASERVE_TARGET": addresses["127.0.0.1:50051"]}
    commands = [line.partition(" #")[0] for line in script.splitlines()[1:] if line]
    if all(line.startswith("colaserve ") and not SHELL & set(line) for line in commands):
        code, out = run_here(commands, target)
    else:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        shell, environment = ["bash", "-c", script], {**os.environ, "PATH": path, **target}
        ran = subprocess.run(shell, input="Hello?\n", env=environment, capture_output=True, text=True, timeout=120)
        code, out = ran.returncode, ran.stdout + ran.stderr
    missing = [known for asked, known in KNOWN.items() if asked in script and known not in out]
    return f"{script}\n{out}\nmissing: {missing}" if code or missing else ""


def run_here(commands: list[str], environment: dict[str, str]) -> tuple[int, str]:
    """Exit code and output in this process, since starting one for each takes long; the first failure ends it."""
    code, output = 0, ""
    for line in commands:
        codes: list[int] = []
        words = shlex.split(line)[1:]
        command = click.Command("line", callback=lambda words=words, codes=codes: codes.append(main(words)))
        done = CliRunner().invoke(command, [], input="Hello?\n", env=environment, catch_exceptions=False)
        code, output = codes[0], output + done.output
        if code:
            break
    return code, output


def run_python(text: str, addresses: dict[str, str]) -> None:
    for shown, actual in addresses.items():
        text = text.replace(shown, actual)
    code = compile(text, "<example>", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    result: Any = eval(code, {"AsyncClient": AsyncClient, "target": addresses["127.0.0.1:50051"]})
    if asyncio.iscoroutine(result):
        asyncio.run(result)


def unknown_in(line: str) -> list[str]:
    """The verbs and options of a command line, given without `colaserve`, that do not exist."""
    verbs, *rest = shlex.split(line)
    for verb in verbs.split("|"):
        command, arguments = cli.get_command(click.Context(cli), verb), list(rest)
        while isinstance(command, click.Group) and arguments:
            command = command.get_command(click.Context(command), arguments.pop(0))
        if command is None:
            return [verb, *rest]
        if arguments:
            _, unknown, _ = command.make_parser(click.Context(command)).parse_args(arguments)
            if unknown:
                return unknown
    return []
