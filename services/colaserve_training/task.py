"""What `train vae` and `train prior` have in common: reading the data, checks in between, writing the checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from tokenizers import Tokenizer

from colaserve_services.errors import CheckpointError
from colaserve_services.model.dit import DiT
from colaserve_services.model.text_vae import TextVAE
from colaserve_training.config import RunConfig
from colaserve_training.generate import Generator, Sampling, reconstructed
from colaserve_training.interrupts import noticed
from colaserve_training.metrics import plot_losses, say
from colaserve_training.parallel import Parallel
from colaserve_training.presets import full_rate
from colaserve_training.release import (
    new_checkpoint,
    special_ids,
    write_companions,
    write_dit,
    write_vae,
)
from colaserve_training.rows import Source
from colaserve_training.sources import Data, Reader
from colaserve_training.trainer import Job

_SAMPLES, _SAMPLE_TOKENS = 3, 16


@dataclass
class Task:
    """One command's networks and options; without a prior it is stage 1."""

    options: dict[str, Any]
    run: RunConfig
    parallel: Parallel
    words: Tokenizer
    folder: Path  # of the tokenizer and the defaults
    fine_tuning: bool
    vae: TextVAE
    dit: DiT | None = None

    def __post_init__(self) -> None:
        self.special = special_ids(self.folder, self.words)
        self.tell: Callable[[str], object] = say if self.parallel.rank == 0 else str

    @contextmanager
    def job(self) -> Iterator[tuple[Job, Source]]:
        """The run and its rows; signals are noticed while it lasts."""
        out, data = self.options["out"], self._data()
        run, prompts = self._with_rate(), self._prompts(data)
        if find_spec("matplotlib") is None:
            self.tell("matplotlib is not installed: no loss.png will be drawn, metrics.jsonl has the numbers")
        with noticed(self.parallel.world == 1) as stop:
            job = Job(
                run, out / "run", self.parallel, self.options["resume"], stop=stop, data=data.digest,
                held_out=data.held_out, samples=lambda: self._samples(prompts),
            )  # fmt: skip
            yield job, data.source

    def _with_rate(self) -> RunConfig:
        width = self.vae.config.dim if self.dit is None else self.dit.config.txt_dim
        rate = self.options["lr"] or full_rate(width, self.fine_tuning)
        self.tell(f"learning rate {rate:.3g}{', for fine-tuning' if self.fine_tuning else ''}")
        return replace(self.run, optimizer=replace(self.run.optimizer, adamw_lr=rate))

    def _data(self) -> Data:
        end = self.special.pad if self.special.end_of_text is None else self.special.end_of_text
        context, seed, held_out = (self.options[name] for name in ("context", "seed", "held_out"))
        return Reader(self.words, context, end, seed, self.dit is None, held_out, self.tell).read(self.options["data"])

    def _prompts(self, data: Data) -> list[list[int]]:
        """Ids of the beginnings that sample texts go on from."""
        if self.options["prompts"]:
            return [self.words.encode(text, add_special_tokens=False).ids for text in self.options["prompts"]]
        rows = data.held_out[:_SAMPLES] or data.source.rows(0, _SAMPLES)
        return [list(row.ids[: row.prompt or -(-len(row.ids) // 2)]) for row in rows]

    def _samples(self, prompts: list[list[int]]) -> list[str]:
        """The prompts and what the prior writes after them; in stage 1, what the VAE makes of the prompts."""
        if self.dit is None:
            return [self.words.decode(ids) for ids in reconstructed(self.vae, prompts, self.special.pad)]
        sampling = Sampling(max_new_tokens=_SAMPLE_TOKENS, end_ids=self.special.end, pad_id=self.special.pad)
        found = Generator(self.vae, self.dit, self.words, sampling).tokens(prompts)
        return [self.words.decode([*ids, *new]) for ids, new in zip(prompts, found, strict=True)]

    def write(self, rest: Callable[[Path, Path], None] | None = None) -> None:
        """The first process writes the checkpoint, then the curves. `rest` copies what was not trained."""
        if self.parallel.rank > 0:
            return
        out = self.options["out"]
        try:
            with new_checkpoint(out) as draft:
                write_companions(self.folder, draft, self.words, self.special)
                write_vae(self.vae, draft, self.options["dtype"])
                if self.dit is not None:
                    write_dit(self.dit, draft, self.options["dtype"])
                if rest is not None:
                    rest(self.folder, draft)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{out}: the checkpoint could not be written ({error}); its weights are saved in {out / 'run'}, "
                f"and the same command with --resume writes it"
            ) from error
        self.tell(f"{out}: written")
        plot_losses(out / "run")
