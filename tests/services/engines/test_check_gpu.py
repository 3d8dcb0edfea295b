"""scripts/check-gpu runs, at a toy size on the CPU: what it says of a GPU only one can tell."""

import json
import os
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


PROGRAM = """
import json, sys
from gpu_setup import predicted, tried
def fails(number): raise ValueError("one line\\nanother")
tried(fails, 7)
print(json.dumps([(k, *(predicted(k, context) for context in (64, 512, 2048))) for k in (1, 2, 4, 8, 16, 32, 64, 128)]))
"""


def test_what_fails_is_a_line_and_the_predictions_are_those_of_the_docs(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-c", PROGRAM, "graphs", "cpu", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=300)
    line = json.loads((tmp_path / "lines.jsonl").read_text())
    assert (line["part"], line["what"], line["ok"]) == ("graphs", "fails 7: ValueError: one line", False)
    rows = []
    for k, *found in json.loads(done.stdout.splitlines()[-1]):
        figures = (f"{1e3 * seconds:.2f} ms, {tokens:,.0f}" for tokens, seconds, _, _ in found)
        rows.append(f"| {k} | {found[1][2]:,} | {' | '.join(figures)} | {k / found[1][3]:,.0f} |")
    docs = (SCRIPT.parents[1] / "docs" / "performance.md").read_text()
    assert "### On a GPU: predicted, not run on one" in docs
    assert "\n".join(rows) in docs
