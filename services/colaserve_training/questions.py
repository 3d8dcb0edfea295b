"""The demo's question sets: what ships with the checkpoint and what its figures are measured on.

Each line has `id`, `prompt`, `ground_truth` and, in one set, `choices`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

from colaserve_client.writing import write_file
from colaserve_training.corpus import ANSWER_FIELD, SUMS, UNSEEN_SUMS, fill_question, phrasings, unseen_facts
from colaserve_training.facts import Country, countries
from colaserve_training.sentences import FOLLOW, LEAD, fill

FRAME = "Question: {q} Answer:"
KINDS = ("capital", "continent", "language", "currency", "region", "demonym", "reverse")
EACH = {"capital": 4}  # phrasings a country in the sets of training phrasings; 2 for other kinds

Question = dict[str, object]


def question_sets() -> dict[str, list[Question]]:
    """File name (without .jsonl) to questions."""
    sets: dict[str, list[Question]] = {}
    for kind in KINDS:
        sets[f"{kind}_trained_phrasings"] = list(_asked(kind, held_out=False))
        sets[f"{kind}_held_out_phrasings"] = list(_asked(kind, held_out=True))
    for held_out, name in ((False, "trained"), (True, "held_out")):
        sets[f"addition_{name}_phrasings"] = list(_sums(phrasings(held_out)["addition"], SUMS, SUMS))
    sets["unseen_facts"] = [*_unseen("demonym"), *_unseen("reverse"), *_unseen_sums()]
    sets["completions"] = [_completion(country) for country in countries()]
    sets["paragraphs"] = [_paragraph(country) for country in countries()]
    return {name: [{"id": number, **item} for number, item in enumerate(items)] for name, items in sets.items()}


def _asked(kind: str, held_out: bool) -> Iterator[Question]:
    """Every country in every held-out phrasing, or in a few of the trained ones in turn; no unseen facts."""
    templates = phrasings(held_out)[kind]
    for index, country in enumerate(countries()):
        if country.iso in unseen_facts().get(kind, ()):
            continue
        chosen = templates if held_out else _some(templates, EACH.get(kind, 2), index)
        yield from (_question(kind, template, country, not held_out) for template in chosen)


def _some(templates: tuple[str, ...], count: int, index: int) -> list[str]:
    return [templates[(index * count + k) % len(templates)] for k in range(count)]


def _question(kind: str, template: str, country: Country, choices: bool = False) -> Question:
    prompt = FRAME.format(q=fill_question(template, country))
    question: Question = {"prompt": prompt, "ground_truth": getattr(country, ANSWER_FIELD[kind])}
    if kind == "continent" and choices:
        question["choices"] = sorted({other.continent for other in countries()})
    return question


def _sums(templates: tuple[str, ...], left: range, right: range) -> Iterator[Question]:
    for index, (a, b) in enumerate((a, b) for a in left for b in right):
        template = templates[index % len(templates)]
        yield {"prompt": FRAME.format(q=template.format(a=a, b=b)), "ground_truth": str(a + b)}


def _unseen(kind: str) -> Iterator[Question]:
    for country in countries():
        if country.iso in unseen_facts()[kind]:
            yield {"kind": kind, **_question(kind, phrasings()[kind][0], country)}


def _unseen_sums() -> Iterator[Question]:
    sums = list(_sums(phrasings()["addition"][:1], UNSEEN_SUMS, SUMS))
    yield from ({"kind": "addition", **item} for item in random.Random("sums").sample(sums, 20))


def _completion(country: Country) -> Question:
    start = fill(LEAD, country) + " " + FOLLOW["capital"].split("{")[0].strip()
    return {"prompt": start, "ground_truth": country.capital}


def _paragraph(country: Country) -> Question:
    """Free text: `ground_truth` is the lead's rest; the whole is judged by `paragraphs.read_paragraph`."""
    return {"prompt": LEAD.split("{continent}")[0].strip().format(The=country.title), "ground_truth": country.continent}


def write_question_sets(folder: Path) -> None:
    """Write every set as `folder`/NAME.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, items in question_sets().items():
        lines = [json.dumps(item, ensure_ascii=False) + "\n" for item in items]
        write_file(folder / f"{name}.jsonl", "".join(lines))
