"""Which rule judges which task, and the score of all of them."""

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from colaserve_eval.demo import HELD_OUT, TRAINED, reads_as_true
from colaserve_eval.records import EvalError, Record
from colaserve_eval.scoring import begins_with, cut_answer, same_choice, same_first_word, same_text

RULES: Mapping[str, Callable[[Record, str], bool]] = {  # of a record and its answer, cut
    "text": lambda record, answer: same_text(answer, record.ground_truth),
    "begins": lambda record, answer: begins_with(answer, record.ground_truth),
    "first_word": lambda record, answer: same_first_word(answer, record.ground_truth),
    "choice": lambda record, answer: same_choice(answer, record.ground_truth, record.choices),
    "true_sentences": lambda record, answer: reads_as_true(record.prompt + record.generate),
}
PUBLISHED_RULES: Mapping[str, str] = {
    "lambada": "first_word",
    **dict.fromkeys(("hellaswag", "squad", "story_cloze"), "text"),
    **dict.fromkeys(("mmlu", "obqa", "race", "siqa"), "choice"),
}
GROUPS = {"trained phrasings": TRAINED, "held-out phrasings": HELD_OUT}  # of the demo's sets, by their names' ends


def is_correct(task: str, output: Record) -> bool:
    """Whether an output answers its question; one that failed does not.

    Judged by the published rule of a published task; else by the question's own; else by choice if it has choices, or
    by text. Raises EvalError when the question names a rule that does not exist.
    """
    if output.error is not None:
        return False
    rule = PUBLISHED_RULES.get(task) or output.rule or ("choice" if output.choices else "text")
    if rule not in RULES:
        raise EvalError(f"task {task}, id {output.id!r}: rule: expected one of {', '.join(RULES)}, got {rule!r}")
    return RULES[rule](output, cut_answer(output.generate))


def score(tasks: Mapping[str, Sequence[Record]]) -> dict[str, Any]:
    """{"tasks": {name: {n, correct, accuracy}}, "average"}, per cent with two decimals.

    The average is the unweighted mean of the tasks. "groups", where there are some: the same of the demo's sets with
    phrasings of training and of those with others.
    """
    figures, accuracies = {}, {}
    for name, outputs in tasks.items():
        correct = sum(is_correct(name, output) for output in outputs)
        accuracies[name] = 100 * correct / len(outputs)
        figures[name] = {"n": len(outputs), "correct": correct, "accuracy": round(accuracies[name], 2)}
    groups = {
        group: round(fmean(members), 2)
        for group, ending in GROUPS.items()
        if (members := [accuracy for name, accuracy in accuracies.items() if name.endswith(ending)])
    }
    return {"tasks": figures, "average": round(fmean(accuracies.values()), 2), **({"groups": groups} if groups else {})}


Table = tuple[list[str], list[list[str]]]  # header, rows


def score_table(figures: Mapping[str, Any]) -> Table:
    """A row a task, one a group and one for the average."""
    rows = [
        [name, str(task["n"]), str(task["correct"]), f"{task['accuracy']:.2f}"]
        for name, task in figures["tasks"].items()
    ]
    means = {**figures.get("groups", {}), "average": figures["average"]}
    return ["task", "n", "correct", "accuracy %"], rows + [
        [name, "", "", f"{mean:.2f}"] for name, mean in means.items()
    ]
