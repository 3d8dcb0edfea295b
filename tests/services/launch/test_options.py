"""Options, their variables, their help and their page belong together."""

import os
import runpy
import subprocess
import sys
from contextlib import nullcontext

import click
import pytest
from click.testing import CliRunner

from colaserve_client.cli.options import VARIABLES
from colaserve_services.commands import COMMANDS
from colaserve_services.errors import UsageError
from colaserve_services.launch import settings as launch_settings
from colaserve_services.launch.hub import Progress, size
from colaserve_services.launch.options import REMOVED, STAGES, RoleCommand, check_removed, sections_of
from colaserve_services.launch.process import LONGEST_DESCRIPTION, description
from colaserve_services.launch.settings import DEMO, ROLES
from colaserve_services.launch.split import Children, groups
from colaserve_services.rpc.settings import LogSettings, Tls
from tests.conftest import GOLDEN

ALL = {each.name: each for settings in ROLES.values() for section in sections_of(settings).values() for each in section}
# DESIGN.md, section 5.
OF_UP = """--model --device --dtype --threads --kv-bytes --max-context --max-running --run-ahead --idle-seconds --split
    --replicas --defaults --served-model-name --max-generations --queue-seconds --max-per-caller --host --grpc-port
    --http-port --metrics-port --ports-file --drain-seconds --grace-seconds --tls --http-tls --api-keys-file
    --cors-origins --allow-unknown-fields --request-seconds --log --otlp-endpoint --metrics-aliases"""


def test_up_has_these_options_and_none_is_hidden_and_all_commands_are_named():
    options = {
        name: [each for each in command.params if isinstance(each, click.Option)] for name, command in COMMANDS.items()
    }
    assert {each.opts[0] for each in options["up"]} == set(OF_UP.split())
    assert not any(each.hidden for found in options.values() for each in found)
    assert set(COMMANDS) == set(ROLES)


def test_every_option_is_also_a_variable_and_told_about():
    for option in ALL.values():
        assert option.envvar == "COLASERVE_" + option.name.upper()
        assert option.help.endswith((".", "]."))


@pytest.mark.parametrize(("role", "option"), [("encoder", "--run-ahead=2"), ("gateway", "--grpc-port=1"),
    ("coordinator", "--device=cpu"), ("prior", "--http-port=1"), ("decoder", "--split")])  # fmt: skip
def test_an_option_that_does_nothing_for_a_role_is_refused(role, option):
    done = CliRunner().invoke(COMMANDS[role], [option])
    assert (done.exit_code, "No such option" in done.stderr) == (2, True)


@pytest.mark.parametrize("name", REMOVED)
def test_a_removed_name_and_its_variable_say_what_replaced_it_unless_it_is_the_clients(name):
    done = CliRunner().invoke(COMMANDS["up"], [f"--{name}=1"])
    assert (done.exit_code, done.stderr) == (2, f"Error: --{name} is gone: {REMOVED[name]}\n")
    variable = "COLASERVE_" + name.upper().replace("-", "_")
    of_the_client = variable in {f"COLASERVE_{each.upper()}" for each in VARIABLES}
    with nullcontext() if of_the_client else pytest.raises(UsageError, match=f"{variable} is gone: "):
        check_removed([], {variable: "1"})


@pytest.mark.parametrize("role", ROLES)
def test_help_teaches_with_examples_and_shows_every_option(role):
    done = CliRunner().invoke(COMMANDS[role], ["--help"])
    assert done.exit_code == 0
    assert f"colaserve {role} --" in done.output
    for parameter in COMMANDS[role].params:
        assert (parameter.metavar or parameter.opts[0]) in done.output


def test_the_page_of_options_is_current():
    root = GOLDEN.parents[2]
    page = (root / "docs/reference/configuration.md").read_text(encoding="utf-8")
    filled = runpy.run_path(str(root / "scripts/generate-config-docs"))["filled"]
    assert page == filled(page), "run scripts/generate-config-docs"


def test_importing_the_commands_imports_no_torch_and_no_server():
    heavy = {"torch", "tokenizers", "starlette", "uvicorn", "prometheus_client"}  # grpc comes with the client
    code = f"import sys, colaserve_services.commands; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def settings_of(role, *arguments):
    """What a role would be given."""
    found = []
    command = RoleCommand(role, ROLES[role], lambda settings, said: found.append((settings, said)), "")
    done = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return found[0]


def test_the_command_line_wins_over_the_variable_and_that_over_the_default(monkeypatch):
    monkeypatch.setenv("COLASERVE_MAX_RUNNING", "5")
    assert settings_of("prior")[0].max_running == 5
    assert settings_of("prior", "--max-running=7")[0].max_running == 7
    assert settings_of("prior")[0].run_ahead == 2


