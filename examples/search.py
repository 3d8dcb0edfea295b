"""Search by the vectors of `embed`: how often they find the same question in other words, beside a bag of words.

Latents are made to give a text back, not to say what it means, so a bag of words finds far more. Questions of the demo
in phrasings that it was not trained on look for those in phrasings that it was, by kind of question and answer.

    colaserve up &
    python examples/search.py
"""

import os
import re
from collections import Counter

import numpy as np
from numpy.typing import NDArray

from colaserve_client import Client
from colaserve_eval.demo import HELD_OUT, TRAINED, demo_tasks

Vectors = NDArray[np.float32]
AT_ONCE = 256  # texts of one call


def main() -> None:
    """Every 8th question is a query."""
    documents, queries = questions(TRAINED), questions(HELD_OUT)[::8]
    same = np.array([asked for _, asked in queries])[:, None] == np.array([asked for _, asked in documents])
    texts = [text for text, _ in (*documents, *queries)]
    print(f"{len(queries)} questions look for those of {len(documents)} that ask for the same")
    with Client(os.environ.get("COLASERVE_TARGET", "127.0.0.1:50051")) as client:
        for pooling in ("mean", "last_block"):
            calls = [texts[start : start + AT_ONCE] for start in range(0, len(texts), AT_ONCE)]
            found = [each.values for some in calls for each in client.embed(some, pooling=pooling, normalize=True)]
            show(f"{pooling} of latents", np.stack(found), same)
    show("bag of words", bag_of_words(texts, len(documents)), same)


def questions(ending: str) -> list[tuple[str, str]]:
    """Of the sets about countries whose names end so: each with its kind and its answer."""
    tasks = [task for task in demo_tasks() if task.name.endswith(ending) and not task.name.startswith("addition")]
    kinds = [(task.name.removesuffix(ending), each) for task in tasks for each in task.questions]
    return [(each.prompt, f"{kind}: {each.ground_truth}") for kind, each in kinds]


def bag_of_words(texts: list[str], documents: int) -> Vectors:
    """Counts of words (texts, words), weighted by how rare they are in the documents, which come first; length 1."""
    counts = [Counter(re.findall(r"\w+", text.lower())) for text in texts]
    frequency = Counter(word for each in counts[:documents] for word in each)
    weights = {word: np.log(documents / count) for word, count in frequency.items()}
    found: Vectors = np.array(
        [[each[word] * weight for word, weight in weights.items()] for each in counts], np.float32
    )
    found /= np.linalg.norm(found, axis=1, keepdims=True)
    return found


def show(name: str, vectors: Vectors, same: NDArray[np.bool_]) -> None:
    """Documents that are equally near rank before the right one."""
    documents = same.shape[1]
    similarity = vectors[documents:] @ vectors[:documents].T
    best = np.where(same, similarity, -np.inf).max(axis=1, keepdims=True)
    ranks = 1 + (~same & (similarity >= best)).sum(axis=1)
    print(f"{name}: first {np.mean(ranks == 1):.1%} right, mean of 1 / rank {np.mean(1 / ranks):.3f}")


if __name__ == "__main__":
    main()
