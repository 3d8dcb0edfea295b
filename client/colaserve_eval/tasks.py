"""Which rule judges which task, and the score of a folder of outputs."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from colaserve_eval.demo import HELD_OUT, TRAINED, reads_as_true
from colaserve_eval.records import EvalError, Output, Question, read_outputs
from colaserve_eval.scoring import begins_with, cut_answer, same_choice, same_first_word, same_text

Rule = Callable[[Output], bool]  # right or wrong


RULES: Mapping[str, Rule] = {
    "text": lambda output: same_text(_answer(output), output.question.ground_truth),
    "begins": lambda output: begins_with(_answer(output), output.question.ground_truth),
    "first_word": lambda output: same_first_word(_answer(output), output.question.ground_truth),
    "choice": lambda output: same_choice(_answer(output), output.question.ground_truth, output.question.choices),
    "true_sentences": lambda output: reads_as_true(output.question.prompt + output.generate),
}
PUBLISHED_RULES: Mapping[str, str] = {
    "lambada": "first_word",
    "hellaswag": "text",
    "squad": "text",
    "story_cloze": "text",
    "mmlu": "choice",
    "obqa": "choice",
    "race": "choice",
    "siqa": "choice",
}
GROUPS = {"trained phrasings": TRAINED, "held-out phrasings": HELD_OUT}  # of the demo's sets, by their names' ends


@dataclass(frozen=True)
class TaskScore:
    """How a task went."""

    n: int
    correct: int
    failed: int = 0  # outputs that hold an error instead of a text; they are among the n and not correct

    @property
    def accuracy(self) -> float:
        """Per cent."""
        return 100 * self.correct / self.n

    def to_json(self) -> dict[str, Any]:
        """{n, correct, accuracy}, per cent with two decimals."""
        return {"n": self.n, "correct": self.correct, "accuracy": round(self.accuracy, 2)}


@dataclass(frozen=True)
class Score:
    """How all tasks of a folder went."""

    tasks: Mapping[str, TaskScore]

    @property
    def average(self) -> float:
        """Unweighted mean of the tasks' accuracies, per cent."""
        return sum(task.accuracy for task in self.tasks.values()) / len(self.tasks)

    @property
    def groups(self) -> dict[str, float]:
        """Of the demo's sets: the unweighted mean of those with phrasings of training and of those with others."""
        members = {
            name: [task.accuracy for key, task in self.tasks.items() if key.endswith(ending)]
            for name, ending in GROUPS.items()
        }
        return {name: sum(accuracies) / len(accuracies) for name, accuracies in members.items() if accuracies}

    @property
    def failed(self) -> int:
        """Outputs of all tasks that hold an error."""
        return sum(task.failed for task in self.tasks.values())

    def to_json(self) -> dict[str, Any]:
        """{"tasks": {name: {n, correct, accuracy}}, "average"}, per cent with two decimals; "groups" if it has some."""
        groups = {name: round(accuracy, 2) for name, accuracy in self.groups.items()}
        tasks = {name: task.to_json() for name, task in self.tasks.items()}
        return {"tasks": tasks, "average": round(self.average, 2), **({"groups": groups} if groups else {})}


def rule_of(task: str, question: Question) -> Rule:
    """The published rule of a published task; else the question's own; else by choice if it has choices, or by text.

    Raises EvalError when the question names a rule that does not exist.
    """
    default = "choice" if question.choices else "text"
    name = PUBLISHED_RULES.get(task) or question.rule or default
    if name not in RULES:
        raise EvalError(f"task {task}, id {question.id!r}: rule: expected one of {', '.join(RULES)}, got {name!r}")
    return RULES[name]


def is_correct(task: str, output: Output) -> bool:
    """Whether an output answers its question."""
    if output.error is not None:
        return False
    return rule_of(task, output.question)(output)


def _answer(output: Output) -> str:
    return cut_answer(output.generate)


def score_task(task: str, outputs: Iterable[Output]) -> TaskScore:
    """The score of one task's outputs, at least one."""
    outputs = list(outputs)
    return TaskScore(
        n=len(outputs),
        correct=sum(is_correct(task, output) for output in outputs),
        failed=sum(output.error is not None for output in outputs),
    )


def score_folder(folder: Path) -> Score:
    """The score of every `<task>.jsonl` of a folder, by name. Raises EvalError when there is none."""
    if not folder.is_dir():
        raise EvalError(f"{folder}: is no folder; expected one with a <task>.jsonl for each task")
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise EvalError(f"{folder}: holds no .jsonl file; `eval run --output {folder}` writes one for each task")
    return Score({file.stem: score_task(file.stem, read_outputs(file)) for file in files})
