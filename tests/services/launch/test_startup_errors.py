"""What cannot be served is one clear line at start, an exit code, and no traceback."""

import json
import shutil
import socket
import subprocess
import sys
from contextlib import ExitStack

import pytest
from safetensors.torch import load_file, save_file

from colaserve_services.commands import COMMANDS
from tests.conftest import GOLDEN
from tests.services.launch.processes import invoked

DIT, VAE = "cola_dlm/cola_dit", "cola_dlm/cola_vae"


@pytest.fixture
def checkpoint(tmp_path):
    return shutil.copytree(GOLDEN / "tiny_b4", tmp_path / "model")


def start(*arguments):
    quiet = ("--grpc-port=0", "--metrics-port=0", "--http-port=0", "--threads=1")
    return invoked(COMMANDS["up"], *quiet, *arguments)


def line(done, code):
    """The line that says why."""
    assert isinstance(done.exception, SystemExit), done.exception
    assert done.exit_code == code, done.output
    said = [row for row in done.stderr.splitlines() if row.startswith("Error: ")]
    assert len(said) == 1, done.output
    assert "Traceback" not in done.output
    return said[0]


def weights(folder, part, change):
    path = folder / part / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def truncate(folder):
    path = folder / DIT / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def one_value(part, name, value):
    """A damage: the tensor's first value."""

    def change(tensors):
        tensors[name].view(-1)[0] = value

    return lambda folder: weights(folder, part, change)


def too_large(folder):
    """Finite, but what comes out is not."""
    weights(folder, VAE, lambda tensors: tensors["decoder.final_layer.weight"].fill_(1e38))


DAMAGES = [  # more are in tests/services/model/test_checkpoint.py
    (truncate, "model.safetensors: damaged or truncated"),
    (one_value(DIT, "txt_in.proj.weight", float("nan")), "'txt_in.proj.weight' holds values that are not finite"),
    (one_value(VAE, "encoder.wte.weight", float("inf")), "'encoder.wte.weight' holds values that are not finite"),
    (too_large, "the decoder cannot serve with these weights"),
    (lambda folder: (folder / "tokenizer.json").write_text("{}"), "tokenizer.json"),
    (lambda folder: (folder / "generation_config.json").write_text('{"steps": 0}'), "generation_config.json: steps"),
]


@pytest.mark.parametrize(("damage", "said"), DAMAGES, ids=[said.split(":")[-1].strip() for _, said in DAMAGES])
def test_a_checkpoint_that_cannot_be_served_is_one_line(checkpoint, damage, said):
    damage(checkpoint)
    done = start(f"--model={checkpoint}")
    assert said in line(done, done.exit_code)
    assert done.exit_code in (1, 2)


@pytest.mark.parametrize(("role", "wrong"), [("up", "--device=tpu"), ("prior", "--max-running=0")])
def test_with_json_logs_the_line_is_json(checkpoint, role, wrong):
    done = invoked(COMMANDS[role], f"--model={checkpoint}", "--grpc-port=0", "--metrics-port=0", "--log=json", wrong)
    assert done.exit_code == 2
    assert [json.loads(row)["level"] for row in done.stderr.splitlines()] == ["error"]


def test_a_folder_that_is_not_there_is_one_line(tmp_path):
    assert "no such folder" in line(start(f"--model={tmp_path / 'absent'}"), 1)


@pytest.mark.parametrize("role", ["up", "up --split", "prior", "coordinator", "gateway"])
def test_taken_ports_are_one_line_that_names_all_before_weights_are_read(role, checkpoint):
    truncate(checkpoint)  # which reading would find
    has = {option.name for option in COMMANDS[role.split()[0]].params}
    kinds = [kind for kind in ("grpc", "http", "metrics") if f"{kind}_port" in has]
    arguments = [*role.split()[1:], *([f"--model={checkpoint}"] if "model" in has else [])]
    with ExitStack() as stack:
        ports = {kind: stack.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1] for kind in kinds}
        arguments += [f"--{kind}-port={port}" for kind, port in ports.items()]
        said = line(invoked(COMMANDS[role.split()[0]], *arguments), 2)
    for kind, port in ports.items():
        assert f"--{kind}-port: cannot listen on 127.0.0.1:{port}: Address already in use" in said


def test_a_port_given_twice_is_found():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    said = line(start(f"--grpc-port={port}", f"--http-port={port}"), 2)
    assert f"--http-port: cannot listen on 127.0.0.1:{port}" in said
    assert "--grpc-port" not in said


