"""The demo's corpus, generated on the fly: questions in many phrasings, and sentences about countries.

Nothing is random but the `random.Random` passed in, so that an example is a function of a seed. The held-out
phrasings (`data/phrasings_held_out.json`) are read here only to keep them out: `Corpus` refuses to produce one.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files

from colaserve_training.facts import Country, countries
from colaserve_training.sentences import ALONE, FOLLOW, LEAD, fill

END = "<|endoftext|>"
FRAMES = {"Question: {q} Answer:": 6, "Question: {q}\nAnswer:": 2, "User: {q}\nAssistant:": 2}
SUMS = range(13)  # both sides of a trained addition
UNSEEN_SUMS = range(13, 16)  # left sides that are never trained
ANSWER_FIELD = {"capital": "capital", "continent": "continent", "language": "language", "currency": "currency"}
ANSWER_FIELD |= {"region": "region", "demonym": "demonym", "reverse": "name"}

KEEP = re.compile(
    r"[{}]|capital|continent|language|speak|spoken|currency|money|pay|region|part|where|demonym|people|person|country"
    r"|plus|sum|add|calculate|[+=?]$",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Example:
    """A prompt and what should follow it; an empty prompt makes it plain text, trained from its first token."""

    prompt: str
    response: str  # without the end token
    kind: str


@dataclass(frozen=True)
class Mix:
    """How often each kind is drawn (relative weights), and how questions are disturbed (probabilities)."""

    weights: Mapping[str, float] = field(
        default_factory=lambda: {
            "capital": 24, "reverse": 6, "currency": 11, "continent": 9, "language": 9, "region": 6, "demonym": 6,
            "addition": 7, "paragraph": 16, "sentence": 6,
        }
    )  # fmt: skip
    nonsense: float = 0.0  # one to three words that do not exist, so that unknown words are passed over
    opener: float = 0.12
    words: float = 0.4  # one or two filler words inserted, replaced or deleted
    drop_article: float = 0.15
    lower: float = 0.04  # the question in lower case, names left as they are
    no_mark: float = 0.05  # no question mark or full stop at the end
    alias: float = 0.15


@cache
def phrasings(held_out: bool = False) -> dict[str, tuple[str, ...]]:
    """Question templates by kind: those of training, or those that training never sees."""
    return _table("phrasings_held_out" if held_out else "phrasings")


@cache
def _noise() -> dict[str, tuple[str, ...]]:
    """`openers` before a question, `fillers` between its words."""
    return _table("noise")


def _table(name: str) -> dict[str, tuple[str, ...]]:
    table = json.loads(files(__package__).joinpath(f"data/{name}.json").read_text(encoding="utf-8"))
    return {kind: tuple(texts) for kind, texts in table.items()}


@cache
def unseen_facts() -> dict[str, frozenset[str]]:
    """Countries (ISO codes) whose demonym or reverse capital is in no training text, drawn once by a fixed seed."""
    codes = [country.iso for country in countries()]
    rng = random.Random("held-out facts")
    return {kind: frozenset(rng.sample(codes, 20)) for kind in ("demonym", "reverse")}


def normalised(template: str) -> str:
    """Letters, digits and placeholders only: two phrasings that differ in case or punctuation are the same."""
    words = re.sub(r"\{(the|The|bare)\}", " {x} ", template).lower()
    return " ".join(re.findall(r"[\w{}]+", words))


@cache
def _forbidden() -> frozenset[str]:
    return frozenset(normalised(text) for texts in phrasings(held_out=True).values() for text in texts)


class Corpus:
    """Draws training examples; the same `rng` state gives the same example."""

    def __init__(self, mix: Mix | None = None):
        self.mix = mix or Mix()
        self._kinds = list(self.mix.weights)
        self._weights = [self.mix.weights[kind] for kind in self._kinds]

    def draw(self, rng: random.Random) -> Example:
        """One example of a kind drawn by weight."""
        kind = rng.choices(self._kinds, self._weights)[0]
        if kind == "paragraph":
            return Example("", paragraph(rng), kind)
        if kind == "sentence":
            return Example("", sentence(rng), kind)
        return self._question(kind, rng)

    def _question(self, kind: str, rng: random.Random) -> Example:
        template = self._phrasing(kind, rng)
        if kind == "addition":
            a, b = rng.choice(SUMS), rng.choice(SUMS)
            question, answer = template.format(a=a, b=b), str(a + b)
        else:
            country = rng.choice(_trained(kind))
            question = fill_question(template, country, self._alias(country, rng))
            answer = getattr(country, ANSWER_FIELD[kind])
        frame = rng.choices(list(FRAMES), list(FRAMES.values()))[0]
        return Example(frame.format(q=question), " " + answer, kind)

    def _alias(self, country: Country, rng: random.Random) -> str:
        other = country.aliases and rng.random() < self.mix.alias
        return rng.choice(country.aliases) if other else ""

    def _phrasing(self, kind: str, rng: random.Random) -> str:
        while True:
            template = disturb(rng.choice(phrasings()[kind]), self.mix, rng)
            if normalised(template) not in _forbidden():
                return template


@cache
def _trained(kind: str) -> tuple[Country, ...]:
    unseen = unseen_facts().get(kind, frozenset())
    return tuple(country for country in countries() if country.iso not in unseen)


def fill_question(template: str, country: Country, alias: str = "") -> str:
    """The question about `country`, under another name if `alias` is given."""
    the = alias or country.full_name
    return template.format(
        the=the, The=the[:1].upper() + the[1:], bare=the.removeprefix("the "), capital=country.capital
    )


def disturb(template: str, mix: Mix, rng: random.Random) -> str:
    """A noisy variant of a phrasing; placeholders and the words that carry the intent stay."""
    words = template.split()
    if rng.random() < mix.words:
        for _ in range(rng.choice((1, 1, 2))):
            _disturb_word(words, rng)
    if mix.nonsense and rng.random() < mix.nonsense:
        for _ in range(rng.choice((1, 1, 2, 3))):
            _disturb_word(words, rng, nonsense_word(rng))
    if rng.random() < mix.drop_article:
        words = [word.replace("{the}", "{bare}") for word in words]
    text = " ".join(words)
    if rng.random() < mix.no_mark:
        text = text.rstrip("?.")
    if rng.random() < mix.lower:
        text = text.lower().replace("{the}", "{bare}") if "{The}" not in text else text
    if rng.random() < mix.opener:
        text = f"{rng.choice(_noise()['openers'])} {text[:1].lower() + text[1:]}"
    return text


def _disturb_word(words: list[str], rng: random.Random, other: str = "") -> None:
    """Insert, replace or delete one word; `other` is what comes in, by default a filler."""
    action, at = rng.choice(("insert", "replace", "delete")), rng.randrange(len(words))
    if action == "insert":
        words.insert(at, other or rng.choice(_noise()["fillers"]))
    elif KEEP.search(words[at]) is None:
        words[at : at + 1] = [other or rng.choice(_noise()["fillers"])] if action == "replace" else []


def nonsense_word(rng: random.Random) -> str:
    """One to three made-up syllables, sometimes capitalised, sometimes with a comma or colon."""
    parts = ("onsets", "vowels", "codas")
    word = "".join(rng.choice(_noise()[part]) for _ in range(rng.choice((1, 1, 2, 2, 3))) for part in parts)
    return (word.capitalize() if rng.random() < 0.4 else word) + rng.choice(("", "", "", "", ",", ":"))


def paragraph(rng: random.Random) -> str:
    """A lead sentence and what follows in one fixed order; some name the region or the demonym, some stop early."""
    country = rng.choice(countries())
    order = ["capital", "currency", "language"]
    if rng.random() < 0.2:
        order.insert(0, "region")
    if rng.random() < 0.2 and country.iso not in unseen_facts()["demonym"]:
        order.append("demonym")
    if rng.random() < 0.15:
        order = order[: rng.randrange(len(order))]
    return " ".join(fill(text, country) for text in (LEAD, *(FOLLOW[kind] for kind in order)))


def sentence(rng: random.Random) -> str:
    """One sentence that stands alone."""
    kind = rng.choice(list(ALONE))
    return fill(rng.choice(ALONE[kind]), rng.choice(_trained(kind)))


def names_and_answers() -> Iterator[str]:
    """Every name and answer once, as it stands in a sentence and at the beginning of one: for the tokenizer."""
    for country in countries():
        fields = (country.name, country.capital, country.continent, country.region)
        for text in (*fields, country.currency, country.language, country.demonym, *country.aliases):
            yield " " + text
        yield country.name
        yield f"{country.name}'s"
    yield from (f" {number}" for number in range(max(SUMS) * 2 + 1))


def tokenizer_text(seed: int, examples: int = 20_000, repeats: int = 30) -> Iterator[str]:
    """What the tokenizer is trained on: drawn examples, and all names and answers many times over."""
    corpus, rng = Corpus(), random.Random(f"tokenizer:{seed}")
    for _ in range(examples):
        example = corpus.draw(rng)
        yield example.prompt + example.response
    for text in names_and_answers():
        yield from [text] * repeats


def some(kinds: Sequence[str], count: int, seed: int) -> list[Example]:
    """`count` training examples of the given kinds, for evaluation while training."""
    corpus, rng = Corpus(Mix(weights=dict.fromkeys(kinds, 1))), random.Random(f"some:{seed}")
    return [corpus.draw(rng) for _ in range(count)]
