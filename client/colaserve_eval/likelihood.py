"""Whether likelihood tells right answers from wrong ones that have as many tokens."""

import asyncio
import random
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

from colaserve_client.client import AsyncClient, bounded
from colaserve_client.results import Score
from colaserve_client.settings import Scoring
from colaserve_eval.records import EvalError, Record

Shown = Callable[[int], object]


async def measure(
    client: AsyncClient, questions: Sequence[Record], scoring: Scoring, seed: int, concurrency: int, shown: Shown
) -> dict[str, Any]:
    """Score each question's answer and another question's of as many tokens, both with an end token behind them.

    `auc`: the probability that a right answer scores above a wrong one, of any two questions; `paired`: of the same.
    """
    end = await client.detokenize([(await client.info()).end_ids[0]])
    answers = [str(question.ground_truth) for question in questions]
    lengths = {answer: len((await client.tokenize(f" {answer}")).ids) for answer in dict.fromkeys(answers)}
    draw, texts = random.Random(seed), list[tuple[str, str]]()
    for question, right in zip(questions, answers, strict=True):
        others = [each for each in lengths if each != right and lengths[each] == lengths[right]]
        if not others:
            raise EvalError(f"no other answer has as many tokens as {right!r} ({lengths[right]})")
        texts += [(f" {answer}{end}", question.prompt) for answer in (right, draw.choice(others))]

    async def score(text: tuple[str, str]) -> Score:
        found = await client.score(*text, seed=seed, **vars(scoring))
        shown(1)
        return found

    scores = await asyncio.gather(*map(bounded(score, concurrency), texts))
    good, bad = ([each.log_likelihood for each in scores[start::2]] for start in (0, 1))
    return {
        "questions": len(questions),
        "auc": fmean((a > b) + 0.5 * (a == b) for a in good for b in bad),
        "paired": fmean(a > b for a, b in zip(good, bad, strict=True)),
        "right": fmean(good),
        "wrong": fmean(bad),
        "standard_error": fmean(each.standard_error for each in scores),
    }
