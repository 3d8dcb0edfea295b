"""The recorded outputs of the released checkpoint score as published (data to test with, not part of the tree)."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from colaserve_client.cli.main import main
from colaserve_eval.records import parse_output, read_records
from colaserve_eval.templates import load_template

FOLDER = os.environ.get("COLASERVE_EVAL_DIR")
pytestmark = pytest.mark.skipif(not FOLDER, reason="COLASERVE_EVAL_DIR names no folder of recorded outputs")
TASKS = ("hellaswag", "lambada", "mmlu", "obqa", "race", "siqa", "squad", "story_cloze")


def test_all_eight_tasks_score_exactly_as_published(capsys):
    assert main(["eval", "score", str(FOLDER), "--json"]) == 0
    score = json.loads(capsys.readouterr().out)
    published = json.loads((Path(str(FOLDER)) / "accuracy.json").read_text())
    assert score["tasks"] == published
    assert score["average"] == round(sum(task["accuracy"] for task in published.values()) / len(published), 2)


@pytest.mark.parametrize("task", TASKS)
def test_the_shipped_template_writes_the_recorded_form(task):
    """Cut the last question out of each recorded prompt, fill the template with it, and get the same text."""
    template = replace(load_template(task), header="", examples=[], fields={}, truth="text")
    for question in read_records(Path(str(FOLDER)) / f"{task}.jsonl", parse_output):
        record = {"id": question.id, "choices": list(question.choices), "ground_truth": question.ground_truth}
        form = last_form(task, question.prompt)
        places = parse_form(task, form)
        assert template.question({**record, **places}, 0).prompt == form


def last_form(task: str, prompt: str) -> str:
    first = load_template(task).prompt.split("{")[0]
    return prompt[prompt.rindex(f"\n\n{first}") + 2 :] if first else prompt


def parse_form(task: str, form: str) -> dict[str, str]:
    if task == "lambada":
        return {"text": form}
    first, rest = form.split(": ", 1)
    body = rest.split("\nOptions:\n(A) ")[0].split("\n(A) ")[0]
    if task == "squad":
        context, question = rest.removesuffix("\nAnswer:").rsplit("\nQuestion: ", 1)
        return {"context": context, "question": question}
    if task == "race":
        article, _, question = body.rpartition(" ")
        return {"article": article, "question": question}
    return {first.lower(): body}
