"""Read a generated paragraph about a country sentence by sentence and say which sentences are true.

Pure Python, no dependency: a client can check what a server wrote. A sentence is read when it has one of the forms of
`sentences.py` with names from the table; a sentence that cannot be read counts as false, and so does a cut one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import cache

from colaserve_training.facts import Country, countries
from colaserve_training.sentences import ALONE, FOLLOW, LEAD

FIELDS = ("capital", "continent", "region", "currency", "language", "demonym")


class Verdict(StrEnum):
    TRUE = "true"
    FALSE = "false"
    UNREADABLE = "unreadable"


@dataclass(frozen=True)
class Sentence:
    """One sentence as it was written."""

    text: str
    verdict: Verdict


@dataclass(frozen=True)
class Reading:
    """A paragraph, read."""

    sentences: tuple[Sentence, ...]

    @property
    def all_true(self) -> bool:
        """Whether there is a sentence, and every one was read and is true."""
        return bool(self.sentences) and all(item.verdict is Verdict.TRUE for item in self.sentences)


def read_paragraph(text: str) -> Reading:
    """Judge every sentence of `text`: prompt and continuation together, without special tokens."""
    return Reading(tuple(_sentences(text.strip())))


def _sentences(text: str) -> Iterator[Sentence]:
    subject, at = None, 0
    while at < len(text):
        match = _pattern().match(text, at)
        if match is None:
            end = _after_stop(text, at)
            yield Sentence(text[at:end].strip(), Verdict.UNREADABLE)
        else:
            end = match.end()
            subject, verdict = _judge(match, subject)
            yield Sentence(match.group().strip(), verdict)
        at = end


def _after_stop(text: str, at: int) -> int:
    found = re.compile(r"\.\s+").search(text, at)
    return found.end() if found else len(text)


def _judge(match: re.Match[str], subject: Country | None) -> tuple[Country | None, Verdict]:
    """The subject from here on (None: still unknown) and whether the sentence is true."""
    said = {name.rstrip("0123456789_"): value for name, value in match.groupdict().items() if value is not None}
    about = _by_name()[said["name"]] if "name" in said else subject
    if about is None:
        return subject, Verdict.UNREADABLE  # "Its ..." before any country was named
    true = all(_says(about, field) == said[field].rstrip(".") for field in FIELDS if field in said)
    return about if "lead" in said else subject, Verdict.TRUE if true else Verdict.FALSE


def _says(country: Country, name: str) -> str:
    text: str = getattr(country, name)
    return text.rstrip(".")


@cache
def _by_name() -> dict[str, Country]:
    return {name: country for country in countries() for name in (country.full_name, country.title)}


@cache
def _pattern() -> re.Pattern[str]:
    """All forms of sentences as one expression; groups are named kind_number and field_number."""
    forms = [("lead", LEAD), *(("follow", text) for text in FOLLOW.values())]
    forms += [("alone", text) for texts in ALONE.values() for text in texts]
    return re.compile("|".join(_form(index, kind, text) for index, (kind, text) in enumerate(forms)))


def _form(index: int, kind: str, template: str) -> str:
    """`(?P<lead_0>...)`: the template with an alternative of known values for each placeholder."""
    parts = re.split(r"\{(\w+)\}", template.removesuffix("."))
    out = [re.escape(parts[0])]
    for field, plain in zip(parts[1::2], parts[2::2], strict=True):
        name = "name" if field in ("The", "the") else field
        out += [f"(?P<{name}_{index}>{_values(name)})", re.escape(plain)]
    return rf"(?P<{kind}_{index}>{''.join(out)}\.)(?=\s|$)\s*"


@cache
def _values(name: str) -> str:
    names = set(_by_name()) if name == "name" else {str(getattr(country, name)) for country in countries()}
    names |= {value.rstrip(".") for value in names}  # "Washington, D.C." ends a sentence with its own full stop
    return "|".join(re.escape(value) for value in sorted(names, key=lambda value: (-len(value), value)))
