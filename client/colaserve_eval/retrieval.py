"""How well vectors find the demo's questions again: each held-out phrasing looks for the trained ones."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

from colaserve_client.arrays import FloatArray, unit
from colaserve_client.client import AsyncClient
from colaserve_client.settings import Pooling
from colaserve_eval.demo import HELD_OUT, TRAINED, demo_tasks

_AT_ONCE: Final = 256  # texts of one call
_EVERY: Final = 8  # every 8th held-out question is a query
_POOLINGS: Final[Sequence[Pooling]] = ("mean", "last_block")

Asked = Sequence[tuple[str, str]]  # texts, each with its kind of question and its answer


def questions(ending: str) -> Asked:
    """The demo's questions about countries, of the sets whose names end so."""
    tasks = [task for task in demo_tasks() if task.name.endswith(ending) and not task.name.startswith("addition")]
    kinds = [(task.name.removesuffix(ending), each) for task in tasks for each in task.questions]
    return [(each.prompt, f"{kind}: {each.ground_truth}") for kind, each in kinds]


async def retrieval(client: AsyncClient) -> dict[str, Mapping[str, float]]:
    """For each kind of vectors: the numbers of queries and documents, the percentage of queries whose nearest document
    asks for the same (`first`), and the mean of 1 / rank of the nearest that does (`reciprocal_rank`)."""
    documents, queries = questions(TRAINED), questions(HELD_OUT)[::_EVERY]
    texts = [text for text, _ in (*documents, *queries)]
    same = np.array([own for _, own in queries])[:, None] == np.array([own for _, own in documents])
    vectors = {f"{pooling} of latents": await _embedded(client, texts, pooling) for pooling in _POOLINGS}
    vectors["bag of words"] = bag_of_words(texts, len(documents))
    return {name: figures(found[: len(documents)], found[len(documents) :], same) for name, found in vectors.items()}


async def _embedded(client: AsyncClient, texts: Sequence[str], pooling: Pooling) -> FloatArray:
    found: list[FloatArray] = []
    for start in range(0, len(texts), _AT_ONCE):
        some = await client.embed(texts[start : start + _AT_ONCE], pooling=pooling, normalize=True)
        found += [each.values for each in some]
    return np.stack(found)


def bag_of_words(texts: Sequence[str], documents: int) -> FloatArray:
    """The tf-idf vector of each text, of length 1. The first `documents` texts are the documents; words that none of
    them has do not count."""
    counts = [Counter(re.findall(r"\w+", text.lower())) for text in texts]
    frequency = Counter(word for each in counts[:documents] for word in each)
    columns = {word: column for column, word in enumerate(frequency)}
    found = np.zeros((len(texts), len(columns)), np.float32)
    for row, each in enumerate(counts):
        for word in each.keys() & columns.keys():
            found[row, columns[word]] = each[word] * np.log(documents / frequency[word])
    return unit(found)


def figures(documents: FloatArray, queries: FloatArray, same: np.ndarray) -> dict[str, float]:
    """The figures of `retrieval` for vectors of length 1. `same`, (queries, documents), says which ask for the same;
    another document that is equally near ranks before them."""
    similarity = queries @ documents.T
    best = np.where(same, similarity, -np.inf).max(axis=1, keepdims=True)
    ranks = 1 + (~same & (similarity >= best)).sum(axis=1)
    first, reciprocal = 100 * (ranks == 1).mean(), (1 / ranks).mean()
    return {
        "queries": len(queries),
        "documents": len(documents),
        "first": round(float(first), 1),
        "reciprocal_rank": round(float(reciprocal), 3),
    }
