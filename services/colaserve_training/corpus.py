"""The demo's corpus, drawn on the fly: questions in many phrasings, sums, and sentences about countries.

`data/facts.csv` has the facts and `data/corpus.json` the phrasings, sentences and weights; docs/training.md says how
they came about. Nothing is random but the `random.Random` passed in, so that an example is a function of a seed.
"""

import csv
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from colaserve_client.reading import read_json, read_text

Country = dict[str, str]  # a row of facts.csv, and what templates call the country: {the}, {The} and {bare}

_DATA = Path(__file__).parent / "data"
_SUMS = range(13)  # both sides of an addition
_KEPT = re.compile(  # words that carry the intent of a question
    r"[{}]|capital|continent|language|speak|spoken|currency|money|pay|region|part|where|demonym|people|person|country"
    r"|plus|sum|add|calculate|[+=?]$",
    re.IGNORECASE,
)


@cache
def tables() -> dict[str, Any]:
    """`corpus.json`: question frames and kinds with their weights, sentences, phrasings and disturbing words.

    `held_out_phrasings` and `unseen` (ISO codes by the kind of fact) are here only to keep them out of training.
    """
    return read_json(_DATA / "corpus.json")


@cache
def countries() -> tuple[Country, ...]:
    """All countries, in the order of their names."""
    rows = csv.DictReader(read_text(_DATA / "facts.csv").splitlines())
    return tuple(_called(row, f"{row['article']} {row['name']}".strip()) for row in rows)


def _called(country: Country, name: str) -> Country:
    return country | {"the": name, "The": name[:1].upper() + name[1:], "bare": name.removeprefix("the ")}


@cache
def _trained(kind: str) -> tuple[Country, ...]:
    unseen = tables()["unseen"].get(kind, ())
    return tuple(country for country in countries() if country["iso"] not in unseen)


@dataclass(frozen=True)
class Example:
    """A prompt and what should follow it; an empty prompt makes it plain text, trained from its first token."""

    prompt: str
    response: str  # without the end token
    kind: str


@dataclass(frozen=True)
class Corpus:
    """Draws training examples; the same `rng` state gives the same example.

    The fields are probabilities of the changes by which questions are varied.
    """

    nonsense: float = 0.0  # one to three words that do not exist, so that the model learns to ignore unknown words
    opener: float = 0.12
    words: float = 0.4  # one or two filler words inserted, replaced or deleted
    drop_article: float = 0.15
    lower: float = 0.04  # the question in lower case, names left as they are
    no_mark: float = 0.05  # no question mark or full stop at the end
    alias: float = 0.15  # the country under another of its names

    def draw(self, rng: random.Random) -> Example:
        """One example of a kind drawn by weight."""
        weights = tables()["weights"]
        kind = rng.choices(list(weights), list(weights.values()))[0]
        if kind in ("paragraph", "sentence"):
            return Example("", _paragraph(rng) if kind == "paragraph" else _sentence(rng), kind)
        return self._question(kind, rng)

    def _question(self, kind: str, rng: random.Random) -> Example:
        while normalised(template := self._disturbed(rng.choice(tables()["phrasings"][kind]), rng)) in _held_out():
            pass
        if kind == "addition":
            a, b = rng.choice(_SUMS), rng.choice(_SUMS)
            question, answer = template.format(a=a, b=b), str(a + b)
        else:
            called = country = rng.choice(_trained(kind))
            if country["aliases"] and rng.random() < self.alias:
                called = _called(country, rng.choice(country["aliases"].split(";")))
            question = template.format_map(called)
            answer = country["name" if kind == "reverse" else kind]
        frames = tables()["frames"]
        frame = rng.choices(list(frames), list(frames.values()))[0]
        return Example(frame.format(q=question), " " + answer, kind)

    def _disturbed(self, template: str, rng: random.Random) -> str:
        """A noisy variant of a phrasing; placeholders and the words that carry the intent stay."""
        words = template.split()
        if rng.random() < self.words:
            for _ in range(rng.choice((1, 1, 2))):
                _disturb_word(words, rng)
        if self.nonsense and rng.random() < self.nonsense:
            for _ in range(rng.choice((1, 1, 2, 3))):
                _disturb_word(words, rng, _nonsense_word(rng))
        if rng.random() < self.drop_article:
            words = [word.replace("{the}", "{bare}") for word in words]
        text = " ".join(words)
        if rng.random() < self.no_mark:
            text = text.rstrip("?.")
        if rng.random() < self.lower and "{The}" not in text:
            text = text.lower().replace("{the}", "{bare}")
        if rng.random() < self.opener:
            text = f"{_drawn('openers', rng)} {text[:1].lower() + text[1:]}"
        return text