def test_settings_that_say_several_things_are_read(tmp_path):
    for name in ("tls.crt", "tls.key"):
        (tmp_path / name).write_text("")
    more = ("--split", "--replicas=prior=2, decoder=3", f"--http-tls={tmp_path} ")
    up, said = settings_of("up", "--device=cuda,decoder=cpu", "--log", "json:debug", *more)
    assert [up.device_of(stage) for stage in STAGES] == ["cuda", "cuda", "cpu"]
    assert up.log == LogSettings("json", "debug")
    assert up.http_tls == Tls(tmp_path / "tls.crt", tmp_path / "tls.key", None)
    assert up.replicas == {"prior": 2, "decoder": 3}
    assert said["COLASERVE_DEVICE"] == "cuda,decoder=cpu"
    assert said["COLASERVE_SPLIT"] == "1"


NUMBERS = [option for option in ALL.values() if option.type.name.endswith("range")]
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


def test_split_gives_each_role_what_was_given_and_keys_to_the_edges_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("COLASERVE_MAX_CONTEXT", "512")
    keys = tmp_path / "keys"
    keys.write_text("k1")
    up, said = settings_of("up", "--split", "--max-running=7", "--grpc-port=1234", f"--api-keys-file={keys}")
    children = Children(up, said)
    environments = {child.role: child.environment for child in children.all}
    assert {each["COLASERVE_MAX_RUNNING"] for each in environments.values()} == {"7"}
    assert {each["COLASERVE_MAX_CONTEXT"] for each in environments.values()} == {"512"}
    have_keys = {role for role, each in environments.items() if "COLASERVE_API_KEYS_FILE" in each}
    assert have_keys == {"coordinator", "gateway"}
    assert len({each["COLASERVE_ROLE_KEY"] for each in environments.values()}) == 1
    assert not any("COLASERVE_SPLIT" in each for each in environments.values())
    private = {child.role for child in children.all if "--grpc-port=0" in child.arguments}
    assert private == set(STAGES)


@pytest.mark.parametrize(("devices", "expected"), [
    ("cuda,cuda:0,cuda", ["encoder prior decoder"]),
    ("cpu,cuda:0,cuda:1", ["prior", "decoder encoder"]),
    ("cpu,cuda,cpu", ["prior encoder decoder"]),
    ("cpu,cpu,cuda:1", ["decoder encoder prior"]),
])  # fmt: skip
def test_stages_of_one_gpu_share_a_process(devices, expected):
    assert groups(dict(zip(STAGES, devices.split(","), strict=True))) == [tuple(each.split()) for each in expected]


def test_threads_spin_only_briefly_in_every_mode_unless_set_otherwise(monkeypatch):
    for variable, value in ((None, None), ("OMP_WAIT_POLICY", "passive"), ("GOMP_SPINCOUNT", "7")):
        with monkeypatch.context() as patch:
            patch.setattr(os, "environ", {variable: value} if variable else {})
            launch_settings.settle_threads(4)
            waiting = {variable: value} if variable else {"GOMP_SPINCOUNT": "3000", "KMP_BLOCKTIME": "1"}
            assert os.environ == {**waiting, "OMP_NUM_THREADS": "4", "TOKENIZERS_PARALLELISM": "false"}


def test_progress_without_a_terminal_is_a_log_line_now_and_then_with_sizes_for_eyes(caplog):
    now = [0.0]
    progress = Progress("reading", clock=lambda: now[0])
    with caplog.at_level("INFO"):
        for second in range(12):
            now[0] = float(second)
            progress(second * 100_000_000, 1_100_000_000)
        progress.close()
    assert [record.getMessage() for record in caplog.records] == ["reading: 55% of 1.1 GB"]
    assert [size(n) for n in (0, 999, 1500, 123_456_789, 7.3e9)] == ["0 B", "999 B", "1.5 kB", "123 MB", "7.3 GB"]


def test_the_first_paragraph_of_the_card_is_the_description_and_what_is_no_text_is_none(tmp_path):
    card = tmp_path / "MODEL_CARD.md"
    assert description(tmp_path) == ""
    for content, said in (
        (b"# Name\n\n**It knows** sums\nand `names`.\n\nMore.\n", "It knows sums and names."),
        (b"x" * 5000, "x" * LONGEST_DESCRIPTION),
        (b"\xff\xfe", ""),
    ):
        card.write_bytes(content)
        assert description(tmp_path) == said
    assert "197 countries" in description(DEMO)
    assert "knows nothing else" in description(DEMO)
