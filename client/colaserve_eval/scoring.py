"""The published scoring rules: from a recorded output to right or wrong, one pure function a step.

Everything here works on text alone. Which task uses which rule is in `scores.py`.
"""

import re
from collections.abc import Sequence
from difflib import SequenceMatcher
from string import ascii_uppercase

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
    return _named_letter(text, ascii_uppercase[: len(choices)]) or _letter_by_content(text, choices)


def _named_letter(text: str, letters: str) -> str | None:
    bare = _BARE_LETTER.fullmatch(text)
    bracketed = _BRACKETED_LETTER.findall(text) if len(text) <= SHORT_TEXT else []
    for found in ([bare[1]] if bare else [], _NAMED_LETTER.findall(text), bracketed):
        if found and found[-1].upper() in letters:
            return str(found[-1].upper())
    return None


def _letter_by_content(text: str, choices: Sequence[str]) -> str | None:
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