def normalised(template: str) -> str:
    """Letters, digits and placeholders only: two phrasings that differ in case or punctuation are the same."""
    words = re.sub(r"\{(the|The|bare)\}", " {x} ", template).lower()
    return " ".join(re.findall(r"[\w{}]+", words))


@cache
def _held_out() -> frozenset[str]:
    return frozenset(normalised(text) for texts in tables()["held_out_phrasings"].values() for text in texts)


def _disturb_word(words: list[str], rng: random.Random, other: str = "") -> None:
    """Insert, replace or delete one word; `other` is what comes in, by default a filler."""
    action, at = rng.choice(("insert", "replace", "delete")), rng.randrange(len(words))
    if action == "insert":
        words.insert(at, other or _drawn("fillers", rng))
    elif _KEPT.search(words[at]) is None:
        words[at : at + 1] = [other or _drawn("fillers", rng)] if action == "replace" else []


def _nonsense_word(rng: random.Random) -> str:
    """One to three made-up syllables, sometimes capitalised, sometimes with a comma or colon."""
    parts = ("onsets", "vowels", "codas")
    word = "".join(_drawn(part, rng) for _ in range(rng.choice((1, 1, 2, 2, 3))) for part in parts)
    return (word.capitalize() if rng.random() < 0.4 else word) + rng.choice(("", "", "", "", ",", ":"))


def _drawn(kind: str, rng: random.Random) -> str:
    word: str = rng.choice(tables()["disturbing"][kind])
    return word


def _paragraph(rng: random.Random) -> str:
    """A lead sentence and what follows in one fixed order; some name the region or the demonym, some stop early."""
    country = rng.choice(countries())
    order = ["capital", "currency", "language"]
    if rng.random() < 0.2:
        order.insert(0, "region")
    if rng.random() < 0.2 and country["iso"] not in tables()["unseen"]["demonym"]:
        order.append("demonym")
    if rng.random() < 0.15:
        order = order[: rng.randrange(len(order))]
    return " ".join(fill(text, country) for text in (tables()["lead"], *(tables()["follow"][kind] for kind in order)))


def _sentence(rng: random.Random) -> str:
    """One sentence that names its country itself."""
    alone = tables()["alone"]
    kind = rng.choice(list(alone))
    return fill(rng.choice(alone[kind]), rng.choice(_trained(kind)))


def fill(template: str, country: Country) -> str:
    """The sentence about a country, with one full stop even after "Washington, D.C."."""
    text = template.format_map(country)
    return text[:-1] if text.endswith("..") else text


def tokenizer_text(seed: int, examples: int = 20_000, repeats: int = 30) -> Iterator[str]:
    """What the tokenizer is trained on: drawn examples, and all names and answers many times over."""
    corpus, rng = Corpus(), random.Random(f"tokenizer:{seed}")
    for _ in range(examples):
        example = corpus.draw(rng)
        yield example.prompt + example.response
    texts = []  # every name and answer once, as it stands in a sentence and at the beginning of one
    for country in countries():
        fields = ("name", "capital", "continent", "region", "currency", "language", "demonym")
        aliases = filter(None, country["aliases"].split(";"))
        texts += [f" {text}" for text in (*(country[field] for field in fields), *aliases)]
        texts += [country["name"], f"{country['name']}'s"]
    texts += [f" {number}" for number in range(max(_SUMS) * 2 + 1)]
    for text in texts:
        yield from [text] * repeats
