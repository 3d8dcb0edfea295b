"""What `--data` names, as a stream of rows to train on and rows that are held out to validate.

Files are text, or JSON lines with `text` or with `prompt` and `response`, and are checked as a whole first. What makes
a file unusable (not there, not UTF-8, not JSON, a missing field) is an error that names file and line. Empty records
and prompt/response pairs longer than the context are left out and counted; longer text is cut into pieces.
"""

import hashlib
import random
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from colaserve_client.reading import Unreadable, parse_json, read_lines
from colaserve_services.errors import UsageError
from colaserve_training.corpus import Corpus
from colaserve_training.rows import CorpusSource, ListSource, MixedSource, Row, Source, VaeSource, row_of

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
    say: Callable[[str], object]

    def read(self, data: Sequence[str]) -> Data:
        """FILE, or FILE=WEIGHT where the share of rows is not to follow from the sizes; the demo's corpus is `demo`."""
        names, weights = zip(*map(_weighted, data or [BUILT_IN]), strict=True)
        if all(weight is None for weight in weights) and (len(names) == 1 or BUILT_IN not in names):
            return self._corpus() if names == (BUILT_IN,) else self._files(names)
        if None in weights:
            raise UsageError(f"--data {names[weights.index(None)]}: no weight; give each data set one, as in FILE=2")
        parts = [self._corpus() if name == BUILT_IN else self._files([name]) for name in names]
        source = MixedSource([part.source for part in parts], [weight or 0 for weight in weights])
        held_out = tuple(row for part in parts for row in part.held_out)
        digest = " ".join(f"{part.digest}={weight:g}" for part, weight in zip(parts, weights, strict=True))
        return Data(source, held_out, digest)

    def _files(self, names: Sequence[str]) -> Data:
        found = self._rows([Path(name) for name in names])
        count = min(int(len(found) * self.held_out), _MOST_HELD_OUT)
        self.say(f"data: {count} rows held out")
        chosen = set(random.Random(f"held out:{self.seed}").sample(range(len(found)), count))
        rows = [row for index, row in enumerate(found) if index not in chosen]
        held_out = tuple(found[index] for index in sorted(chosen))
        return Data(ListSource(rows, self.seed), held_out, _digest(found, count))

    def _rows(self, paths: Sequence[Path]) -> list[Row]:
        """The rows of all records; one line says how many were left out or cut."""
        rows: list[Row] = []
        count: Counter[str] = Counter()
        for prompt, response in (record for path in paths for record in read_records(path)):
            row = row_of(self.words, prompt, response, self.end_id)
            too_long = len(row.ids) > self.context
            if not response.strip():
                count["empty"] += 1
            elif row.prompt and too_long:
                count["long"] += 1
            else:
                count["cut"] += too_long
                starts = range(0, len(row.ids), self.context)
                rows += [Row(row.ids[at : at + self.context]) for at in starts] if too_long else [row]
        tokens = sum(len(row.ids) for row in rows)
        summary = (
            f"data: {len(rows):,} rows, {tokens:,} tokens from {len(paths)} file(s); {count['empty']} empty left out, "
            f"{count['long']} pairs over {self.context} tokens left out, {count['cut']} longer texts cut into pieces"
        )
        if not rows:
            raise UsageError(f"{', '.join(map(str, paths))}: nothing to train on ({summary})")
        self.say(summary)
        return rows

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


def read_records(path: Path) -> Iterator[tuple[str, str]]:
    """(prompt, response) of each line of a .jsonl file, or of each paragraph of another one. Text has no prompt."""
    try:
        lines = list(read_lines(path))
        if not any(line.strip() for _, line in lines):
            raise UsageError(f"{path}: the file is empty")
        if path.suffix == ".jsonl":
            yield from (_record(line, number, path) for number, line in lines)
        else:
            for empty, group in groupby((line for _, line in lines), key=lambda line: not line):
                if not empty:
                    yield "", "\n".join(group).strip()
    except Unreadable as error:
        raise UsageError(str(error)) from error


def _record(line: str, number: int, path: Path) -> tuple[str, str]:
    where = f"{path}:{number}"
    if not line.strip():
        return "", ""
    value = parse_json(line, str(path), number)
    if not isinstance(value, dict):
        raise UsageError(f"{where}: got {type(value).__name__}, expected an object with text, or prompt and response")
    if "text" in value:
        return "", _text(value, "text", where)
    return _text(value, "prompt", where), _text(value, "response", where)


def _text(value: dict[str, Any], field: str, where: str) -> str:
    found = value.get(field)
    if not isinstance(found, str):
        got = "nothing" if found is None else type(found).__name__
        raise UsageError(f"{where}: {field}: got {got}, expected a string (records have text, or prompt and response)")
    return found
