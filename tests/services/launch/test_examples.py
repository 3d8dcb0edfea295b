"""Every example of the README, of docs/cli.md and of the help runs as it is written, on the bundled checkpoint."""

import io
import re
import shlex
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import click
import psutil
import pytest

from colaserve_client.cli import verbs
from colaserve_client.cli.main import cli, main
from tests.client.cli.test_program import CLIENT_VERBS

ROOT = Path(__file__).parents[3]
# What an answer must hold where the example names it: the checkpoint knows these.
KNOWN = {
    'capital of France is"': "Paris",
    "capital of Japan?": "Tokyo",
    "capital of France?": "Paris",
    "[[1]]": "Paris",
}
ELSEWHERE = ("prior-0:50051", "colaserve chat", "jq ", "completion")  # other hosts, a keyboard, another program

pytestmark = pytest.mark.slow


def helped(name):
    command = verbs.VERBS[name].load(name)
    return click.Context(command, info_name=name).command.help or ""


def examples(text):
    """The lines that call a verb of the client."""
    lines = [line.strip() for line in text.splitlines()]
    called = re.compile(rf"(echo .*\| )?colaserve ({'|'.join(CLIENT_VERBS)})\b")
    return [line for line in lines if called.match(line) and not any(part in line for part in ELSEWHERE)]


def sources():
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    yield from (line for block in blocks for line in examples(block))
    yield from examples(cli.help)
    for name in CLIENT_VERBS:
        yield from examples(helped(name))


def free_ports(count):
    with ExitStack() as stack:
        taken = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [listener.getsockname()[1] for listener in taken]


def test_the_readme_and_every_example_run_when_pasted(tmp_path, capsys, monkeypatch):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "The capital of France is"}\n')
    (tmp_path / "letter.txt").write_text("France is a country in Europe. Its capital is[[1]].")
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "bin").symlink_to(Path(sys.executable).parent)
    grpc, http = free_ports(2)
    ports = {"COLASERVE_GRPC_PORT": grpc, "COLASERVE_HTTP_PORT": http, "COLASERVE_METRICS_PORT": 0,
             "COLASERVE_TARGET": f"127.0.0.1:{grpc}", "COLASERVE_DRAIN_SECONDS": 0}  # fmt: skip
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"## Use it\n.*?```sh\n(.*?)```", readme, re.DOTALL)
    script = f"{block}\necho; echo PID $!".replace("localhost:8000", f"localhost:{http}")
    for name, value in {**ports, "OMP_NUM_THREADS": 1}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.chdir(tmp_path)
    with (tmp_path / "out.txt").open("w+") as output:
        done = subprocess.run(["bash", "-e", "-c", script], stdout=output, stderr=output, timeout=100)
    said = (tmp_path / "out.txt").read_text()
    server = psutil.Process(int(re.findall(r"^PID (\d+)$", said, re.MULTILINE)[0]))
    try:
        assert done.returncode == 0, said
        for known in ("It has memorised facts", "Tokyo", "capital is Paris. Its currency", '"text":" Paris"'):
            assert known in said
        run_examples(capsys, monkeypatch)
    finally:
        server.terminate()
        server.wait(30)


def run_examples(capsys, monkeypatch):
    lines = list(dict.fromkeys(sources()))
    assert len(lines) > 15
    for line in lines:
        capsys.readouterr()
        if "--output texts" in line and "--resume" not in line:
            Path("texts.jsonl").unlink(missing_ok=True)
        for command in line.split(" && "):
            piped = re.match(r"echo \"(.*)\" \| ", command)
            if piped:
                monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(f"{piped[1]}\n".encode())))
            words = shlex.split(command[piped.end() if piped else 0 :], comments=True)
            code, shown = main(words[1:]), capsys.readouterr()
            assert code == 0, f"{line}: {shown.err}"
        for asked, known in KNOWN.items():
            assert asked not in line or known in shown.out, f"{line}: {shown.out}"
