"""Templates make prompts of raw records."""

import json

import pytest

from colaserve_eval.records import EvalError
from colaserve_eval.templates import load_template, read_raw_questions, shipped_templates

RAW = {  # of each task: a record as the data set has it, the last question of the prompt made of it, its truth
    "mmlu": (
        {"question": "1 + 1?", "choices": ["1", "2", "3", "4"], "answer": 1},
        "Question: 1 + 1?\n(A) 1\n(B) 2\n(C) 3\n(D) 4\nAnswer:",
        "2",
    ),
    "obqa": (
        {"id": "7-1", "question_stem": "Ice is", "choices": {"text": ["hot", "cold"]}, "answerKey": "B"},
        "Question: Ice is\n(A) hot\n(B) cold\nAnswer:",
        "cold",
    ),
    "hellaswag": (
        {"ctx": "He runs. He", "endings": ["sits.", "falls."], "label": "1"},
        "Context: He runs. He\n(A) sits.\n(B) falls.\nAnswer:",
        "falls.",
    ),
    "race": (
        {"article": "It rained.", "question": "Was it dry?", "options": ["Yes", "No"], "answer": "B"},
        "Article: It rained. Was it dry?\nOptions:\n(A) Yes\n(B) No\nAnswer:",
        "No",
    ),
    "siqa": (
        {"question": "How?", "answerA": "so", "answerB": "well", "answerC": "badly", "label": "2"},
        "Question: How?\n(A) so\n(B) well\n(C) badly\nAnswer:",
        "well",
    ),
    "squad": (
        {"id": "56", "context": "It rained.", "question": "What?", "answers": {"text": ["rain", "it"]}},
        "Context: It rained.\nQuestion: What?\nAnswer:",
        "rain",
    ),
    "lambada": ({"text": "She opened the {old} door"}, "She opened the {old}", "door"),
    "story_cloze": (
        {
            **{f"InputSentence{number}": f"{letter}." for number, letter in enumerate("ABCD", 1)},
            "RandomFifthSentenceQuiz1": "E.",
            "RandomFifthSentenceQuiz2": "F.",
            "AnswerRightEnding": 2,
        },
        "Story: A. B. C. D.\n(A) E.\n(B) F.\nEnd:",
        "F.",
    ),
}


def test_a_template_is_shipped_for_each_published_task():
    assert shipped_templates() == sorted(RAW)


@pytest.mark.parametrize("task", sorted(RAW))
def test_a_shipped_template_reads_the_data_sets_own_records(task, tmp_path):
    record, form, truth = RAW[task]
    path, template = tmp_path / "raw.jsonl", load_template(task)
    path.write_text(json.dumps(record) + "\n")
    [question] = read_raw_questions(path, template)
    assert (question.ground_truth, question.id) == (truth, record.get("id", 0))
    *shots, last = question.prompt.split("\n\n")
    assert last == form
    for shot, example in zip(reversed(shots), reversed(template.examples), strict=False):
        assert shot.endswith(f": {example['ground_truth']}")


def template(tmp_path, text: str):
    path = tmp_path / "form.toml"
    path.write_text(text)
    return load_template(str(path))


