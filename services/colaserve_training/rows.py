"""Token rows: what every source of training data yields, and how a step's rows become micro-batches."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise
from typing import Protocol, Self, TypeVar

import torch
from tokenizers import Tokenizer
from torch import Tensor

from colaserve_training.corpus import Corpus
from colaserve_training.tokenizer import END_ID, PAD_ID

B = TypeVar("B", bound="Batch")


@dataclass(frozen=True)
class Row:
    """Token ids; the first `prompt` of them are given, not learned (0: plain text)."""

    ids: tuple[int, ...]
    prompt: int = 0


class Source(Protocol):
    """A stream of rows without hidden state: step s always has the same rows, so a resumed run continues exactly."""

    def rows(self, step: int, count: int, first: int | None = None) -> list[Row]:
        """The `count` rows of step `step` (from 0); `first` rows came before (None: as many in each step)."""


@dataclass(frozen=True)
class CorpusSource:
    """The demo's corpus, drawn on the fly and ended by the end token."""

    corpus: Corpus
    tokenizer: Tokenizer
    seed: int

    def rows(self, step: int, count: int, first: int | None = None) -> list[Row]:
        rng = random.Random(f"{self.seed}:{step}")
        examples = [self.corpus.draw(rng) for _ in range(count)]
        return [row_of(self.tokenizer, example.prompt, example.response, END_ID) for example in examples]


@dataclass(frozen=True)
class VaeSource:
    """For stage 1: rows of one length, some in unusual tokens, some of random ids, so that any text can be encoded."""

    corpus: Corpus
    tokenizer: Tokenizer
    seed: int
    length: int = 40
    random_rows: float = 0.25
    split: float = 0.3  # share of examples whose text is cut at random positions before it is tokenized

    def rows(self, step: int, count: int, first: int | None = None) -> list[Row]:
        rng = random.Random(f"vae:{self.seed}:{step}")
        return [self._row(rng) for _ in range(count)]

    def _row(self, rng: random.Random) -> Row:
        if rng.random() < self.random_rows:
            return Row(tuple(rng.randrange(self.tokenizer.get_vocab_size()) for _ in range(self.length)))
        ids: list[int] = []
        while len(ids) < self.length:
            example = self.corpus.draw(rng)
            ids += self._encode(example.prompt + example.response, rng)
            ids += [END_ID, *[PAD_ID] * rng.randrange(4)]
        return Row(tuple(ids[: self.length]))

    def _encode(self, text: str, rng: random.Random) -> list[int]:
        cuts = sorted(rng.sample(range(1, len(text)), 3)) if rng.random() < self.split and len(text) > 4 else []
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        return [id_ for piece in pieces for id_ in self.tokenizer.encode(piece, add_special_tokens=False).ids]


@dataclass(frozen=True)
class ListSource:
    """Rows kept in memory, each once an epoch, in an order that depends on (seed, epoch) alone."""

    items: Sequence[Row]
    seed: int

    def rows(self, step: int, count: int, first: int | None = None) -> list[Row]:
        first, size = step * count if first is None else first, len(self.items)
        places = (divmod(index, size) for index in range(first, first + count))
        return [self.items[_order(self.seed, epoch, size)[position]] for epoch, position in places]


@lru_cache(maxsize=8)
def _order(seed: int, epoch: int, size: int) -> list[int]:
    return random.Random(f"{seed}:{epoch}").sample(range(size), size)


@dataclass(frozen=True)
class MixedSource:
    """Several sources; after any number of rows each has had its weight's share of them, within one row a source."""

    sources: Sequence[Source]
    weights: Sequence[float]

    def rows(self, step: int, count: int, first: int | None = None) -> list[Row]:
        start = step * count if first is None else first
        spans = zip(self.sources, self._counts(start), self._counts(start + count), strict=True)
        return [row for source, begin, end in spans for row in source.rows(step, end - begin, begin)]

    def _counts(self, rows: int) -> list[int]:
        """Rows of each source among the first `rows`; none of them ever falls as `rows` grows."""
        counts, weight_left = [], sum(map(Fraction, self.weights))
        for weight in map(Fraction, self.weights):
            counts.append(int(rows * weight / weight_left))
            rows -= counts[-1]
            weight_left -= weight
        return counts


def row_of(tokenizer: Tokenizer, prompt: str, response: str, end_id: int) -> Row:
    """The row of a prompt and its response; they are tokenized apart, as they are when a prompt is served."""
    given = tokenizer.encode(prompt, add_special_tokens=False).ids
    return Row((*given, *tokenizer.encode(response, add_special_tokens=False).ids, end_id), len(given))


def with_whole_patches(rows: Sequence[Row], patch: int, pad_id: int) -> list[Row]:
    """The rows with their prompts filled up to whole latents of `patch` tokens, as they are when a prompt is served."""
    filled = []
    for row in rows:
        missing = -row.prompt % patch
        ids = (*row.ids[: row.prompt], *[pad_id] * missing, *row.ids[row.prompt :])
        filled.append(Row(ids, row.prompt + missing))
    return filled


def micro_batches(rows: list[Row], parts: int) -> list[list[Row]]:
    """The rows by length, cut into `parts` groups of nearly equal counts (stable: same rows, same groups)."""
    ordered = sorted(rows, key=lambda row: len(row.ids))
    bounds = [len(ordered) * part // parts for part in range(parts + 1)]
    return [ordered[a:b] for a, b in pairwise(bounds)]


def pad_rows(rows: Sequence[Row], multiple: int, pad_id: int) -> Tensor:
    """ids (rows, n): n is the longest row's length rounded up to `multiple`."""
    longest = max(len(row.ids) for row in rows)
    width = -(-longest // multiple) * multiple
    return torch.tensor([[*row.ids, *[pad_id] * (width - len(row.ids))] for row in rows])


@dataclass(frozen=True)
class Batch:
    """What the batches of both stages can do.

    Tensor fields have one row a sequence. Numbers count something, and are those of the whole step once it is drawn.
    """

    def part(self, rank: int, world: int) -> Self:
        """The rows of one of `world` processes."""
        return self._each(lambda value: value[rank::world])

    def to(self, device: torch.device) -> Self:
        return self._each(lambda value: value.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Self:
        found = {item.name: getattr(self, item.name) for item in fields(self)}
        changed = {name: change(value) for name, value in found.items() if isinstance(value, Tensor)}
        nested = {name: value._each(change) for name, value in found.items() if isinstance(value, Batch)}
        return replace(self, **changed, **nested)


def of_one_step(batches: Sequence[B]) -> list[B]:
    """The batches, every number in them the sum over all."""
    found = [{item.name: getattr(batch, item.name) for item in fields(batch)} for batch in batches]
    totals = {name: sum(each[name] for each in found) for name, value in found[0].items() if isinstance(value, float)}
    return [replace(batch, **totals) for batch in batches]
