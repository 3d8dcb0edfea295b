"""Processes of an older commit beside today's: a fleet is updated role by role, and its clients are updated last."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Mapping
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

assert sys.argv[2] in colaserve_client.__file__
with Client(sys.argv[1]) as client:
    request = {"max_new_tokens": 12, "seed": NoiseSeed(7), "ignore_end": True}
    print(client.generate("Once upon a time", sampler=Sampler(steps=4), **request).text)
    print("".join(piece.text for piece in client.stream("There was", sampler=Sampler(steps=4), **request)))
    print(client.reconstruct(["a text that goes through the latent space and back"])[0].text)
    print(client.infill(["A tale of ", 3, ". The end."], seed=7).text)
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
    with ExitStack() as stack:

        def start(environment: Mapping[str, str], *arguments: str) -> str:
            folder = tmp_path_factory.mktemp("role")
            return stack.enter_context(started(folder, *arguments, *ports, env=environment)).target

        def coordinator(environment: Mapping[str, str], stages: Mapping[str, str]) -> str:
            return start(environment, "coordinator", *(f"--{stage}={address}" for stage, address in stages.items()))

        today, before = ({stage: start(build, stage) for stage in STAGES} for build in ({}, older))
        yield {
            "today's": coordinator({}, today),
            "older": coordinator(older, before),
            "older coordinator, today's stages": coordinator(older, today),
            "today's coordinator, older stages": coordinator({}, before),
        }


def call(address: str, environment: Mapping[str, str]) -> str:
    """What a client of either build prints."""
    part = environment.get("PYTHONPATH", str(ROOT)).split(os.pathsep)[0]
    done = subprocess.run(
        [sys.executable, "-c", CALL, address, part],
        env=os.environ | environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_older_and_newer_processes_write_the_same_together(older, systems):
    expected = call(systems["today's"], {})
    assert expected.strip()
    for environment in ({}, older):
        assert {name: call(systems[name], environment) for name in systems} == dict.fromkeys(systems, expected)