def test_every_key_of_a_template_does_what_it_says(tmp_path):
    made = template(
        tmp_path,
        """
header = "Begin. "
prompt = "{{Q}} {word}\\n{options}\\n="
answer = "> {ground_truth}"
separator = " ## "
option = "{letter}. {choice}"
truth = "letter"
[fields]
word = ["a.b", "list.1"]
choices = "options"
ground_truth = "key"
id = "name"
[[examples]]
word = "w"
choices = ["c", "d"]
ground_truth = "d"
""",
    )
    record = {"a": {"b": 1}, "list": ["no", "{yes}"], "options": ["x", "y"], "key": "b", "name": "n"}
    question = made.question(record, 0)
    assert question.prompt == "Begin. {Q} w\nA. c\nB. d\n=> d ## {Q} 1 {yes}\nA. x\nB. y\n="
    assert (question.ground_truth, question.choices, question.id) == ("y", ("x", "y"), "n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompt = ", "Invalid value"),
        ("header = 'h'", "`prompt` is missing"),
        ("prompt = 3", "prompt: expected a string, got 3"),
        ("prompt = '{a}'\npormpt = ''", "unknown key 'pormpt'"),
        ("prompt = '{a}'\ntruth = 'word'", "truth: expected one of text, letter, index, number, last_word"),
        ("prompt = '{a.__class__}'", "{a.__class__} is no plain name"),
        ("prompt = '{a[0]}'", "{a[0]} is no plain name"),
        ("prompt = '{}'", "{} is no plain name"),
        ("prompt = '{a'", "expected '}' before end of string"),
        ("prompt = '{a}'\noption = '{0}'", "{0} is no plain name"),
        ("prompt = '{a}'\n[[examples]]\nb = 'b'\nground_truth = 'g'", "example 1: 'a' is missing"),
        ("prompt = '{a}'\n[[examples]]\na = 'b'", "example 1: 'ground_truth' is missing"),
        ("prompt = '{a}'\nfields = 'a'", "fields: expected a table, got 'a'"),
        ("prompt = '{a}'\nfields = {a = [1]}", "fields.a: expected a key or a list of keys, got [1]"),
        ("prompt = '{a}'\nexamples = ['a']", "examples: expected tables"),
        ("prompt = '{a}'\n[[examples]]\na = [1]\nground_truth = 'g'", "example 1: a: expected text"),
        ("prompt = '{a}'\n[[examples]]\na = 'a'\nchoices = 'ab'\nground_truth = 'g'", "example 1: choices: expected"),
        ("a = " + "[" * 5000, "is nested too deep"),
    ],
)
def test_a_bad_template_is_refused_naming_the_key(tmp_path, text, message):
    with pytest.raises(EvalError) as error:
        template(tmp_path, text)
    assert message in str(error.value)


def test_an_unknown_template_is_refused_naming_the_shipped_ones(colaserve_eval, tmp_path, write_questions):
    result = colaserve_eval("run", write_questions("a"), "--template", "nope", "--output", tmp_path / "out")
    assert "template nope: neither a readable UTF-8 file" in result.err
    assert "one of hellaswag, lambada, mmlu" in result.err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": 4}, "ground_truth: '4' as index names none of the 4 choices"),
        ({"answer": -1}, "ground_truth: '-1' as index names none"),
        ({"answer": "B"}, "invalid literal for int"),
        ({"choices": "ab"}, "choices: expected a list of texts at 'choices', got 'ab'"),
        ({"choices": []}, "choices: expected 1 to 26, got 0"),
        ({"question": None}, "question: expected text at 'question', got None"),
        ({"question": ...}, "the record has no 'question'; it has choices, answer"),
        ({"id": [1]}, "id: expected a number or a string, got [1]"),
    ],
)
def test_a_record_that_does_not_fit_is_refused_with_file_and_line(tmp_path, change, message):
    record = {key: value for key, value in {**RAW["mmlu"][0], **change}.items() if value is not ...}
    path = tmp_path / "raw.jsonl"
    path.write_text(json.dumps(RAW["mmlu"][0]) + "\n" + json.dumps(record) + "\n")
    with pytest.raises(EvalError) as error:
        read_raw_questions(path, load_template("mmlu"))
    assert f"{path}:2: " in str(error.value)
    assert message in str(error.value)


def test_run_asks_what_the_template_makes(client, colaserve_eval, tmp_path):
    path = tmp_path / "race.jsonl"
    path.write_text(json.dumps(RAW["race"][0]) + "\n")
    client.answer = lambda prompt, sampler: " (B)"
    result = colaserve_eval("run", path, "--template", "race", "--output", tmp_path / "out", "--json")
    assert result.json["tasks"] == {"race": {"n": 1, "correct": 1, "accuracy": 100.0}}
    assert client.prompts[0].startswith("Read the following article and answer the question.\n\nArticle: ")
    assert client.prompts[0].endswith(RAW["race"][1])
