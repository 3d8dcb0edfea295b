"""The demo's own question sets are found without importing the services, and its paragraphs are read by its checker."""

import subprocess
import sys

import pytest

from colaserve_eval.demo import demo_tasks
from colaserve_eval.records import EvalError, Record
from colaserve_eval.scoring import is_correct

AMERICA = "The United States is a country in North America. Its capital is Washington, D.C."


def test_the_shipped_sets_hold_trained_and_held_out_phrasings_and_unseen_facts():
    names = {task.name: task for task in demo_tasks()}
    assert {"capital_trained_phrasings", "capital_held_out_phrasings", "unseen_facts", "paragraphs"} <= names.keys()
    assert names["completions"].questions[0].rule == "begins"
    assert names["paragraphs"].questions[0].rule == "true_sentences"
    assert names["capital_trained_phrasings"].questions[0].rule is None


def test_asking_them_needs_neither_torch_nor_the_services_package():
    code = (
        "import sys; from colaserve_eval.commands import evaluate; from colaserve_eval.demo import *; "
        "demo_tasks(); print([name for name in ('torch', 'tokenizers', 'colaserve_services', 'matplotlib') "
        "if name in sys.modules]); reads_as_true('x'); print('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.splitlines() == ["[]", "False"]


@pytest.mark.parametrize(
    ("text", "true"),
    [
        ("France is a country in Europe.", True),
        ("France is a country in Europe. Its capital is Paris.", True),
        (f"{AMERICA} Its demonym is American.", True),
        (f"{AMERICA} Its demonym is Cuban.", False),
        ("Grenada is a country in North America. Its capital is St. George's.", True),
        ("France is a country in Europe. Its capital is Rome.", False),
        ("France is a country in Europe. Its capital is Paris. Its", False),
        ("France is a country in Europe. Its capital is Pariss.", False),
        ("France is a country in Europe. It is nice. Its capital is Paris.", False),
        ("Narnia is a country in Europe.", False),
        ("Its capital is Paris.", False),
        ("France is a country in Asia.", False),
        ("", False),
    ],
)
def test_a_paragraph_is_right_when_every_sentence_of_prompt_and_answer_is_true(text, true):
    paragraph = Record(0, text[:10], "Europe", rule="true_sentences", generate=text[10:])
    assert is_correct("paragraphs", paragraph) is true


def test_missing_services_and_missing_sets_are_named():
    with pytest.raises(EvalError, match="question sets are missing"):
        demo_tasks("colaserve_client")
    with pytest.raises(EvalError, match="not_there, which is not installed here; pass question files"):
        demo_tasks("not_there")


def test_run_demo_reports_the_groups_apart(client, colaserve_eval, tmp_path):
    client.answer = lambda prompt, sampler: " Kabul" if "capital" in prompt else "no"
    arguments = ["--only", "capital_*", "--only", "unseen*", "--limit", 4]
    result = colaserve_eval("run", "--demo", *arguments, "--output", tmp_path / "out", "--json")
    score = result.json
    assert score["groups"].keys() == {"trained phrasings", "held-out phrasings"}
    assert score["groups"]["trained phrasings"] == 25.0
    assert [task["n"] for task in score["tasks"].values()] == [4, 4, 4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--demo", __file__], "give question files"),
        ([], "give question files"),
        (["--demo", "--template", "race"], "give question files"),
        (["--demo", "--only", "nope*"], "--only nope*: fits none of addition_held_out_phrasings"),
    ],
)
def test_contradictory_choices_of_questions_are_refused(client, colaserve_eval, tmp_path, arguments, message):
    result = colaserve_eval("run", *arguments, "--output", tmp_path / "out")
    assert result.code in (1, 2)
    assert message in result.err
    assert client.asked == []


def test_a_limit_takes_questions_evenly_spread_and_two_files_of_one_name_are_refused(
    client, colaserve_eval, write_questions, tmp_path
):
    file = write_questions(*map(str, range(10)))
    colaserve_eval("run", file, "--limit", 4, "--output", tmp_path / "out")
    assert sorted(client.prompts) == ["0", "2", "5", "7"]
    result = colaserve_eval("run", file, file, "--output", tmp_path / "out")
    assert "a file named task is given already" in result.err
