"""Who comes from the published adapter: its variables and its requests, as docs/integrations.md leads from them."""

import os
import re
import shlex
import subprocess

import httpx
import pytest

from tests.conftest import GOLDEN
from tests.services.launch.processes import FREE_PORTS, started

PAGE = (GOLDEN.parents[2] / "docs/integrations.md").read_text(encoding="utf-8")
VARIABLES = {
    "COLA_DIT_PATH": str(GOLDEN / "tiny_b4/cola_dlm/cola_dit"),
    "COLA_VAE_PATH": str(GOLDEN / "tiny_b4/cola_dlm/cola_vae"),
    "COLA_TOKENIZER_PATH": str(GOLDEN / "tiny_b4/tokenizer.json"),
    "COLA_MODEL_NAME": "cola-dlm",
    "COLA_API_KEY": "change-me",
}
MESSAGES = [{"role": "user", "content": "Question: What is the capital of France? Answer:"}]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A server that was set up by the page's lines."""
    folder = tmp_path_factory.mktemp("adapter")
    (block,) = re.findall(r"^```sh adapter\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    *lines, up = block.splitlines()
    subprocess.run(["bash", "-euc", "\n".join(lines)], cwd=folder, env={**os.environ, **VARIABLES}, check=True)
    for name, value in VARIABLES.items():
        up = up.replace(f"${name}", value)
    _, *words = shlex.split(up)
    with started(folder, *words, *FREE_PORTS, model=None, cwd=folder) as running:
        yield httpx.Client(base_url=running.http, timeout=60, headers={"authorization": "Bearer change-me"})


def test_its_variables_have_their_values_here(adapter):
    [model] = adapter.get("/v1/models").json()["data"]
    assert model["id"] == "cola-dlm"
    expected = {"max_tokens": 32, "steps": 16, "guidance_scale": 7.0, "top_k": 50, "top_p": 0.9, "temperature": 0.0}
    assert model["defaults"].items() >= {**expected, "repetition_penalty": 1.1}.items()
    assert adapter.get("/v1/models", headers={"authorization": "Bearer other"}).status_code == 401
    assert adapter.get("/health").status_code == 200


def test_its_requests_are_answered_here(adapter):
    asked = {"model": "cola-dlm", "messages": MESSAGES, "temperature": 0, "max_tokens": 32, "stream": False, "n": 1}
    answer = adapter.post("/v1/chat/completions", json={**asked, "seed": 1}).json()
    assert (answer["object"], answer["choices"][0]["message"]["role"]) == ("chat.completion", "assistant")
    assert answer["usage"]["completion_tokens"] <= 32
    without = {"messages": MESSAGES, "seed": 1}
    assert adapter.post("/v1/chat/completions", json=without).json()["choices"] == answer["choices"]
    streamed = adapter.post("/v1/chat/completions", json={**asked, "stream": True})
    assert streamed.headers["content-type"].startswith("text/event-stream")
    several = {**asked, "messages": [*MESSAGES, {"role": "assistant", "content": "Paris"}, *MESSAGES], "top_k": 5}
    assert adapter.post("/v1/chat/completions", json=several).status_code == 200
    assert adapter.post("/v1/chat/completions", json={**asked, "model": "gpt"}).status_code == 404
    unknown = adapter.post("/v1/chat/completions", json={**asked, "made_up": 1})
    assert (unknown.status_code, unknown.json()["error"]["param"]) == (400, "made_up")


def test_the_page_names_every_variable_of_the_adapter():
    for name in (*VARIABLES, *(f"COLA_{rest}" for rest in (
        "DEVICE", "DEFAULT_MAX_NEW_TOKENS", "MAX_NEW_TOKENS_LIMIT", "TIMESTEP_NUM", "GUIDANCE_SCALE", "TOP_K", "TOP_P",
        "REPETITION_PENALTY", "PAD_TOKEN_ID", "EOS_TOKEN_ID", "IM_END_TOKEN_ID",
    ))):  # fmt: skip
        assert f"`{name}`" in PAGE
