"""One process for all roles, and one for each: the same tokens, an orderly end, nothing left behind."""

import json
import os
import platform
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from colaserve.v1 import generation_pb2, generation_pb2_grpc
from tests.authority import make_authority
from tests.conftest import GOLDEN
from tests.services.launch.processes import FREE_PORTS, LAUNCH, QUIET, generate, started
from tests.waiting import wait_until

KEY = "a-key-for-tests"
BODY = {"prompt": "The capital", "max_tokens": 12, "seed": 7}

pytestmark = pytest.mark.slow


def post(url, key=""):
    headers = {"content-type": "application/json", **({"authorization": f"Bearer {key}"} if key else {})}
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(BODY).encode(), headers)
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)["choices"][0]["text"]


def long_stream(channel, steps=10):
    request = generation_pb2.GenerateRequest(
        prompt="x", max_new_tokens=200, ignore_end=True, seed={"base_seed": 3}, sampler={"steps": steps}
    )
    return generation_pb2_grpc.GenerationServiceStub(channel).Generate(request, timeout=120)


SHORT = {"OTEL_EXPORTER_OTLP_TIMEOUT": "1"}  # seconds that a collector is asked for


def ignore():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def test_fused_and_split_give_the_same_tokens_and_lose_nothing_when_they_end(tmp_path):
    """Defaults come from their file, and with --log=json every line is JSON. A full disk behind its output, an ignored
    hangup and no collector of traces stop no server."""
    (tmp_path / "defaults.json").write_text('{"steps": 9, "chat_frame": "Q: {prompt}"}')
    defaults = f"--defaults={tmp_path / 'defaults.json'}"
    harmed = ("--grace-seconds=120", "--otlp-endpoint=http://127.0.0.1:9")
    with (
        started(
            tmp_path, "up", *FREE_PORTS, *harmed, defaults, log=Path("/dev/full"), env=SHORT, preexec_fn=ignore
        ) as fused,
        grpc.insecure_channel(fused.target) as channel,
    ):
        tokens, text = generate(fused.target), post(fused.http)
        assert len(tokens) == 12
        fused.process.send_signal(signal.SIGHUP)
        assert generate(fused.target) == tokens
        stream = long_stream(channel)
        first = next(stream)
        fused.process.send_signal(signal.SIGTERM)
        rest = list(stream)
        assert sum(len(response.token_ids) for response in (first, *rest)) == 200
        assert fused.process.wait(120) == 0
    away = {"http_proxy": "http://127.0.0.1:9"}  # a proxy of the environment, which services do not use
    (tmp_path / "keys").write_text(KEY)
    own = ("--device=cpu,prior=cpu", f"--api-keys-file={tmp_path / 'keys'}", "--log=json", defaults)
    with started(tmp_path, "up", "--split", *FREE_PORTS, *own, env=away) as split:
        children = split.children()
        assert set(split.ports) == {"encoder", "prior", "decoder", "coordinator", "gateway"}
        assert len(children) == 5
        assert {role_of(child) for child in children if maps_torch(child)} == {"encoder", "prior", "decoder"}
        check_keys(split, tokens, text)
        with grpc.insecure_channel(split.target):
            assert split.stop(signal.SIGHUP) == 0
        assert not [child for child in children if child.is_running()]
        lines = [json.loads(line) for line in split.log.read_text().splitlines()]
    assert not [line for line in lines if line["level"] == "error"]  # also not from a gateway that had nothing to do
    ready, _ = [line for line in lines if line["role"] == "colaserve"]  # and that it drains
    assert ready["addresses"] == split.ports


def role_of(process):
    return process.cmdline()[3]  # python -m colaserve_services.launch ROLE


def maps_torch(process):
    return any("libtorch" in region.path for region in process.memory_maps())


def check_keys(split, tokens, text):
    """Both edges ask for the key, the roles do not ask each other, and it is printed nowhere."""
    with pytest.raises(grpc.RpcError) as refused:
        generate(split.target)
    assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED
    with pytest.raises(urllib.error.HTTPError) as caught:
        post(split.http)
    assert caught.value.code == 401
    assert generate(split.target, metadata=(("authorization", f"Bearer {KEY}"),)) == tokens
    assert post(split.http, KEY) == text
    models = urllib.request.Request(f"{split.http}/v1/models", headers={"authorization": f"Bearer {KEY}"})
    with urllib.request.urlopen(models, timeout=30) as answer:
        defaults = json.load(answer)["data"][0]["defaults"]
    assert (defaults["steps"], defaults["top_k"]) == (9, 50)
    assert KEY not in split.log.read_text()
    for child in split.children():
        assert KEY not in " ".join(child.cmdline())


def test_roles_trust_each_other_by_tls(tmp_path, authority):
    with started(tmp_path, "up", "--split", *FREE_PORTS, f"--tls={authority.issue_folder('service')}") as split:
        assert post(split.http)
        with pytest.raises(grpc.RpcError) as refused:
            generate(split.target)
        assert refused.value.code() == grpc.StatusCode.UNAVAILABLE


IMPATIENT = """
from colaserve_services.launch import split
split.REACH_SECONDS = 1.0
import colaserve_services.launch.__main__
"""


def test_stages_that_can_never_be_reached_are_reported_and_end_it(tmp_path, authority):
    folder = authority.issue_folder("service")
    (folder / "ca.crt").write_bytes(make_authority(tmp_path / "other").ca.read_bytes())  # which signed nobody
    code, said = ended(tmp_path, "up", "--split", *FREE_PORTS, f"--tls={folder}", program=("-c", IMPATIENT))
    assert code == 1
    assert "cannot be reached" in said


