"""Ask a checkpoint the demo's questions in process: per set, how many answers are right."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from colaserve_training.generate import Generator
from colaserve_training.paragraphs import read_paragraph
from colaserve_training.questions import Question, question_sets


@dataclass(frozen=True)
class Score:
    """One set's result; `wrong` holds (prompt, answer) of what was not right."""

    count: int
    correct: int
    wrong: tuple[tuple[str, str], ...]

    @property
    def percent(self) -> float:
        return 100 * self.correct / self.count


def score_sets(generator: Generator, names: Sequence[str] | None = None, every: int = 1) -> dict[str, Score]:
    """Answer the sets of `names` (default: all), every `every`-th question of each."""
    chosen = {name: items for name, items in question_sets().items() if names is None or name in names}
    return {name: _score(generator, name, items[::every]) for name, items in chosen.items()}


def _score(generator: Generator, name: str, items: Sequence[Question]) -> Score:
    prompts = [str(item["prompt"]) for item in items]
    answers = generator.texts(prompts)
    right = [_right(name, item, answer) for item, answer in zip(items, answers, strict=True)]
    wrong = tuple((p, a) for p, a, good in zip(prompts, answers, right, strict=True) if not good)
    return Score(len(items), sum(right), wrong)


def _right(name: str, item: Question, answer: str) -> bool:
    if name == "paragraphs":
        return read_paragraph(str(item["prompt"]) + answer).all_true
    truth = normalise(str(item["ground_truth"]))
    if name == "completions":
        return normalise(answer).startswith(truth)
    return normalise(answer.strip().split("\n")[0]) == truth


def normalise(text: str) -> str:
    """Lower case, word characters and single spaces only, as in the published scoring rules."""
    return " ".join(re.sub(r"[^\w\s]", "", text.lower()).split())
