"""Options, their variables, their help and their page belong together."""

import os
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from colaserve_services.commands import COMMANDS
from colaserve_services.launch import threads
from colaserve_services.launch.docs import document
from colaserve_services.launch.options import COORDINATOR, GATEWAY, GROUPS, STAGE, UP
from colaserve_services.launch.progress import Progress, size
from colaserve_services.launch.split_settings import split_settings
from tests.conftest import GOLDEN

ALL = [option for options in GROUPS.values() for option in options]
ROLES = ("up", "encoder", "prior", "decoder", "coordinator", "gateway")


def test_every_option_is_also_a_variable_and_belongs_to_one_group():
    assert len({option.name for option in ALL}) == len(ALL)
    for option in ALL:
        assert option.envvar == "COLASERVE_" + option.name.upper()
        assert option.help.endswith((".", "]."))


def test_every_group_is_taken_by_a_role():
    assert set(GROUPS) == {*UP, *STAGE, *COORDINATOR, *GATEWAY}


@pytest.mark.parametrize("role", ROLES)
def test_help_teaches_with_examples_and_shows_every_option(role):
    done = CliRunner().invoke(COMMANDS[role], ["--help"])
    assert done.exit_code == 0
    assert f"colaserve {role} --" in done.output
    for parameter in COMMANDS[role].params:
        assert parameter.opts[0] in done.output


def test_the_page_of_options_is_current():
    page = (GOLDEN.parents[2] / "docs/configuration.md").read_text(encoding="utf-8")
    assert page == document(), "run scripts/generate-config-docs"


def test_importing_the_commands_imports_no_torch_and_no_server():
    heavy = {"torch", "tokenizers", "starlette", "uvicorn", "prometheus_client"}  # grpc comes with the client
    code = f"import sys, colaserve_services.commands; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_all_commands_are_named():
    assert set(COMMANDS) == set(ROLES)


def test_the_command_line_wins_over_the_variable(monkeypatch):
    monkeypatch.setenv("COLASERVE_MAX_RUNNING", "5")
    seen = []
    probe = click.Command("probe", params=list(COMMANDS["prior"].params), callback=lambda **p: seen.append(p))
    CliRunner().invoke(probe, [])
    CliRunner().invoke(probe, ["--max-running=7"])
    assert [params["max_running"] for params in seen] == [5, 7]


NUMBERS = [option for option in ALL if option.type.name.endswith("range")]
OUT_OF_BOUNDS = {"integer range": ["-1", "1099511627776000000000"], "float range": ["nan", "inf", "-inf"]}


@pytest.mark.parametrize("by", ["flag", "variable"])
@pytest.mark.parametrize("option", NUMBERS, ids=lambda option: option.name)
def test_numbers_that_no_message_or_channel_can_hold_are_refused(option, by, monkeypatch):
    probe = click.Command("probe", params=[option], callback=lambda **params: None)
    for value in OUT_OF_BOUNDS[option.type.name]:
        if by == "variable":
            monkeypatch.setenv(option.envvar, value)
        done = CliRunner().invoke(probe, [f"{option.opts[0]}={value}"] if by == "flag" else [])
        assert done.exit_code == 2
        assert f"'{option.opts[0]}'" in done.stderr


def test_texts_that_are_no_utf_8_are_refused():
    for role, option in (("up", "--served-model-name"), ("gateway", "--cors-origins")):
        done = CliRunner().invoke(COMMANDS[role], [f"{option}=a\udcff"])
        assert done.exit_code == 2
        assert "not UTF-8" in done.stderr


def split_arguments(*arguments):
    """What the processes of `up --split` would be told."""
    up, found = COMMANDS["up"], []

    @click.pass_context
    def callback(context, **params):
        found.append(split_settings(context, params))

    probe = click.Command("up", params=list(up.params), callback=callback)
    done = CliRunner().invoke(probe, ["--split", f"--model={GOLDEN / 'tiny_b4'}", *arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return found[0]


def test_split_tells_each_role_what_it_knows_of_what_was_given():
    told = split_arguments(
        "--max-running=7", "--http-port=0", "--steps=9", "--api-keys=k1", "--grpc-port=1234", "--metrics-port=4321"
    ).arguments
    assert "--max-running=7" in told["prior"]
    assert "--max-running=7" not in told["gateway"]
    assert "--http-port=0" in told["gateway"]
    assert "--http-port=0" not in told["decoder"]
    assert "--steps=9" in told["coordinator"]
    for port in ("--grpc-port=1234", "--metrics-port=4321"):
        assert [role for role, arguments in told.items() if port in arguments] == ["coordinator"]
    assert not any("k1" in argument for arguments in told.values() for argument in arguments)


def test_split_bounds_single_clients_at_the_gateway_which_is_one_client_to_the_others(monkeypatch):
    told = split_arguments("--max-calls-per-client=2", "--max-rate-per-client=3", "--api-keys=k1")
    limits = {"--max-calls-per-client=2", "--max-rate-per-client=3.0"}
    assert limits <= set(told.arguments["gateway"])
    for role in ("encoder", "prior", "decoder", "coordinator"):
        assert not limits & set(told.arguments[role])
        assert told.environment[role]["COLASERVE_MAX_CALLS_PER_CLIENT"] == "0"
        assert told.environment[role]["COLASERVE_MAX_RATE_PER_CLIENT"] == "0"
    assert "COLASERVE_MAX_CALLS_PER_CLIENT" not in told.environment["gateway"]
    assert (
        told.environment["gateway"]["COLASERVE_UPSTREAM_KEY"] in told.environment["coordinator"]["COLASERVE_API_KEYS"]
    )


def test_threads_spin_only_briefly_in_every_mode_unless_told_otherwise(monkeypatch):
    for variable, value in ((None, None), ("OMP_WAIT_POLICY", "passive"), ("GOMP_SPINCOUNT", "7")):
        with monkeypatch.context() as patch:
            patch.setattr(os, "environ", {variable: value} if variable else {})
            threads.settle(4)
            waiting = {variable: value} if variable else {"GOMP_SPINCOUNT": "3000", "KMP_BLOCKTIME": "1"}
            assert os.environ == {**waiting, "OMP_NUM_THREADS": "4"}


class Screen:
    def __init__(self, terminal):
        self.text, self._terminal = "", terminal

    def isatty(self):
        return self._terminal

    def write(self, text):
        self.text += text

    def flush(self): ...


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_shows_share_bytes_and_rate_of_what_takes_long(terminal):
    now, screen = [0.0], Screen(terminal)
    progress = Progress("reading", screen, clock=lambda: now[0])
    for second in range(12):
        now[0] = float(second)
        progress(second * 100_000_000, 1_100_000_000)
    progress.close()
    assert "54% of 1.1 GB, 100 MB/s" in screen.text.replace("\r", "\n")
    assert screen.text.endswith("\n")
    assert screen.text.count("\r") == (11 if terminal else 0)


def test_progress_is_silent_about_what_is_quick():
    screen = Screen(False)
    progress = Progress("reading", screen, clock=lambda: 0.5)
    for done in range(10):
        progress(done, 9)
    progress.close()
    assert screen.text == ""


def test_sizes_are_for_eyes():
    assert [size(n) for n in (0, 999, 1500, 123_456_789, 7.3e9)] == ["0 B", "999 B", "1.5 kB", "123 MB", "7.3 GB"]
