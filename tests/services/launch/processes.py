"""Real processes of `colaserve`, started, asked and stopped."""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager

import grpc
import psutil
from click.testing import CliRunner

from colaserve.v1 import generation_pb2, generation_pb2_grpc
from tests.conftest import GOLDEN
from tests.waiting import wait_until

FREE_PORTS = ("--grpc-port=0", "--http-port=0", "--metrics-port=0")
QUICK = ("--drain-seconds=0.1",)
LAUNCH = ("-m", "colaserve_services.launch")
QUIET = {"OMP_NUM_THREADS": "1"}


class Running:
    """A started command; `ports` is the content of its ports file."""

    def __init__(self, process, ports, log):
        self.process, self.ports, self.log = process, ports, log

    @property
    def target(self):
        return self.ports.get("grpc") or self.ports["coordinator"]["grpc"]

    @property
    def http(self):
        return self.ports.get("http") or self.ports["gateway"]["http"]

    def children(self):
        return psutil.Process(self.process.pid).children(recursive=True)

    def stop(self, number=signal.SIGTERM):
        """The exit code."""
        self.process.send_signal(number)
        return self.process.wait(100)


@contextmanager
def started(folder, *arguments, model=GOLDEN / "tiny_b4", env=None, log=None, program=LAUNCH, **settings):
    """`colaserve ...` once it is ready; killed with all its children at the end, whatever happened. `settings` are
    those of Popen."""
    ports_file, log = folder / "ports.json", log or folder / "log.txt"
    ports_file.unlink(missing_ok=True)
    command = [sys.executable, *program, *arguments, f"--ports-file={ports_file}", *QUICK]
    if model is not None:
        command.append(f"--model={model}")
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env={**os.environ, **QUIET, **(env or {})}, **settings
        )
    family = []
    try:
        single = not {"up", "gateway"} & set(arguments)  # which write the file early
        wait_until(lambda: process.poll() is not None or (ports_file.exists() and (not single or ready(log))), 150)
        assert process.poll() is None, log.read_text()
        running = Running(process, json.loads(ports_file.read_text()), log)
        family = running.children()
        yield running
    finally:
        for left in (*family, process):
            if left.is_running() if isinstance(left, psutil.Process) else left.poll() is None:
                left.kill()
        process.wait(10)


def invoked(command, *arguments):
    """The result of a command that ends by itself, in this process, which logs as before afterwards."""
    root = logging.getLogger()
    handlers, level, hook = root.handlers[:], root.level, threading.excepthook
    try:
        return CliRunner().invoke(command, [*map(str, arguments)])
    finally:
        root.handlers[:], root.level, threading.excepthook = handlers, level, hook


def ready(log):
    return "ready after" in log.read_text()


def generate(target, prompt="The capital", tokens=12, metadata=(), **fields):
    """The token ids."""
    request = generation_pb2.GenerateRequest(prompt=prompt, max_new_tokens=tokens, seed={"base_seed": 7}, **fields)
    with grpc.insecure_channel(target) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        return [id_ for response in stub.Generate(request, timeout=30, metadata=metadata) for id_ in response.token_ids]
