"""The program as a whole: help, exit codes, lazy verbs, missing extras, true processes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import click
import grpc
import pytest

from colaserve_client.cli import exits, verbs
from colaserve_client.cli.main import cli, main
from tests.client.behaviour import Behaviour, Failure
from tests.client.cli.conftest import Run
from tests.client.fakes import STORY, FakeServer
from tests.waiting import wait_until as eventually

CODES = {
    grpc.StatusCode.INVALID_ARGUMENT: 2,
    grpc.StatusCode.FAILED_PRECONDITION: 1,
    grpc.StatusCode.UNAUTHENTICATED: 5,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 3,
    grpc.StatusCode.UNAVAILABLE: 3,
    grpc.StatusCode.DEADLINE_EXCEEDED: 4,
    grpc.StatusCode.INTERNAL: 1,
}
CLIENT_VERBS = [name for name, verb in verbs.VERBS.items() if not verb.extra and name != "eval"]
SERVICE_VERBS = [name for name, verb in verbs.VERBS.items() if verb.extra]


def process(*arguments: str, **settings) -> subprocess.Popen:  # type: ignore[no-untyped-def,type-arg]
    env = {**os.environ, **settings.pop("env", {})}
    command = [*settings.pop("shell", ()), sys.executable, "-m", "colaserve_client"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
    return subprocess.Popen([*command, *arguments], env=env, text=True, **{**pipes, **settings})


def finished(*arguments: str, **settings) -> tuple[int, str, str]:  # type: ignore[no-untyped-def]
    started = process(*arguments, **settings)
    out, err = started.communicate(timeout=60)
    return started.returncode, out, err


def redirected(redirection: str, *arguments: str, **settings) -> tuple[int, str, str]:  # type: ignore[no-untyped-def]
    """`colaserve ARGUMENTS REDIRECTION` in a shell."""
    return finished(*arguments, shell=("sh", "-c", f'exec "$@" {redirection}', "sh"), **settings)


# Help


def test_help_lists_every_verb_and_imports_none(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(verbs, "import_module", lambda name: pytest.fail(f"imported {name}"))
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for name, verb in verbs.VERBS.items():
        assert f"  {name} " in shown
        assert verb.help in " ".join(shown.split())
    for code, meaning in exits.MEANINGS.items():
        assert f"{code}  {meaning}" in shown


@pytest.mark.parametrize(("verb", "hint"), [("genrate", " Did you mean 'generate'?"), ("zzzz", "")])
def test_an_unknown_verb_is_named_with_the_nearest_one(verb, hint, capsys):
    assert main([verb]) == exits.USAGE
    assert capsys.readouterr().err == f"colaserve: No such command '{verb}'.{hint} (see colaserve --help)\n"


def test_no_verb_at_all_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) in (0, 2)  # click before 8.2 says 0
    shown = capsys.readouterr()
    assert "Continue a prompt" in shown.out + shown.err


@pytest.mark.parametrize("name", [*CLIENT_VERBS, "eval"])
def test_every_verb_teaches_by_example_and_reads_where_the_server_is_from_variables_alone(name: str) -> None:
    command = cli.get_command(click.Context(cli), name)
    commands = list(command.commands.values()) if isinstance(command, click.Group) else [command]
    found = {}
    for parameter in [*(each for verb in commands for each in verb.params), *cli.params]:
        if isinstance(parameter, click.Option):
            flag = max(parameter.opts, key=len)
            assert parameter.help or name == "eval", flag
            if parameter.envvar:
                found[flag] = parameter.envvar
    assert all(f"colaserve {name}" in (verb.help or "") or name == "eval" for verb in commands)
    assert found.pop("--debug") == "COLASERVE_DEBUG"
    server = ("--target", "--key", "--timeout", "--tls-ca", "--tls-client-cert", "--tls-client-key")
    assert found in ({}, {flag: "COLASERVE_" + flag[2:].upper().replace("-", "_") for flag in server})


def test_the_version_is_shown_and_the_shell_gets_its_completions(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in (
        (["--version"], "colaserve, version "),
        *((["completion", shell], "_COLASERVE_COMPLETE") for shell in ("bash", "zsh", "fish")),
    ):
        assert main(arguments) == 0
        assert said in capsys.readouterr().out
    env = {"_COLASERVE_COMPLETE": "bash_complete", "COMP_WORDS": "colaserve gen", "COMP_CWORD": "1"}
    _, out, err = finished(env=env)
    assert "plain,generate" in out, err


# Exit codes


@pytest.mark.parametrize(("status", "code"), CODES.items())
def test_every_kind_of_failure_has_its_exit_code(run, behaviour, status, code):
    behaviour.failures.append(Failure(status, "it failed"))
    done = run("info", "--tries", "1")
    assert done.code == code
    assert done.err.startswith("colaserve: it failed")
    assert done.err.count("\n") == 1


def test_the_hint_says_what_is_away(run: Run, behaviour: Behaviour) -> None:
    behaviour.failures.append(Failure(grpc.StatusCode.UNAVAILABLE, "the prior is not available: connection refused"))
    assert "the server answers, its prior does not: `colaserve status` shows" in run("info", "--tries", "1").err
    behaviour.failures.append(Failure(grpc.StatusCode.UNAVAILABLE, "connection refused"))
    assert "is a server running?" in run("info", "--tries", "1").err
    behaviour.failures.append(Failure(grpc.StatusCode.UNAVAILABLE, "Cancelling all calls"))
    assert "the server was stopped while it answered" in run("info", "--tries", "1").err


def test_a_bug_is_one_line_unless_debugging(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("colaserve_client.blocking.Client.info", lambda self: 1 // 0)
    done = run("info")
    assert (done.code, done.err) == (1, "colaserve: ZeroDivisionError: integer division or modulo by zero "
                                        "(COLASERVE_DEBUG=1 shows where)\n")  # fmt: skip
    with pytest.raises(ZeroDivisionError):
        run("info", env={"COLASERVE_DEBUG": "1"})
    with pytest.raises(ZeroDivisionError):
        run("--debug", "info")


# Missing extras


@pytest.mark.parametrize("name", SERVICE_VERBS)
def test_a_verb_without_its_extra_says_what_to_install(name, monkeypatch, capsys):
    def missing(module: str) -> None:
        raise ModuleNotFoundError(f"No module named {module}", name="torch")

    monkeypatch.setattr(verbs, "import_module", missing)
    extra = verbs.VERBS[name].extra
    assert main([name, "--whatever", "5"]) == 1
    assert verbs.pip_line(extra) in capsys.readouterr().err
    assert main([name, "--help"]) == 0
    assert verbs.pip_line(extra) in " ".join(capsys.readouterr().out.split())


ORIGINS = {
    "": "pip install 'colaserve[serve]'",
    '{"url": "file:///a%20b", "dir_info": {}}': "pip install '/a b[serve]'",
    '{"url": "file:///a", "dir_info": {"editable": true}}': "pip install --editable '/a[serve]'",
    '{"url": "file:///a.whl", "archive_info": {}}': "pip install 'colaserve[serve] @ file:///a.whl'",
    '{"url": "https://host/a", "vcs_info": {"vcs": "git", "commit_id": "c0"}}':
        "pip install 'colaserve[serve] @ git+https://host/a@c0'",
}  # fmt: skip


@pytest.mark.parametrize("origin", ORIGINS)
def test_the_line_for_pip_names_where_it_was_installed_from(origin, monkeypatch, tmp_path):
    folder = tmp_path / "colaserve-9.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: colaserve\nVersion: 9\n")
    if origin:
        (folder / "direct_url.json").write_text(origin)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert verbs.pip_line("serve") == ORIGINS[origin]


def test_a_module_of_our_own_that_is_missing_is_not_blamed_on_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(module: str) -> None:
        raise ModuleNotFoundError("No module named 'colaserve_client.cli.lost'", name="colaserve_client.cli.lost")

    monkeypatch.setattr(verbs, "import_module", missing)
    with pytest.raises(ModuleNotFoundError):
        cli.get_command(click.Context(cli), "up")


# True processes


def test_text_appears_before_the_generation_has_ended(server: FakeServer, behaviour: Behaviour) -> None:
    behaviour.wait_after = 2
    started = process("generate", "Once", "--target", server.target)
    assert started.stdout.read(8) == STORY[:8].decode()
    behaviour.go_on.set()
    assert started.communicate(timeout=20) == (STORY[8:].decode() + "\n", "")
    assert started.returncode == 0


@pytest.mark.parametrize(
    "arguments", ["generate Once", "generate --input in.jsonl", "eval run questions.jsonl --output out"]
)
def test_ctrl_c_cancels_and_exits_with_130(server, behaviour, arguments, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n' * 20)
    (tmp_path / "questions.jsonl").write_text('{"id": 1, "prompt": "a", "ground_truth": "b"}\n')
    behaviour.wait_after = 1
    started = process(*arguments.split(), "--target", server.target, cwd=tmp_path)
    eventually(lambda: behaviour.running or started.poll() is not None)
    started.send_signal(signal.SIGINT)
    _, err = started.communicate(timeout=20)
    assert started.returncode == 130
    assert "Traceback" not in err
    eventually(lambda: behaviour.running == 0)


# Streams and files


def test_streams_that_are_closed_or_full_are_one_line(server: FakeServer, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n' * 3)
    batch = ["--input", str(tmp_path / "in.jsonl"), "--output", "/dev/full"]
    for redirection, arguments, code, said in (
        ("<&-", [], 2, "standard input is closed"),
        (">&-", ["Once"], 1, "standard output is closed"),
        (">&-", ["Once", "--json"], 1, "standard output is closed"),
        (">/dev/full", ["Once"], 1, "colaserve: standard output: No space left on device"),
        ("", batch, 1, "/dev/full: No space left on device"),
    ):
        done = redirected(redirection, "generate", *arguments, "--target", server.target)
        assert (done[0], done[2].splitlines()[-1].startswith("colaserve: ")) == (code, True), done
        assert said in done[2]
        assert "Traceback" not in done[2]
        assert "Exception ignored" not in done[2]
    assert redirected("2>&-", "generate", "Once", "--target", server.target)[:2] == (0, STORY.decode() + "\n")
    assert redirected("<&- 2>&-", "generate", "Once", "--target", server.target)[:2] == (0, STORY.decode() + "\n")


def test_a_character_that_the_outputs_encoding_lacks_is_an_escape(server: FakeServer) -> None:
    for encoding in ("latin-1", "ascii"):
        env = {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
        code, out, _ = redirected("", "reconstruct", "é😀", "--json", "--target", server.target, env=env)
        assert (code, json.loads(out)[0]["original"]) == (0, "é😀")
        code, out, err = redirected("", "generate", "日", "--echo", "--target", server.target, env=env)
        assert (code, out, err) == (0, "\\u65e5" + STORY.decode() + "\n", "")


def test_a_terminal_is_shown_control_characters_as_escapes(server: FakeServer) -> None:
    arguments = ("generate", "\x1b[31m\x9b2J\tred", "--echo", "--target", server.target)
    ours, its = os.openpty()
    started = process(*arguments, stdout=its)
    os.close(its)
    assert started.communicate(timeout=60)[1] == ""
    with open(ours, "rb") as terminal:
        assert terminal.read1().decode().startswith(f"\\x1b[31m\\x9b2J\tred{STORY.decode()}")
    assert finished(*arguments)[1] == f"\x1b[31m\x9b2J\tred{STORY.decode()}\n"


def test_a_reader_that_has_enough_is_exit_code_1_without_a_word(server: FakeServer) -> None:
    command = f'{sys.executable} -m colaserve_client generate "$0" --target {server.target} --echo; echo $? >&2'
    done = subprocess.run(["sh", "-c", f"({command}) | true", "x" * 100_000], capture_output=True, timeout=60)
    assert done.stderr.decode().strip() == "1"
