"""Whether likelihood tells right answers from wrong ones that have as many tokens."""

import asyncio
import random
from collections.abc import Callable, Collection, Sequence
from statistics import fmean
from typing import Any

from colaserve_client.client import AsyncClient, bounded
from colaserve_client.results import Score
from colaserve_client.settings import Scoring
from colaserve_eval.records import EvalError, Record

Shown = Callable[[int], object]


async def measure(
    client: AsyncClient,
    questions: Sequence[Record],
    answers: Collection[str],
    scoring: Scoring,
    seed: int,
    concurrency: int,
    shown: Shown,
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
