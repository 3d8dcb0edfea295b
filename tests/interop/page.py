"""Runs the blocks of docs/integrations.md that name a client, each unmodified and in that client's environment.

page.py HTTP_URL [NAME...]: all, or these, against a server with the bundled checkpoint. An environment,
build/interop-NAME, is made once. Exits 1 when a block fails or does not answer what it must.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "services/colaserve_services/demo"
PACKAGES = {
    "llm": "llm==0.36",
    "llama-index": "llama-index-llms-openai-like==0.8.0",
    "litellm-proxy": "litellm[proxy]==1.106.2",
    "aiperf": "aiperf==0.13.0",  # brings transformers 5.24
}
ENVIRONMENTS = {"transformers": "aiperf"}
ANSWERS = {"aiperf": "Output Token Throughput"}  # the others: Paris
BLOCK = re.compile(r"^```(?:sh|python) (\S+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def environment_of(name: str) -> Path:
    """The folder of its commands, made if need be."""
    kind = ENVIRONMENTS.get(name, name)
    folder = ROOT / "build" / f"interop-{kind}"
    stamp = folder / re.sub(r"\W", "_", PACKAGES[kind])
    if not stamp.exists():
        print(f"==> installing {PACKAGES[kind]}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        pip = [folder / "bin/pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, PACKAGES[kind]], check=True)
        stamp.touch()
    return folder / "bin"


def fault(name: str, text: str, http: str) -> str:
    """What is wrong when it runs; empty: nothing."""
    commands = environment_of(name)
    text = text.replace("http://localhost:8000", http).replace("DIR", str(DEMO))
    with tempfile.TemporaryDirectory() as folder:
        words = [commands / "python", "-c", text] if "import " in text else ["bash", "-euo", "pipefail", "-c", text]
        environment = {**os.environ, "PATH": f"{commands}:{os.environ['PATH']}", "HF_HOME": folder}
        try:
            done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=400)
        except subprocess.TimeoutExpired as error:
            return f"not done after {error.timeout} s: {error.stdout!r}"
    said = done.stdout + done.stderr
    return "" if done.returncode == 0 and ANSWERS.get(name, "Paris") in said else said[-4000:] or "it said nothing"


def main(http: str, *names: str) -> int:
    blocks = dict(BLOCK.findall((ROOT / "docs/integrations.md").read_text(encoding="utf-8")))
    failed = 0
    for name in names or [name for name in blocks if name in {*PACKAGES, *ENVIRONMENTS}]:
        said = fault(name, blocks[name], http)
        print(f"FAILED  {name}\n{said}" if said else f"ok      {name}", flush=True)
        failed |= bool(said)
    return failed


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
