"""What `train vae` and `train prior` have in common: reading the data, training, checks in between, writing."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from tokenizers import Tokenizer

from colaserve_services.errors import CheckpointError
from colaserve_services.model.dit import DiT
from colaserve_services.model.text_vae import TextVAE
from colaserve_training.config import OptimizerConfig, RunConfig, full_rate
from colaserve_training.data import Data, Reader
from colaserve_training.generate import Generator, Sampling, reconstructed
from colaserve_training.interrupts import noticed
from colaserve_training.metrics import plot_losses, say
from colaserve_training.parallel import Objective, Parallel
from colaserve_training.release import (
    copy_prior,
    new_checkpoint,
    special_ids,
    write_companions,
    write_dit,
    write_vae,
)
from colaserve_training.trainer import Job, Trainer

_SAMPLES, _SAMPLE_TOKENS = 3, 16


@dataclass
class Task:
    """One command's networks and options; without a prior it is stage 1."""

    options: dict[str, Any]
    parallel: Parallel
    words: Tokenizer
    folder: Path  # of the tokenizer and the defaults
    fine_tuning: bool
    vae: TextVAE
    dit: DiT | None = None

    def __post_init__(self) -> None:
        self.special = special_ids(self.folder, self.words)
        self.out: Path = self.options["out"]

    def run(self, objective: Objective) -> None:
        """Train, and write the checkpoint; a signal in between ends the run with a state."""
        data, run = self._data(), self._run_config()
        prompts = self._prompts(data)
        if find_spec("matplotlib") is None:
            self._say("matplotlib is not installed: no loss.png will be drawn, metrics.jsonl has the numbers")
        with noticed(self.parallel.world == 1) as stop:
            job = Job(
                run, self.out / "run", self.parallel, self.options["resume"], stop=stop, data=data.digest,
                held_out=data.held_out, samples=lambda: self._samples(prompts),
            )  # fmt: skip
            trainer = Trainer(objective, data.source, job)
            trainer.run()
            weights = trainer.result()
            if self.parallel.rank == 0:
                self._write(weights)

    def _say(self, text: str) -> None:
        if self.parallel.rank == 0:
            say(text)

    def _run_config(self) -> RunConfig:
        width = self.vae.config.dim if self.dit is None else self.dit.config.txt_dim
        rate = self.options["lr"] or full_rate(width, self.fine_tuning)
        self._say(f"learning rate {rate:.3g}{', for fine-tuning' if self.fine_tuning else ''}")
        shared = {name: self.options[name] for name in ("muon_lr", "weight_decay", "clip", "warmup")}
        names = ("steps", "rows", "micro_batches", "seed", "ema", "save_every", "check_every", "autocast")
        optimizer = OptimizerConfig(adamw_lr=rate, **shared)
        return RunConfig(**{name: self.options[name] for name in names}, optimizer=optimizer)

    def _data(self) -> Data:
        end = self.special.pad if self.special.end_of_text is None else self.special.end_of_text
        context, seed, held_out = (self.options[name] for name in ("context", "seed", "held_out"))
        return Reader(self.words, context, end, seed, self.dit is None, held_out, self._say).read(self.options["data"])

    def _prompts(self, data: Data) -> list[list[int]]:
        """Ids of the beginnings that sample texts continue."""
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

    def _write(self, weights: dict[str, Any]) -> None:
        """The checkpoint, then the curves. What was not trained is copied or written as it was read."""
        try:
            with new_checkpoint(self.out) as draft:
                write_companions(self.folder, draft, self.words, self.special)
                write_vae(self.vae.config, weights.get("vae") or self.vae.state_dict(), draft, self.options["dtype"])
                if self.dit is not None:
                    write_dit(self.dit.config, weights["dit"], draft, self.options["dtype"])
                elif self.fine_tuning:
                    copy_prior(self.folder, draft)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{self.out}: the checkpoint could not be written ({error}); its weights are saved in "
                f"{self.out / 'run'}, and the same command with --resume writes it"
            ) from error
        self._say(f"{self.out}: written")
        plot_losses(self.out / "run")
