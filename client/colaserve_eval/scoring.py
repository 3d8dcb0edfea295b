"""The published scoring rules: from a recorded output to right or wrong, one pure function a step; which rule judges
which task, and the score of all of them. The rules work on text alone.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from difflib import SequenceMatcher
from statistics import fmean
from string import ascii_uppercase
from typing import Any

from colaserve_eval.demo import HELD_OUT, TRAINED, reads_as_true
from colaserve_eval.records import EvalError, Record

SIMILAR_ENOUGH = 0.9  # the least similarity at which a text counts as a choice that it does not spell exactly
SHORT_TEXT = 40  # characters: up to this length a bracketed letter anywhere in a text names a choice

_LINK = r"(?:\s*(?:is\b|=|:|\uff1a))?\s*"  # an optional "is", "=", ":" or full-width colon
_FIRST_LINE = re.compile(r"\A(.*?\w.*?)\n", re.DOTALL)
_SEGMENT = re.compile(rf"\b(?:final\s+)?answer\b{_LINK}(\S.*)", re.IGNORECASE)
_BARE_LETTER = re.compile(r"\s*[(\[]?([A-Z])[)\]]?\.?\s*", re.IGNORECASE)
_NAMED_LETTER = re.compile(
    rf"\b(?:(?:final\s+)?answer|option|choice)\b{_LINK}[(\[]?\b([A-Z])\b[)\]]?(?=\s|\Z|[.,;:!?])", re.IGNORECASE
)
_BRACKETED_LETTER = re.compile(r"[(\[]([A-Z])[)\]]", re.IGNORECASE)
_LEAD_IN = re.compile(rf"\A\s*(?:the\s+)?(?:correct\s+)?(?:final\s+)?(?:answer|option|choice)\b{_LINK}", re.IGNORECASE)


def cut_answer(generated: str) -> str:
    """What a model wrote, up to the first newline that has a word character before it."""
    match = _FIRST_LINE.match(generated)
    return match[1] if match else generated


def normalise(text: str) -> str:
    """Lower case, without punctuation, words joined by one space."""
    return " ".join(re.sub(r"[^\w\s]", "", text.lower().strip()).split())


def similarity(a: str, b: str) -> float:
    """difflib's ratio of the normalised texts, in [0, 1]; two empty texts are alike (1)."""
    a, b = normalise(a), normalise(b)
    return SequenceMatcher(None, a, b).ratio() if a or b else 1.0


def same_text(answer: str, truth: str) -> bool:
    """The rule of tasks whose answer is a text: equal after normalisation."""
    return similarity(answer, truth) == 1.0


def same_first_word(answer: str, truth: str) -> bool:
    """The rule of word prediction: the first normalised words are equal, and there is one."""
    words, expected = normalise(answer).split(), normalise(truth).split()
    return bool(words and expected) and words[0] == expected[0]


def begins_with(answer: str, truth: str) -> bool:
    """For answers that go on after what was asked for: the words of the truth come first, and it has some."""
    words, expected = normalise(answer).split(), normalise(truth).split()
    return bool(expected) and words[: len(expected)] == expected


def same_choice(answer: str, truth: str, choices: Sequence[str]) -> bool:
    """The rule of tasks with choices: both sides name the same one, or are the same text."""
    letter = answer_letter(answer, choices)
    return (letter is not None and letter == choice_letter(truth, choices)) or same_text(answer, truth)


def answer_letter(answer: str, choices: Sequence[str]) -> str | None:
    """The letter of the choice that an answer names: looked for in its answer segment, then in all of it."""
    return choice_letter(answer_segment(answer), choices) or choice_letter(answer, choices)


def answer_segment(answer: str) -> str:
    """The text after the words "answer" or "final answer" in the last line that has them; else the whole answer."""
    for line in reversed(answer.splitlines()):
        if match := _SEGMENT.search(line):
            return match[1]
    return answer


def choice_letter(text: str, choices: Sequence[str]) -> str | None:
    """The letter ("A" for the first choice) that a text names, by letter or by content; None when it names none."""
    letters, bare = ascii_uppercase[: len(choices)], _BARE_LETTER.fullmatch(text)
    bracketed = _BRACKETED_LETTER.findall(text) if len(text) <= SHORT_TEXT else []
    for found in ([bare[1]] if bare else [], _NAMED_LETTER.findall(text), bracketed):
        if found and found[-1].upper() in letters:
            return str(found[-1].upper())
    whole, rest = normalise(text), normalise(_LEAD_IN.sub("", text, count=1))
    options = [normalise(choice) for choice in choices]
    for candidate in (whole, rest):
        if candidate in options:
            return ascii_uppercase[options.index(candidate)]
    contained = [index for index, option in enumerate(options) if option and option in rest]
    if len(contained) == 1:
        return ascii_uppercase[contained[0]]
    ratios = [similarity(rest, option) for option in options]
    best = max(range(len(ratios)), key=ratios.__getitem__, default=None)
    return ascii_uppercase[best] if best is not None and ratios[best] >= SIMILAR_ENOUGH else None


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
