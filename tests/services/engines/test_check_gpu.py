"""scripts/check-gpu runs, at a toy size on the CPU: what it says of a GPU only one can tell."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "scripts" / "check-gpu"


def test_a_part_leaves_its_figures_and_a_table(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    options = ["--device", "cpu", "--part", "graphs", "--out", str(tmp_path)]
    done = subprocess.run([sys.executable, SCRIPT, *options], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "report.json").read_text())
    assert {line["what"]: line["ok"] for line in found}["graph against eager, largest difference"] is True
    assert "| graphs |" in (tmp_path / "report.md").read_text()
