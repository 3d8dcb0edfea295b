"""Token ids from logits: repetition penalty, temperature, top-k, top-p, and draws that any batch repeats."""

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from colaserve_services.bounds import SAMPLING, check_all
from colaserve_services.model.layers import to_device

GREEDY_BELOW = 1e-5  # temperatures below take the most likely token
# Logits that are sampled from together, since each step makes as large a tensor again: a block of a large vocabulary,
# which stays in a CPU's cache, and 64 MiB of float32.
_AT_ONCE = {"cpu": 1 << 21}
_AT_ONCE_ELSEWHERE = 1 << 24
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


class Draw(NamedTuple):
    """How the ids of one block are drawn."""

    settings: SamplingSettings
    seen: Collection[int]  # distinct ids of the run's earlier blocks, each penalised once
    block: int  # index in the run


def sample_blocks(logits: Tensor, draws: Sequence[Draw]) -> tuple[Tensor, Tensor]:
    """Draw one id for each position of K blocks: logits (K, n, V) float32 -> ids (K, n) int64, and log-probabilities
    of these (K, n), before penalty and temperature.

    What is drawn for a block does not depend on the others. Launches as many kernels for one block as for all that
    have one top_k, and waits for nothing.
    """
    count = _at_once(logits)
    parts = [_sample(some, draws[i * count :][:count]) for i, some in enumerate(logits.split(count))]
    if len(parts) == 1:
        return parts[0]
    ids, logprobs = zip(*parts, strict=True)
    return torch.cat(ids), torch.cat(logprobs)


def _at_once(logits: Tensor) -> int:
    """Blocks."""
    return max(1, _AT_ONCE.get(logits.device.type, _AT_ONCE_ELSEWHERE) // logits[0].numel())


def _sample(logits: Tensor, draws: Sequence[Draw]) -> tuple[Tensor, Tensor]:
    scores, groups = penalise(logits, draws), defaultdict[int, list[int]](list)
    for i, (settings, _, _) in enumerate(draws):
        vocabulary = logits.shape[-1]
        greedy = settings.temperature < GREEDY_BELOW
        groups[0 if greedy else min(settings.top_k or vocabulary, vocabulary)].append(i)
    ids = torch.empty(logits.shape[:2], dtype=torch.int64, device=logits.device)
    for k, members in groups.items():
        index = to_device(torch.tensor(members), logits.device)
        some = scores if len(members) == len(draws) else scores.index_select(0, index)
        ids.index_copy_(0, index, _draw(some, [draws[i] for i in members], k) if k else _likeliest(some))
    return ids, logits.log_softmax(dim=-1).gather(-1, ids[..., None])[..., 0]


def _likeliest(scores: Tensor) -> Tensor:
    """argmax over the last dimension; torch's takes a CPU 20 times as long as numpy's."""
    on_cpu = scores.device.type == "cpu"
    return torch.from_numpy(scores.numpy().argmax(axis=-1)) if on_cpu else scores.argmax(dim=-1)


def penalise(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Scores of the seen ids divided by the penalty, or times it when negative: (K, n, V)."""
    penalties = np.array([draw.settings.repetition_penalty for draw in draws], np.float32)
    ids = [draw.seen if draw.settings.repetition_penalty != 1 else () for draw in draws]
    counts = [len(each) for each in ids]
    if not any(counts):
        return logits
    of, seen, penalty = (
        to_device(torch.from_numpy(values), logits.device)
        for values in (
            np.repeat(np.arange(len(draws)), counts),
            np.fromiter(chain.from_iterable(ids), np.int64, sum(counts)),
            np.repeat(penalties, counts)[:, None],
        )
    )
    scores = logits.clone()
    found = scores[of, :, seen]
    scores[of, :, seen] = torch.where(found < 0, found * penalty, found / penalty)
    return scores


def _draw(scores: Tensor, draws: Sequence[Draw], k: int) -> Tensor:
    """(K, n, V) to (K, n), from each position's k best."""
    columns = torch.tensor([(draw.settings.temperature, draw.settings.top_p) for draw in draws])
    numbers = [[uniform(draw.settings.seed, draw.block, i) for i in range(scores.shape[1])] for draw in draws]
    temperature, top_p = to_device(columns, scores.device).T[..., None, None]
    best, ids = (scores / temperature).topk(k, dim=-1)  # sorted, best first
    probabilities = best.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    kept = torch.where(before <= top_p, probabilities, 0.0)
    cumulative = kept.cumsum(dim=-1)
    thresholds = to_device(torch.tensor(numbers), scores.device)[..., None] * cumulative[..., -1:]
    chosen = (cumulative <= thresholds).sum(dim=-1, keepdim=True).clamp_max(k - 1)
    return ids.gather(-1, chosen)[..., 0]


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
    """(K, 2): of each block of (K, n, V) the mean entropy of its positions in nats, and the ids' probability together
    where it is highest."""
    logprobs = logits.log_softmax(dim=-1)
    likely = logprobs.exp()
    ends = likely.index_select(-1, end_ids).sum(dim=-1)
    return torch.stack((-(likely * logprobs).sum(dim=-1).mean(dim=-1), ends.amax(dim=-1)), dim=-1)


def position_logprobs(logprobs: Tensor, ids: Sequence[int] | None, dtype: torch.dtype) -> Tensor:
    """Log-probabilities of these ids (None: all) at every position of (n, V), in `dtype`, on the CPU."""
    if ids is not None:
        logprobs = logprobs.index_select(1, to_device(torch.tensor(ids, dtype=torch.int64), logprobs.device))
    return logprobs.clamp_min(torch.finfo(dtype).min).to("cpu", dtype, copy=True)


def listed(logits: Tensor, count: int, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(K, n, 1 + count) log-probabilities at the positions of (K, n, V): of the targets, (K, n) ids, and of the most
    likely ids, best first; and these, (K, n, count)."""
    found = []
    at_once = _at_once(logits)
    for some, ids in zip(logits.split(at_once), targets.split(at_once), strict=True):
        logprobs = some.log_softmax(dim=-1)
        values, likely = logprobs.topk(count, dim=-1)
        found.append((torch.cat((logprobs.gather(-1, ids[..., None]), values), dim=-1), likely))
    every, likely = zip(*found, strict=True)
    return torch.cat(every), torch.cat(likely)
