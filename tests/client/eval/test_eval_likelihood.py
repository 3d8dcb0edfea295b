"""Right answers against wrong ones of as many tokens, by a likelihood that is known."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from colaserve_client.settings import Scoring
from colaserve_eval.likelihood import measure
from colaserve_eval.records import EvalError, Record

ANSWERS = ("Rome", "Oslo", "Kyiv", "Paris", "Tokyo")


class Knows:
    """A client of a server that finds the answer to its question likelier, but for one question."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []

    async def info(self) -> Any:
        return SimpleNamespace(end_ids=(0,))

    async def detokenize(self, ids: list[int]) -> str:
        return "<end>" if ids == [0] else ""

    async def tokenize(self, text: str) -> Any:
        return SimpleNamespace(ids=text)

    async def score(self, text: str, prefix: str, **settings: Any) -> Any:
        assert settings == {"samples": 0, "probes": 2, "steps": None, "solver": None, "seed": 3}
        self.asked.append((text, prefix))
        right = prefix in text and prefix != "Oslo"
        return SimpleNamespace(log_likelihood=2.0 if right else 1.0, standard_error=0.5)


async def test_figures_are_those_of_the_scores() -> None:
    done: list[int] = []
    client, questions = Knows(), [Record(id=n, prompt=name, ground_truth=name) for n, name in enumerate(ANSWERS)]
    alone = Record(id=5, prompt="Where?", ground_truth="Zanzibar")
    scoring = Scoring(samples=0, probes=2)
    asked = partial(measure, client, scoring=scoring, seed=3, concurrency=2, shown=done.append)  # type: ignore[arg-type]
    found = await asked([*questions, alone], [*ANSWERS, "Zanzibar"])
    figures = {"auc": 0.9, "paired": 0.8, "right": 1.8, "wrong": 1.0, "standard_error": 0.5}
    assert found == {"questions": 5, "left_out": ["Zanzibar"], **figures}
    assert sum(done) == 2 * 6
    for text, prefix in client.asked:
        assert text.endswith("<end>")
        assert len(text.strip()) == len(f"{prefix}<end>"), "as many tokens"
    assert (await asked(questions[:1], ANSWERS))["questions"] == 1, "others of the file are partners, too"
    with pytest.raises(EvalError, match="no two answers have as many tokens: 'Zanzibar'"):
        await asked([alone], [*ANSWERS, "Zanzibar"])
