"""Parts of scripts/check-gpu that run other programs."""

import asyncio
import json
import os
import runpy
import shutil
import subprocess
import sys
import time
from functools import partial

from gpu_setup import DEVICE, LACKING, OUT, ROOT, SOURCES, TOY, say, tried

# isort: split
import torch


def compiled():
    """All kernels of the known models, on all cores, into the folder where those that launch them look first."""
    capability = "" if TOY else "{}{}".format(*torch.cuda.get_device_capability())
    sys.argv[1:], began = ["--only", capability], time.perf_counter()
    try:
        runpy.run_path(str(ROOT / "scripts" / "check-kernels"), run_name="__main__")
    except SystemExit as ended:  # 2: no such capability
        say("kernels are compiled ahead: exit code", ended.code, most=None if ended.code == 2 else 0)
    say("compiled kernels", time.perf_counter() - began, "s")


def sanitizer():
    """`small` where each access to memory is checked; the allocator keeps none back that would hide one."""
    tool = shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}:/usr/local/cuda/bin")
    if tool is None or TOY:
        say("left out: compute-sanitizer is not installed, or there is no GPU", None)
        return
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    small = [sys.executable, ROOT / "scripts" / "gpu_parts.py", "small", str(DEVICE), OUT]
    for kind in ("memcheck", "racecheck"):
        command = [tool, "--tool", kind, "--error-exitcode", "9", *small]
        code = subprocess.run(command, env=environment).returncode  # noqa: S603
        say(f"compute-sanitizer, {kind}: exit code", code, most=0)


def up():
    """The bundled model behind all services: callers over HTTP."""
    if LACKING:
        say(f"left out: {', '.join(sorted(LACKING))} not installed", None)
        return
    ports, environment = OUT / "ports.json", os.environ | {"PYTHONPATH": os.pathsep.join(SOURCES)}
    ports.unlink(missing_ok=True)
    options = f"up --device {DEVICE} --grpc-port 0 --http-port 0 --metrics-port 0 --max-running 128 --ports-file"
    command, began = [sys.executable, "-m", "colaserve_services.launch", *options.split(), ports], time.perf_counter()
    server = subprocess.Popen(command, env=environment)  # noqa: S603
    try:
        while not ports.exists() and server.poll() is None and time.perf_counter() - began < 120:
            time.sleep(0.1)
        address = json.loads(ports.read_text())["grpc"]
        say("up is ready", time.perf_counter() - began, "s")
        for callers in (1, 4) if TOY else (32, 128):
            tried(called_by, callers, address)
    finally:
        server.terminate()
        server.wait(30)


def called_by(callers, address):
    say(f"{callers} callers: tokens a second", asyncio.run(called(address, callers, 32 if TOY else 256)))


async def called(address, callers, tokens):
    from colaserve_client import AsyncClient

    async with AsyncClient(address) as client:
        began = time.perf_counter()
        ask = partial(client.generate, max_new_tokens=tokens, ignore_end=True)
        found = await asyncio.gather(*(ask(f"Question: what is {i} and {i}? Answer:") for i in range(callers)))
        return sum(len(each.token_ids) for each in found) / (time.perf_counter() - began)
