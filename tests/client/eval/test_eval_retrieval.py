"""`eval retrieval`: vectors that know the answers find all, and a bag of words what shares its words."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from colaserve_eval.demo import HELD_OUT, TRAINED
from colaserve_eval.retrieval import bag_of_words, figures, questions, retrieval


class Knowing:
    """Embeds a question by its kind and answer; the last block says nothing."""

    def __init__(self) -> None:
        self.kinds = dict((*questions(TRAINED), *questions(HELD_OUT)))
        self.numbers = {kind: number for number, kind in enumerate(dict.fromkeys(self.kinds.values()))}
        self.asked: list[int] = []

    async def embed(self, texts: Sequence[str], *, pooling: str, normalize: bool) -> list[Any]:
        assert normalize
        self.asked.append(len(texts))
        angles = [2 * np.pi * self.numbers[self.kinds[text]] / len(self.numbers) for text in texts]
        found = [(np.cos(angle), np.sin(angle)) if pooling == "mean" else (1.0, 0.0) for angle in angles]
        return [SimpleNamespace(values=np.array(each, np.float32)) for each in found]


async def test_vectors_that_know_the_answers_find_them_and_equal_ones_nothing() -> None:
    client = Knowing()
    found = await retrieval(client)  # type: ignore[arg-type]
    assert found["mean of latents"]["first"] == 100
    assert found["last_block of latents"]["first"] == 0
    assert found["bag of words"]["first"] == pytest.approx(81, abs=1)
    assert max(client.asked) == 256


def test_ranks_count_what_is_as_near_and_does_not_belong() -> None:
    documents = np.array([[1, 0], [0, 1], [0, 1]], np.float32)
    queries = np.array([[1, 0], [0, 1]], np.float32)
    same = np.array([[True, False, False], [False, True, False]])
    assert figures(documents, queries, same) == {"queries": 2, "documents": 3, "first": 50, "reciprocal_rank": 0.75}


def test_rare_words_weigh_more_and_unknown_ones_nothing() -> None:
    found = bag_of_words(["the cat", "the dog", "the cat the owl", "a cat of the owl"], documents=3)
    assert found @ found[3] == pytest.approx([0.346, 0, 1, 1], abs=0.01)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), [1, 1, 1, 1], rtol=1e-6)
