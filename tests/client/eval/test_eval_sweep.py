"""`eval sweep`, `eval report`: accuracy against cost, and the page about it."""

import json
import sys

import pytest

from colaserve_client.settings import Sampler
from colaserve_eval.report import grid, passes_per_block

PNG = b"\x89PNG\r\n\x1a\n"


def test_passes_count_evaluations_times_guidance_rows():
    settings = [(7, 16, "euler"), (1, 16, "euler"), (0, 16, "euler"), (7, 16, "ab2"), (7, 16, "heun"), (1, 1, "heun")]
    found = [passes_per_block(Sampler(steps, scale, solver)) for scale, steps, solver in settings]
    assert found == [32, 16, 32, 32, 62, 1]


def test_a_grid_holds_every_combination_once_in_order(tmp_path):
    found = grid(tmp_path, [1, 2, 1.0], [4], ["heun", "euler"])
    assert [path.name for path in found] == ["g1-s4-heun", "g1-s4-euler", "g2-s4-heun", "g2-s4-euler"]


@pytest.fixture
def sweep(client, colaserve_eval, write_questions, tmp_path):
    """Sweeps four questions of which as many are answered rightly as there are steps, into tmp_path/sweep."""
    client.answer = lambda prompt, sampler: prompt if prompt in "0123"[: sampler.steps] else "wrong"
    file = write_questions("0", "1", "2", "3")

    def run(*more: object):
        arguments = ["--guidance", "1,2.5", "--steps", "1,2", "--solver", "euler,heun", "--output", tmp_path / "sweep"]
        return colaserve_eval("sweep", file, *arguments, *more)

    return run


def test_a_sweep_gives_accuracy_and_cost_of_every_setting(sweep, client, tmp_path):
    result = sweep()
    assert result.code == 0, result.err
    points = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["points"]
    assert len(points) == 8
    assert len(client.asked) == 32
    last = points[-1]
    assert last.pop("tokens_per_second") > 0
    assert last == {
        "guidance_scale": 2.5,
        "steps": 2,
        "solver": "heun",
        "passes_per_block": 6,
        "passes_per_answer": 12.0,
        "tasks": {"task": {"n": 4, "correct": 2, "accuracy": 50.0}},
        "average": 50.0,
    }
    assert [line.split()[:5] for line in result.out.splitlines()[1:3]] == [
        ["1", "1", "euler", "1", "2.0"],
        ["1", "1", "heun", "1", "2.0"],
    ]
    assert (tmp_path / "sweep" / "sweep.png").read_bytes().startswith(PNG)


def test_a_sweep_continues_where_it_was_left(sweep, client, tmp_path):
    first = sweep("--json", "--no-plots").json["points"]
    (tmp_path / "sweep" / "g1-s2-euler" / "task.jsonl").unlink()
    client.asked.clear()
    again = sweep("--json", "--no-plots").json["points"]
    assert [settings["sampler"].steps for _, settings in client.asked] == [2] * 4
    tell = [{**point, "tokens_per_second": 0} for point in again]
    assert tell == [{**point, "tokens_per_second": 0} for point in first]


@pytest.mark.parametrize("option", [("--guidance", "1,x"), ("--steps", ""), ("--solver", "euler,rk4")])
def test_a_bad_list_is_refused_naming_the_option(sweep, client, option):
    result = sweep(*option)
    assert result.code == 2
    assert option[0] in result.err
    assert client.asked == []


@pytest.fixture
def without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # importing it raises ImportError


@pytest.mark.usefixtures("without_matplotlib")
def test_without_matplotlib_plots_are_refused_before_anything_is_asked(sweep, client, colaserve_eval, tmp_path):
    result = sweep()
    assert "plots need matplotlib: pip install " in result.err
    assert client.asked == []
    assert sweep("--no-plots").code == 0
    page = tmp_path / "page.md"
    assert "plots need matplotlib" in colaserve_eval("report", tmp_path / "sweep").err
    assert colaserve_eval("report", tmp_path / "sweep", "--no-plots", "--output", page).code == 0
    assert "![" not in page.read_text()


def test_a_report_shows_scores_settings_wrong_answers_and_the_sweep(sweep, colaserve_eval, write_questions, tmp_path):
    assert "holds neither outputs nor sweep.json nor vae.json" in colaserve_eval("report", tmp_path / "none").err
    out = tmp_path / "sweep"
    sweep()
    colaserve_eval("run", write_questions("1", "9|`9", name="other"), "--output", out, "--steps", 4)
    (out / "vae.json").write_text('{"token_accuracy": 99.5}')
    result = colaserve_eval("report", out)
    assert result.code == 0, result.err
    page = (out / "report.md").read_text()
    assert page.startswith("# Evaluation of tiny\n")
    assert "| other | 2 | 1 | 50.00 |" in page
    assert '| sampler | {"steps": 4,' in page
    assert "| `1` | `…9\\|'9` | `wrong` | `9\\|'9` |" in page
    assert "## Wrong answers: other" in page
    assert "| `0` |" not in page
    assert "| 2.5 | 2 | heun | 6 |" in page
    assert "| token_accuracy | 99.5 |" in page
    for name in ("score.png", "sweep.png"):
        assert f"]({name})" in page
        assert (out / name).read_bytes().startswith(PNG)
