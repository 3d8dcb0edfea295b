"""Sampled ids follow the distribution that the settings describe, and nothing but (seed, block, position)."""

import math

import pytest
import torch

from colaserve_services.errors import InvalidRequest
from colaserve_services.model.sampling import (
    Draw,
    SamplingSettings,
    listed,
    penalise,
    sample_blocks,
    uniform,
)


def sample_block(logits: torch.Tensor, settings: SamplingSettings, block: int = 0) -> torch.Tensor:
    (ids,), _ = sample_blocks(logits[None], [Draw(settings, (), block)])
    return ids


def draws(probabilities: list[float], settings: SamplingSettings, count: int = 20_000) -> list[float]:
    logits = torch.tensor(probabilities).log().expand(count, -1)
    ids = sample_block(logits, settings)
    return (torch.bincount(ids, minlength=len(probabilities)) / count).tolist()


ROOTS = (math.sqrt(0.2) + math.sqrt(0.8)) ** -1


@pytest.mark.parametrize(
    ("probabilities", "settings", "expected"),
    [
        ([0.2, 0.5, 0.3], {"temperature": 0.0, "top_k": 50, "top_p": 0.9}, [0, 1, 0]),
        ([0.1, 0.4, 0.2, 0.3], {}, [0.1, 0.4, 0.2, 0.3]),
        ([0.2, 0.8], {"temperature": 2.0}, [math.sqrt(0.2) * ROOTS, math.sqrt(0.8) * ROOTS]),
        ([0.1, 0.4, 0.2, 0.3], {"top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
        ([0.5, 0.3, 0.15, 0.05], {"top_p": 0.75}, [0.5 / 0.8, 0.3 / 0.8, 0, 0]),
        ([0.5, 0.25, 0.15, 0.1], {"top_p": 0.5}, [2 / 3, 1 / 3, 0, 0]),  # the mass before a kept token is at most p
    ],
)
def test_draws_follow_the_distribution_that_temperature_top_k_and_top_p_leave(probabilities, settings, expected):
    all_of_it = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    assert draws(probabilities, SamplingSettings(**all_of_it | settings)) == pytest.approx(expected, abs=0.015)


def test_penalty_divides_positive_and_multiplies_negative_scores_of_seen_ids_once() -> None:
    logits = torch.tensor([[2.0, -2.0, 1.0]])
    got = penalise(logits[None], [Draw(SamplingSettings(repetition_penalty=2.0), {0, 1}, 0)])
    assert got.tolist() == [[[1.0, -4.0, 1.0]]]
    assert logits.tolist() == [[2.0, -2.0, 1.0]]


def test_a_draw_depends_on_seed_block_and_position_only() -> None:
    settings = SamplingSettings(temperature=1.0, seed=9)
    logits = torch.randn(8, 50, generator=torch.Generator().manual_seed(0))
    whole = sample_block(logits, settings, 3).tolist()
    assert sample_block(logits[:5], settings, 3).tolist() == whole[:5]
    assert sample_block(logits, settings, 4).tolist() != whole
    assert sample_block(logits, SamplingSettings(temperature=1.0, seed=10), 3).tolist() != whole


def test_each_of_many_blocks_gets_what_it_gets_alone() -> None:
    vocabulary, count = 70_000, 6  # too many to be sampled from at once
    logits = torch.randn(count, 8, vocabulary, generator=torch.Generator().manual_seed(0))
    kinds = [{}, {"temperature": 0.8, "seed": 5}, {"temperature": 1.2, "top_k": 7, "top_p": 0.5}]
    blocks = [Draw(SamplingSettings(**kinds[i % 3]), set(range(100 * i)), i) for i in range(count)]
    ids, logprobs = sample_blocks(logits, blocks)
    for i, draw in enumerate(blocks):
        (alone,), (chosen,) = sample_blocks(logits[i : i + 1], [draw])
        assert ids[i].tolist() == alone.tolist()
        assert logprobs[i].tolist() == chosen.tolist()
        every, likely = listed(logits[i : i + 1], 3, ids[i : i + 1])
        assert logprobs[i].tolist() == every[0, :, 0].tolist()
        assert every[0].equal(listed(logits, 3, ids)[0][i])
        assert likely[0, :, 0].equal(logits[i].argmax(-1))


def test_uniform_numbers_are_uniform() -> None:
    values = [uniform(seed, block, position) for seed in range(20) for block in range(20) for position in range(25)]
    assert all(0 <= value < 1 for value in values)
    counts = torch.histc(torch.tensor(values), bins=10, min=0, max=1)
    assert counts.min() > 900
    assert counts.max() < 1100


def test_logprobs_are_those_of_the_raw_logits() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0], [3.0, 1.0, 2.0]])
    logprobs = logits.log_softmax(-1)
    values, ids = listed(logits[None], 2, torch.tensor([[2, 1]]))
    assert values[0, :, 0].equal(logprobs[[0, 1], [2, 1]])
    assert values[0, :, 1:].equal(logprobs.sort(descending=True).values[:, :2])
    assert ids.tolist() == [[[2, 1], [0, 2]]]
    assert listed(logits[None], 0, torch.tensor([[0, 0]]))[1].shape == (1, 2, 0)


@pytest.mark.parametrize("settings", [{"temperature": math.nan}, {"top_p": 0.0}, {"seed": -1}])
def test_impossible_sampling_is_refused_by_name(settings: dict) -> None:
    with pytest.raises(InvalidRequest, match=f"sampling.{next(iter(settings))}"):
        SamplingSettings(**settings)
