"""Figures beside the score of answers: whether likelihood tells right answers from wrong ones that have as many tokens,
and how faithful the latent space is (texts to latents and back, without the prior).
"""

import asyncio
import random
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from colaserve_client.client import AsyncClient, bounded
from colaserve_client.reading import read_lines
from colaserve_client.results import Reconstruction, Score
from colaserve_client.settings import Scoring
from colaserve_eval.records import EvalError, Record, parse_lines, readable
from colaserve_eval.runner import work_through

BATCH_TEXTS, BATCH_CHARACTERS = 32, 20_000  # of one call: enough to fill a batch, small enough for progress to show
VAE_FILE = "vae.json"


async def measure_likelihood(
    client: AsyncClient,
    questions: Sequence[Record],
    answers: Collection[str],
    scoring: Scoring,
    seed: int,
    concurrency: int,
    shown: Callable[[int], object],
) -> dict[str, Any]:
    """Score each question's answer and another one of `answers` of as many tokens, an end token behind both.

    `auc`: the probability that a right answer scores above a wrong one, of any two questions; `paired`: of the same.
    `left_out`: answers that no other one has as many tokens as; their questions are not scored. `shown` is called with
    how many scores more are done.
    """
    end = await client.detokenize([(await client.info()).end_ids[0]])
    lengths = {answer: len((await client.tokenize(f" {answer}")).ids) for answer in dict.fromkeys(answers)}
    draw, texts, left_out = random.Random(seed), list[tuple[str, str]](), dict[str, None]()
    for question in questions:
        right = question.ground_truth
        others = [each for each in lengths if each != right and lengths[each] == lengths[right]]
        if others:
            texts += [(f" {answer}{end}", question.prompt) for answer in (right, draw.choice(others))]
        else:
            left_out[right] = None
            shown(2)
    if not texts:
        raise EvalError(f"no two answers have as many tokens: {', '.join(map(repr, left_out))}")

    async def score(text: tuple[str, str]) -> Score:
        found = await client.score(*text, seed=seed, **vars(scoring))
        shown(1)
        return found

    scores = await asyncio.gather(*map(bounded(score, concurrency), texts))
    good, bad = ([each.log_likelihood for each in scores[start::2]] for start in (0, 1))
    means = {
        "auc": fmean((a > b) + 0.5 * (a == b) for a in good for b in bad),
        "paired": fmean(a > b for a, b in zip(good, bad, strict=True)),
        "right": fmean(good),
        "wrong": fmean(bad),
        "standard_error": fmean(each.standard_error for each in scores),
    }
    rounded = {name: round(value, 4) for name, value in means.items()}
    return {"questions": len(good), "left_out": list(left_out), **rounded}


def read_texts(path: Path) -> list[str]:
    """The texts of a file: of a .jsonl file the field `text` of each line, else one text a non-empty line."""
    if path.suffix == ".jsonl":
        texts = parse_lines(path, _text)
    else:
        with readable():
            texts = [line for _, line in read_lines(path) if line.strip()]
    if not texts:
        raise EvalError(f"{path}: holds no text")
    return texts


async def measure_round_trips(
    client: AsyncClient, texts: Sequence[str], concurrency: int = 4, on_texts: Callable[[int], None] = lambda n: None
) -> dict[str, Any]:
    """The figures of the round trip of all texts; `on_texts` is called with how many more are done."""
    trips: list[tuple[str, Reconstruction]] = []

    async def work(batch: list[str]) -> None:
        trips.extend(zip(batch, await client.reconstruct(batch), strict=True))
        on_texts(len(batch))

    await work_through(batched(texts), work, concurrency)
    return figures(trips)


def figures(trips: Sequence[tuple[str, Reconstruction]]) -> dict[str, Any]:
    """Shares in per cent, bits as they are; `bits_per_byte` compares across tokenizers.

    Bits are -log2 of the decoder's probability of the right tokens. Every mean is over tokens, so that long texts count
    for more. An exact text came back unchanged, to the character.
    """
    tokens = sum(len(trip.original_ids) for _, trip in trips)
    wrong = sum(came != went for _, trip in trips for came, went in zip(trip.token_ids, trip.original_ids, strict=True))
    bits = sum(len(trip.original_ids) * trip.bits_per_token for _, trip in trips)
    return {
        "texts": len(trips),
        "exact_texts": sum(trip.text == text for text, trip in trips),
        "tokens": tokens,
        "token_accuracy": round(100 * (1 - wrong / tokens), 4),
        "bits_per_token": round(bits / tokens, 6),
        "bits_per_byte": round(bits / sum(len(text.encode()) for text, _ in trips), 6),
    }


def batched(texts: Sequence[str]) -> Iterator[list[str]]:
    """The texts in order, in calls of at most BATCH_TEXTS texts and, but for a single long one, BATCH_CHARACTERS."""
    batch: list[str] = []
    for text in texts:
        if batch and (len(batch) == BATCH_TEXTS or sum(map(len, batch)) + len(text) > BATCH_CHARACTERS):
            yield batch
            batch = []
        batch.append(text)
    if batch:
        yield batch


def _text(fields: Any) -> str:
    text = fields.get("text")
    if not isinstance(text, str) or not text:
        raise ValueError(f"text: expected a string that is not empty, got {text!r}")
    return text
