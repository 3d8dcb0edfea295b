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
}
MADE_BY_RUN = {"transformers": "venv"}  # interop-venv has it
BLOCK = re.compile(r"^```(?:sh|python) (\S+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def environment_of(name: str) -> Path:
    """The folder of its commands, made if need be."""
    if name in MADE_BY_RUN:
        return ROOT / "build" / f"interop-{MADE_BY_RUN[name]}" / "bin"
    folder = ROOT / "build" / f"interop-{name}"
    stamp = folder / re.sub(r"\W", "_", PACKAGES[name])
    if not stamp.exists():
        print(f"==> installing {PACKAGES[name]}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        pip = [folder / "bin/pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, PACKAGES[name]], check=True)
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
    return "" if done.returncode == 0 and "Paris" in said else said[-4000:] or "it said nothing"


def main(http: str, *names: str) -> int:
    blocks = dict(BLOCK.findall((ROOT / "docs/integrations.md").read_text(encoding="utf-8")))
    failed = 0
    for name in names or [name for name in blocks if name in {*PACKAGES, *MADE_BY_RUN}]:
        said = fault(name, blocks[name], http)
        print(f"FAILED  {name}\n{said}" if said else f"ok      {name}", flush=True)
        failed |= bool(said)
    return failed


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
