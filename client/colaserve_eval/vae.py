"""How faithful the latent space is: texts to latents and back, without the prior."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from colaserve_client.reading import read_lines
from colaserve_client.results import Reconstruction
from colaserve_client.writing import write_file
from colaserve_eval.pool import work_through
from colaserve_eval.records import EvalError, json_text, parse_lines, readable
from colaserve_eval.tables import Table

BATCH_TEXTS, BATCH_CHARACTERS = 32, 20_000  # of one call: enough to fill a batch, small enough for progress to show
VAE_FILE = "vae.json"


class Reconstructor(Protocol):
    """What the measurement needs of a client; `colaserve_client.AsyncClient` is one."""

    async def reconstruct(self, texts: Sequence[str]) -> Sequence[Reconstruction]:
        """The round trip of each text, in order."""


@dataclass(frozen=True)
class VaeQuality:
    """The round trip of a corpus. Every mean is over tokens, so that long texts count for more."""

    texts: int
    exact_texts: int  # came back unchanged, to the character
    tokens: int
    wrong_tokens: int
    bits: float  # -log2 of the decoder's probability of the right tokens, summed
    utf8_bytes: int

    def __add__(self, other: "VaeQuality") -> "VaeQuality":
        return VaeQuality(
            self.texts + other.texts,
            self.exact_texts + other.exact_texts,
            self.tokens + other.tokens,
            self.wrong_tokens + other.wrong_tokens,
            self.bits + other.bits,
            self.utf8_bytes + other.utf8_bytes,
        )

    def to_json(self) -> dict[str, Any]:
        """Shares in per cent, bits as they are; `bits_per_byte` compares across tokenizers."""
        return {
            "texts": self.texts,
            "exact_texts": self.exact_texts,
            "tokens": self.tokens,
            "token_accuracy": round(100 * (1 - self.wrong_tokens / self.tokens), 4),
            "bits_per_token": round(self.bits / self.tokens, 6),
            "bits_per_byte": round(self.bits / self.utf8_bytes, 6),
        }


def read_texts(path: Path) -> list[str]:
    """The texts of a file: of a .jsonl file the field `text` of each line, else one text a non-empty line."""
    texts = [text for _, text in parse_lines(path, _text)] if path.suffix == ".jsonl" else _lines(path)
    if not texts:
        raise EvalError(f"{path}: holds no text")
    return texts


async def measure(
    model: Reconstructor, texts: Sequence[str], concurrency: int = 4, on_texts: Callable[[int], None] = lambda n: None
) -> VaeQuality:
    """The round trip of all texts; `on_texts` hears how many of them are through."""
    results: list[VaeQuality] = []

    async def work(batch: list[str]) -> None:
        results.append(quality(batch, await model.reconstruct(batch)))
        on_texts(len(batch))

    await work_through(batched(texts), work, concurrency)
    return sum(results[1:], start=results[0])


def quality(texts: Sequence[str], trips: Iterable[Reconstruction]) -> VaeQuality:
    """The sums of one call."""
    pairs = list(zip(texts, trips, strict=True))
    return VaeQuality(
        texts=len(pairs),
        exact_texts=sum(trip.text == text for text, trip in pairs),
        tokens=sum(len(trip.original_ids) for _, trip in pairs),
        wrong_tokens=sum(_wrong_tokens(trip) for _, trip in pairs),
        bits=sum(len(trip.original_ids) * trip.bits_per_token for _, trip in pairs),
        utf8_bytes=sum(len(text.encode()) for text, _ in pairs),
    )


def _wrong_tokens(trip: Reconstruction) -> int:
    return sum(came != went for came, went in zip(trip.token_ids, trip.original_ids, strict=True))


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


def write_quality(quality: VaeQuality, folder: Path) -> None:
    """Write the figures as JSON into a folder, made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / VAE_FILE, json_text(quality.to_json()) + "\n")


def quality_table(figures: Mapping[str, Any]) -> Table:
    """A row a figure, from the JSON of a quality."""
    return ["figure", "value"], [[name, str(value)] for name, value in figures.items()]


def _text(fields: Any) -> str:
    text = fields.get("text")
    if not isinstance(text, str) or not text:
        raise ValueError(f"text: expected a string that is not empty, got {text!r}")
    return text


def _lines(path: Path) -> list[str]:
    with readable():
        return [line for _, line in read_lines(path) if line.strip()]
