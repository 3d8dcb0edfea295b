"""Files of questions and outputs, and the score of a folder."""

import json

import pytest

from colaserve_eval.records import EvalError, Record, parse_output, read_records
from colaserve_eval.scoring import is_correct, score


def output(text: str, truth: str, **fields: object) -> Record:
    return Record(0, "prompt", truth, generate=text, **fields)


def test_each_published_task_has_its_rule_and_any_other_goes_by_its_fields():
    late = output(" shower room", "shower")
    assert is_correct("lambada", late)
    assert not is_correct("squad", late)
    lettered = output("(B)", "two", choices=("one", "two"))
    assert [is_correct(task, lettered) for task in ("race", "mmlu", "obqa", "siqa", "mine")] == [True] * 5
    assert not is_correct("hellaswag", lettered)
    assert not is_correct("story_cloze", lettered)
    assert is_correct("mine", output("Two!\n\nmore", "two"))
    assert not is_correct("squad", output("", "", error="down")), "an answer that failed is wrong"


def test_a_question_may_name_its_rule_but_not_that_of_a_published_task():
    goes_on = output(" Rome. Its currency", "Rome", rule="begins")
    assert is_correct("mine", goes_on)
    assert not is_correct("squad", goes_on)
    with pytest.raises(EvalError, match=r"rule: expected one of text, begins, .*got 'magic'"):
        is_correct("mine", output("a", "a", rule="magic"))


def outputs(n: int, correct: int) -> list[Record]:
    return [output("a", "a")] * correct + [output("b", "a")] * (n - correct)


def test_the_average_is_the_unweighted_mean_and_is_rounded_once():
    assert score({"a": outputs(3, 1), "b": outputs(300, 200), "c": outputs(7, 0)}) == {
        "tasks": {
            "a": {"n": 3, "correct": 1, "accuracy": 33.33},
            "b": {"n": 300, "correct": 200, "accuracy": 66.67},
            "c": {"n": 7, "correct": 0, "accuracy": 0.0},
        },
        "average": 33.33,
    }


def test_outputs_survive_writing_and_reading():
    first = Record("é1", "p\u2028q", "t", ("a", "b"), "begins", "gen\n\x00", "stop", {"blocks": 2})
    assert parse_output(json.loads(json.dumps(first.to_json()))) == first


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1]", "expected a JSON object, got list"),
        ('{"id": 1, "prompt": "p"}', "ground_truth: missing; the line has id, prompt"),
        ('{"id": 1, "prompt": 3, "ground_truth": "a"}', "prompt: expected a string, got 3"),
        ('{"id": true, "prompt": "p", "ground_truth": "a"}', "id: expected a number or a string, got True"),
        ('{"prompt": "p", "ground_truth": "a"}', "id: expected a number or a string, got None"),
        ('{"id": 1, "prompt": "p", "ground_truth": "a", "choices": "ab"}', "choices: expected a list of strings"),
        (
            json.dumps({"id": 1, "prompt": "p", "ground_truth": "a", "choices": ["a"] * 27}),
            "choices: 27 of them, at most 26 have a letter",
        ),
        ('{"id": 0, "prompt": "p", "ground_truth": "a"}', "id 0 occurs twice"),
    ],
)
def test_a_bad_line_is_named_with_its_field(tmp_path, line, message):
    path = tmp_path / "task.jsonl"
    path.write_text('{"id": 0, "prompt": "p", "ground_truth": "a"}\n\n' + line + "\n")
    with pytest.raises(EvalError) as error:
        read_records(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)
    assert "twice" in message or f"{path}:3:" in str(error.value)
    path.write_text("\n")
    with pytest.raises(EvalError, match="holds no lines"):
        read_records(path)


def write_outputs(folder, **tasks: list[tuple[str, str]]) -> None:
    for name, pairs in tasks.items():
        lines = [{"id": i, "prompt": "p", "generate": g, "ground_truth": t} for i, (g, t) in enumerate(pairs)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_score_prints_a_table_or_json_of_a_folder_with_outputs(colaserve_eval, tmp_path):
    assert "is no folder" in colaserve_eval("score", tmp_path / "nowhere").err
    assert "holds no .jsonl file" in colaserve_eval("score", tmp_path).err
    write_outputs(tmp_path, squad=[(" a.", "A"), ("b", "c")], lambada=[("x y", "x")])
    table = colaserve_eval("score", tmp_path)
    assert table.code == 0
    assert [line.split() for line in table.out.splitlines()] == [
        ["task", "n", "correct", "accuracy", "%"],
        ["lambada", "1", "1", "100.00"],
        ["squad", "2", "1", "50.00"],
        ["average", "75.00"],
    ]
    assert colaserve_eval("score", tmp_path, "--json").json == {
        "tasks": {
            "lambada": {"n": 1, "correct": 1, "accuracy": 100.0},
            "squad": {"n": 2, "correct": 1, "accuracy": 50.0},
        },
        "average": 75.0,
    }


def test_an_unfinished_run_is_scored_but_says_so(colaserve_eval, write_questions, tmp_path):
    out = tmp_path / "out"
    colaserve_eval("run", write_questions("a", "b", "c"), "--output", out)
    first = (out / "task.jsonl").read_text().splitlines(keepends=True)[0]
    (out / "task.jsonl").write_text(first)
    result = colaserve_eval("score", out, "--json")
    assert result.json["tasks"]["task"]["n"] == 1
    assert result.code == 1
    assert "2 are missing" in result.err
    (out / "task.jsonl").unlink()
    write_outputs(out, other=[("a", "a")])
    assert "3 are missing" in colaserve_eval("score", out).err