def ended(folder, *arguments, program=LAUNCH):
    """Exit code and output of a command that ends by itself."""
    command = [sys.executable, *program, *arguments, f"--model={GOLDEN / 'tiny_b4'}"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder,
                          env={**os.environ, **QUIET}, timeout=120)  # fmt: skip
    return done.returncode, done.stdout


def test_what_dies_is_started_again_and_streams_lose_nothing(tmp_path):
    """All end when what started them is killed."""
    away = {"TMPDIR": str(tmp_path)}
    with (
        started(tmp_path, "up", "--split", "--replicas=prior=2", *FREE_PORTS, env=away) as split,
        grpc.insecure_channel(split.target) as channel,
    ):
        assert set(split.ports) == {"encoder", "prior-0", "prior-1", "decoder", "coordinator", "gateway"}
        family, tokens = [(role_of(child), child) for child in split.children()], generate(split.target)
        whole = [id_ for response in long_stream(channel) for id_ in response.token_ids]
        stream = long_stream(channel)
        found = list(next(stream).token_ids)
        next(child for role, child in family if role == "prior").kill()
        found += [id_ for response in stream for id_ in response.token_ids]
        assert found == whole
        for role, child in family:
            if role in ("decoder", "coordinator", "gateway"):
                child.kill()
        wait_until(lambda: len(split.children()) == 6 and works(split, tokens), 100)
        assert split.log.read_text().count("ended with exit code -9: it starts again") == 4
        children = split.children()
        split.process.kill()
        split.process.wait(10)
        gone, alive = psutil.wait_procs(children, timeout=30)
        assert (len(gone), alive) == (6, [])


APART = """
import sys
from colaserve_services.launch.options import RoleCommand
from colaserve_services.launch.roles import run_apart
from colaserve_services.launch.settings import UpSettings

groups = [("encoder", "decoder"), ("prior",)]
RoleCommand("up", UpSettings, lambda settings, said: run_apart(settings, said, groups), "").main(sys.argv[2:])
"""


def test_with_gpus_stages_are_apart_and_started_again(tmp_path):
    """As on two GPUs, with the CPU in their place."""
    with started(tmp_path, "up", *FREE_PORTS, "--device=prior=cpu", program=("-c", APART)) as apart:
        prior = next(child for child in apart.children() if role_of(child) == "prior")
        assert {role_of(child) for child in apart.children()} == {"encoder+decoder", "prior"}
        assert not maps_torch(psutil.Process(apart.process.pid))
        tokens, text = generate(apart.target), post(apart.http)
        prior.kill()
        wait_until(lambda: works(apart, tokens), 100)
        assert post(apart.http) == text
        children = apart.children()
        assert apart.stop() == 0
        assert not [child for child in children if child.is_running()]


def works(split, tokens):
    """Whether all is reached where it was, with the same answers."""
    try:
        return generate(split.target) == tokens and post(split.http)
    except (grpc.RpcError, urllib.error.URLError, ConnectionError):
        return False


@pytest.mark.parametrize("mode", [["--dtype=bfloat16"], ["--split"]], ids=["one process in bfloat16", "split"])
def test_a_second_signal_ends_all_at_once_and_leaves_no_file(tmp_path, mode):
    """Where it is not in hardware, bfloat16 is served all the same, and the log says so."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    options = (*mode, *FREE_PORTS, "--grace-seconds=300", "--log=json")
    old_cpu = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "TMPDIR": str(temporary)}
    with started(tmp_path, "up", *options, env=old_cpu) as split, grpc.insecure_channel(split.target) as channel:
        children, stream = split.children(), long_stream(channel, steps=1000)
        next(stream)
        split.process.send_signal(signal.SIGINT)
        wait_until(lambda: "draining" in split.log.read_text())
        split.process.send_signal(signal.SIGINT)
        assert split.process.wait(20) == 0
        assert not list(temporary.iterdir())
        assert not [child for child in children if child.is_running()]
        with pytest.raises(grpc.RpcError):
            list(stream)
        lines = [json.loads(line) for line in split.log.read_text().splitlines() if line.startswith("{")]
    warnings = [line["reason"] for line in lines if "no bfloat16 in hardware" in line["message"]]
    assert len(warnings) == ("--split" not in mode)
    if platform.machine() == "x86_64":
        assert set(warnings) <= {"ONEDNN_MAX_CPU_ISA=AVX2 excludes bfloat16", "this CPU has no AVX512-BF16"}
    assert "BF16" not in "".join(line["why"] for line in lines if line["message"] == "backend chosen")


def test_the_coordinator_is_ready_as_long_as_its_stages_answer(tmp_path):
    ports = ("--grpc-port=0", "--metrics-port=0")
    with ExitStack() as stack, ThreadPoolExecutor() as threads:

        def start(role, *more):
            folder = tmp_path / role
            folder.mkdir()
            return stack.enter_context(started(folder, role, *ports, *more))

        both, prior = threads.map(start, ("encoder+decoder", "prior"))
        targets = [f"--encoder={both.target}", f"--prior={prior.target}", f"--decoder={both.target}"]
        coordinator = start("coordinator", *targets)
        tokens = generate(coordinator.target)
        with grpc.insecure_channel(coordinator.target) as channel:
            wait_until(lambda: healthy(channel), 100)
            os.kill(prior.process.pid, signal.SIGSTOP)
            wait_until(lambda: not healthy(channel), 100)
            os.kill(prior.process.pid, signal.SIGCONT)
            wait_until(lambda: healthy(channel), 100)
        assert generate(coordinator.target) == tokens


def healthy(channel):
    request = health_pb2.HealthCheckRequest(service="colaserve.v1.GenerationService")
    return health_pb2_grpc.HealthStub(channel).Check(request).status == health_pb2.HealthCheckResponse.SERVING
