"""Processes of an older commit beside today's: a fleet is updated role by role, and its clients are updated last."""

import io
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.services.launch.processes import started

ROOT = Path(__file__).resolve().parents[2]
BUILD = "c185997"
STAGES = ("encoder", "prior", "decoder")
CALL = """
import sys
import colaserve_client
from colaserve_client import Client, NoiseSeed, Sampler

assert sys.argv[1] in colaserve_client.__file__
for address in sys.argv[2:]:
    with Client(address) as client:
        request = {"max_new_tokens": 12, "seed": NoiseSeed(7), "ignore_end": True}
        written = client.generate("Once upon a time", sampler=Sampler(steps=4), **request).text
        streamed = "".join(piece.text for piece in client.stream("There was", sampler=Sampler(steps=4), **request))
        rebuilt = client.reconstruct(["a text that goes through the latent space and back"])[0].text
        print([written, streamed, rebuilt, client.infill(["A tale of ", 3, ". The end."], seed=7).text])
"""


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    """The environment in which Python imports that commit's code."""
    folder = tmp_path_factory.mktemp("older")
    command = ["git", "archive", BUILD, "client", "services", "protos/gen"]
    packed = subprocess.run(command, cwd=ROOT, capture_output=True)
    if packed.returncode:
        pytest.skip(f"this clone's history has no {BUILD}, which is run beside today's code")
    with tarfile.open(fileobj=io.BytesIO(packed.stdout)) as archive:
        archive.extractall(folder, filter="data")
    return {"PYTHONPATH": os.pathsep.join(str(folder / part) for part in ("client", "services", "protos/gen"))}


@pytest.fixture(scope="module")
def systems(older: Mapping[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, str]]:
    """What is under test: its address. The older gateway's framework is no dependency any more, so no gateway runs."""
    ports = ("--grpc-port=0", "--metrics-port=0")
    with ExitStack() as stack, ThreadPoolExecutor() as threads:

        def start(environment: Mapping[str, str], *arguments: str) -> str:
            folder = tmp_path_factory.mktemp("role")
            return stack.enter_context(started(folder, *arguments, *ports, env=environment)).target

        def coordinator(environment: Mapping[str, str], stages: Mapping[str, str]) -> str:
            return start(environment, "coordinator", *(f"--{stage}={address}" for stage, address in stages.items()))

        running = list(threads.map(start, [{}] * 3 + [older] * 3, STAGES * 2))
        today, before = (dict(zip(STAGES, some, strict=True)) for some in (running[:3], running[3:]))
        yield {
            "today's": coordinator({}, today),
            "older": coordinator(older, before),
            "older coordinator, today's stages": coordinator(older, today),
            "today's coordinator, older stages": coordinator({}, before),
        }


def texts(environment: Mapping[str, str], addresses: Iterable[str]) -> list[str]:
    """What a client of either build is given by each of them."""
    part = environment.get("PYTHONPATH", str(ROOT)).split(os.pathsep)[0]
    done = subprocess.run(
        [sys.executable, "-c", CALL, part, *addresses],
        env=os.environ | environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_older_and_newer_processes_write_the_same_together(older, systems):
    found = [texts(environment, systems.values()) for environment in ({}, older)]
    expected = found[0][0]
    assert len(expected) > 100
    for answers in found:
        assert dict(zip(systems, answers, strict=True)) == dict.fromkeys(systems, expected)
