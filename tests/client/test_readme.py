"""The README's Python does what it says."""

import re
from pathlib import Path

import pytest

from tests.client.fakes import SPACE, STORY, FakeServer

README = Path(__file__).parents[2] / "README.md"


def test_the_readmes_client_runs_as_it_stands(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert "127.0.0.1:50051" in code
    exec(code.replace("127.0.0.1:50051", server.target), {})
    printed = capsys.readouterr().out
    assert printed.startswith(f"{STORY.decode()}Latents([[ 84.,   0.],\n")
    assert printed.endswith(f"n=31, d=2, space='{SPACE}')\n")
