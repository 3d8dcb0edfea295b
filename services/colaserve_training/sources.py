"""What `--data` names, as a stream of rows to train on and rows that are held out to validate."""

from __future__ import annotations

import hashlib
import random
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from colaserve_services.errors import UsageError
from colaserve_training.corpus import Corpus
from colaserve_training.data import read_dataset
from colaserve_training.rows import CorpusSource, ListSource, MixedSource, Row, Source, VaeSource

BUILT_IN = "demo"  # the name of the demo's corpus among the data
_MOST_HELD_OUT = 512  # rows of one data set
_OTHER_SEED = 1_000_003  # added to the seed: rows of the corpus to validate on


@dataclass(frozen=True)
class Data:
    """What a run reads."""

    source: Source
    held_out: tuple[Row, ...]
    digest: str  # equal for equal rows, weights and order


@dataclass(frozen=True)
class Reader:
    """How data become rows."""

    words: Tokenizer
    context: int
    end_id: int
    seed: int
    stage_one: bool
    held_out: float  # share of each file's rows that is not trained on
    tell: Callable[[str], object]

    def read(self, data: Sequence[str]) -> Data:
        """FILE, or FILE=WEIGHT where the share of rows is not to follow from the sizes; the demo's corpus is `demo`."""
        names, weights = zip(*map(_weighted, data or [BUILT_IN]), strict=True)
        if all(weight is None for weight in weights) and (len(names) == 1 or BUILT_IN not in names):
            return self._corpus() if names == (BUILT_IN,) else self._files(names)
        if None in weights:
            raise UsageError(f"--data {names[weights.index(None)]}: no weight; give each data set one, as in FILE=2")
        parts = [self._corpus() if name == BUILT_IN else self._files([name]) for name in names]
        source = MixedSource([part.source for part in parts], [weight or 0 for weight in weights], self.seed)
        held_out = tuple(row for part in parts for row in part.held_out)
        digest = " ".join(f"{part.digest}={weight:g}" for part, weight in zip(parts, weights, strict=True))
        return Data(source, held_out, digest)

    def _files(self, names: Sequence[str]) -> Data:
        dataset = read_dataset([Path(name) for name in names], self.words, self.context, self.end_id)
        count = min(int(len(dataset.rows) * self.held_out), _MOST_HELD_OUT)
        self.tell(f"{dataset.summary()}; {count} rows held out")
        chosen = set(random.Random(f"held out:{self.seed}").sample(range(len(dataset.rows)), count))
        rows = [row for place, row in enumerate(dataset.rows) if place not in chosen]
        held_out = tuple(dataset.rows[place] for place in sorted(chosen))
        return Data(ListSource(rows, self.seed), held_out, _digest(dataset.rows, count))

    def _corpus(self) -> Data:
        kind = VaeSource if self.stage_one else CorpusSource
        other = kind(Corpus(), self.words, self.seed + _OTHER_SEED)
        held_out = tuple(other.rows(0, 64)) if self.held_out else ()
        return Data(kind(Corpus(), self.words, self.seed), held_out, BUILT_IN)


def _weighted(text: str) -> tuple[str, float | None]:
    """FILE=WEIGHT as (file, weight); a name that has no number behind its last "=" is a file's."""
    name, equals, number = text.rpartition("=")
    if not equals or Path(text).exists():
        return text, None
    try:
        weight = float(number)
    except ValueError:
        return text, None
    if not 0 < weight < float("inf"):
        raise UsageError(f"--data {text}: got weight {number}, expected a number above 0")
    return name, weight


def _digest(rows: Sequence[Row], held_out: int) -> str:
    digest = hashlib.sha256(f"{held_out}".encode())
    for row in rows:
        digest.update(array("q", (row.prompt, len(row.ids), *row.ids)).tobytes())
    return digest.hexdigest()[:16]
