"""Token ids from logits: repetition penalty, temperature, top-k, top-p, and draws that any batch repeats."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from colaserve_services.bounds import SAMPLING, check_all
from colaserve_services.model.layers import to_device

GREEDY_BELOW = 1e-5  # temperatures below take the most likely token
_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class SamplingSettings:
    """How ids are drawn; the defaults are those of the wire contract's brackets."""

    temperature: float = SAMPLING["temperature"].default
    top_k: int = SAMPLING["top_k"].default  # 0 keeps all
    top_p: float = SAMPLING["top_p"].default
    repetition_penalty: float = SAMPLING["repetition_penalty"].default
    seed: int = 0

    def __post_init__(self) -> None:
        check_all(SAMPLING, "sampling.", vars(self))


def sample_block(logits: Tensor, settings: SamplingSettings, seen: Tensor, block: int) -> Tensor:
    """Draw one id for each position of a block: logits (n, V) float32 -> ids (n,) int64.

    `seen`: distinct ids of the run's earlier blocks, int64, each penalised once. `block`: index in the run.
    """
    scores = penalise(logits, seen, settings.repetition_penalty)
    if settings.temperature < GREEDY_BELOW:
        return scores.argmax(dim=-1)
    return _draw(scores / settings.temperature, settings, block)


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Scores of the seen ids divided by the penalty, or times it when negative."""
    if penalty == 1 or seen.numel() == 0:
        return logits
    scores = logits[:, seen]
    scores = torch.where(scores < 0, scores * penalty, scores / penalty)
    return logits.index_copy(1, seen, scores)


def _draw(scores: Tensor, settings: SamplingSettings, block: int) -> Tensor:
    vocabulary = scores.shape[-1]
    k = min(settings.top_k or vocabulary, vocabulary)
    best, ids = scores.topk(k, dim=-1)  # sorted, best first
    probabilities = best.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    kept = torch.where(before <= settings.top_p, probabilities, 0.0)
    cumulative = kept.cumsum(dim=-1)
    draws = [uniform(settings.seed, block, position) for position in range(len(scores))]
    thresholds = to_device(torch.tensor(draws, dtype=scores.dtype), scores.device)[:, None] * cumulative[:, -1:]
    chosen = (cumulative <= thresholds).sum(dim=-1, keepdim=True).clamp_max(k - 1)
    return ids.gather(1, chosen)[:, 0]


def uniform(seed: int, block: int, position: int) -> float:
    """A number in [0, 1) that depends on nothing else: splitmix64 over the three, upper 24 bits."""
    state = seed
    for value in (block, position):
        state = _splitmix64(state ^ _splitmix64(value + 1))
    return (state >> 40) / (1 << 24)


def _splitmix64(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def probes(logits: Tensor, end_ids: Tensor) -> Tensor:
    """(2,): mean entropy of the positions of (n, V) in nats, and the ids' probability together where it is highest."""
    logprobs = logits.log_softmax(dim=-1)
    likely = logprobs.exp()
    ends = likely.index_select(1, end_ids).sum(dim=-1)
    return torch.stack((-(likely * logprobs).sum(dim=-1).mean(), ends.max()))


def top_logprobs(logprobs: Tensor, count: int) -> list[tuple[list[int], list[float]]]:
    """The `count` most likely ids of each position with their log-probabilities, best first; (n, V) -> n pairs."""
    values, ids = logprobs.topk(min(count, logprobs.shape[-1]), dim=-1)
    return list(zip(ids.tolist(), values.tolist(), strict=True))


def chosen_logprobs(logprobs: Tensor, ids: Sequence[int]) -> list[float]:
    """Log-probability of ids[i] at position i, for the first len(ids) positions of (n, V)."""
    if not ids:
        return []  # without waiting for the device
    index = to_device(torch.tensor(ids, dtype=torch.int64), logprobs.device)
    return [float(x) for x in logprobs[: len(ids)].gather(1, index[:, None])[:, 0].tolist()]
