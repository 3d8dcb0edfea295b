"""`colaserve up --split` for scripts: started, asked, stopped. Standard library only."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ROLES = ("encoder", "prior", "decoder", "coordinator", "gateway")
_VENV = ROOT / ".venv" / "bin" / "python"  # what make set up, for a script run by a Python without colaserve
PYTHON = str(_VENV) if find_spec("colaserve_services") is None and _VENV.exists() else sys.executable


@contextmanager
def colaserve(model: Path, folder: Path, *more: str) -> Iterator[dict[str, dict[str, str]]]:
    """`colaserve up --split`, with more options; the addresses by role and kind."""
    file = folder / "ports.json"
    arguments = ["up", "--split", f"--model={model}", "--grpc-port=0", "--http-port=0", "--metrics-port=0"]
    arguments += ["--threads=1", "--log=auto:warning", f"--ports-file={file}", "--drain-seconds=0", *more]
    with process([PYTHON, "-m", "colaserve_services.launch", *arguments], folder / "colaserve.log"):
        wait(file.exists, 120, "colaserve to be ready", folder / "colaserve.log")
        yield json.loads(file.read_text(encoding="utf-8"))


@contextmanager
def process(command: list[str], log: Path) -> Iterator[None]:
    """A process that ends with the block."""
    output = log.open("wb")
    with output, subprocess.Popen(command, stdout=output, stderr=output, cwd=ROOT) as running:  # noqa: S603 - ours
        try:
            yield
        finally:
            running.terminate()
            try:
                running.wait(60)
            except subprocess.TimeoutExpired:
                running.kill()


def get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=10) as answer:  # noqa: S310 - our own address
        return json.load(answer)


def ask(url: str, body: dict[str, Any]) -> bytes:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})  # noqa: S310
    with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310 - our own address
        return bytes(answer.read())


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2):  # noqa: S310 - our own address
            return True
    except OSError:
        return False


def wait(ready: Any, seconds: float, what: str, log: Path) -> None:
    """Return when `ready()`; else end with the log's last lines."""
    end = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > end:
            sys.exit(f"waited {seconds:.0f} s for {what}:\n" + log.read_text(encoding="utf-8")[-2000:])
        time.sleep(0.2)


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])