IMPOSSIBLE = [
    (["--device=tpu"], "expected cpu, cuda or cuda:N"),
    (["--max-context=3"], "less than one block"),
    (["--kv-bytes=1"], "one block of latents needs"),
    (["--device=gateway=cpu"], "--device"),
    (["--tls=/nowhere"], "/nowhere has no tls.crt and tls.key"),
    (["--http-tls= /nowhere\n"], "/nowhere has no tls.crt and tls.key"),
    (["--api-keys-file=/nowhere/keys"], "cannot read /nowhere/keys"),
    (["--ports-file=/dev/full"], "--ports-file: cannot write /dev/full: No space left on device"),
    (["--ports-file=/nowhere/ports"], "--ports-file: cannot write /nowhere/ports: No such file"),
    (["--defaults=/nowhere/file"], "--defaults: /nowhere/file: No such file"),
    (["--log=xml"], "got 'xml', expected one of auto, json, text"),
    (["--log=text:loud"], "got 'text:loud'"),
    (["--replicas=prior=2"], "--replicas: needs --split"),
    (["--split", "--replicas=gateway=2"], "expected encoder, prior or decoder"),
    (["--split", "--replicas=prior=0"], "got 'prior=0', expected STAGE=1 to 64"),
]


@pytest.mark.parametrize(("arguments", "said"), IMPOSSIBLE, ids=[" ".join(a) for a, _ in IMPOSSIBLE])
def test_settings_that_do_not_fit_are_one_line(checkpoint, arguments, said):
    assert said in line(start(f"--model={checkpoint}", *arguments), 2)


@pytest.mark.parametrize(
    ("defaults", "said"),
    [({"top_p": 0}, "top_p: got 0, expected above 0"), ({"steps": 1001}, "steps: got 1001, expected 1 to 1000"),
     ({"max_new_tokens": 2**40}, "max_new_tokens"), ({"chat_frame": "hello"}, "chat_frame lacks"),
     ({"guidance_start": 0.2, "guidance_end": 0.5}, "guidance_end"), ({"stepz": 1}, "unknown key 'stepz'"),
     ({"eos_token_id": 0}, "eos_token_id belongs into")],
)  # fmt: skip
def test_a_file_of_defaults_that_cannot_be_is_one_line(checkpoint, tmp_path, defaults, said):
    file = tmp_path / "defaults.json"
    file.write_text(json.dumps(defaults))
    assert said in line(start(f"--model={checkpoint}", f"--defaults={file}"), 2)


def test_the_key_of_the_roles_is_checked(checkpoint, tmp_path, monkeypatch):
    (tmp_path / "keys").write_text("k1")
    monkeypatch.setenv("COLASERVE_ROLE_KEY", "a\nb")
    said = line(start(f"--model={checkpoint}", f"--api-keys-file={tmp_path / 'keys'}"), 2)
    assert "COLASERVE_ROLE_KEY has characters that HTTP cannot carry" in said


@pytest.mark.parametrize(
    ("role", "option", "said"),
    [
        ("prior", "--device=cuda:99", "--device: "),
        ("prior", "--device=decoder=cpu", "--device: names decoder, and this is the prior"),
        ("coordinator", None, "--encoder"),
        ("gateway", None, "--coordinator"),
    ],
)
def test_a_role_takes_a_device_of_its_own_that_is_there_and_asks_for_the_addresses_it_needs(
    role, option, said, checkpoint
):
    model = ["--grpc-port=0", f"--model={checkpoint}"] if role != "gateway" else ["--http-port=0"]
    done = invoked(COMMANDS[role], *model, "--metrics-port=0", *filter(None, [option]))
    assert said in line(done, 2)


def test_a_model_that_does_not_fit_into_memory_is_one_line():
    """With less memory than its weights take, once all else is loaded."""
    program = (
        "import resource\n"
        "from colaserve_services.errors import UsageError\n"
        "from colaserve_services.launch.settings import DEMO\n"
        "from colaserve_services.launch.stages import load_stages\n"
        "from colaserve_services.model.checkpoint import Checkpoint\n"
        "from colaserve_services.model.loading import check\n"
        "from colaserve_services.rpc.metrics import Metrics\n"
        "from colaserve_services.engine.limits import EngineLimits\n"
        "checkpoint = Checkpoint.open(DEMO)\n"
        "check(checkpoint)\n"
        "taken = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (taken + (12 << 20),) * 2)\n"
        "try:\n"
        "    load_stages(checkpoint, {'prior': ('cpu', 'float32')}, EngineLimits(), Metrics())\n"
        "except UsageError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "the prior does not fit into the memory of cpu\n", done.stderr
