"""`colaserve train demo`: the bundled checkpoint from nothing, the same bytes for the same seed on one machine."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from tokenizers import Tokenizer

from colaserve_services.model.checkpoint import Checkpoint
from colaserve_training.config import FlowConfig, OptimizerConfig, RunConfig, VaeLossConfig
from colaserve_training.corpus import Corpus, Mix, tokenizer_text
from colaserve_training.evaluate import Score
from colaserve_training.generate import Generator, Sampling
from colaserve_training.init import new_dit, new_vae
from colaserve_training.interrupts import Stop
from colaserve_training.metrics import plot_losses
from colaserve_training.parallel import repeatable
from colaserve_training.presets import PRESETS
from colaserve_training.questions import write_question_sets
from colaserve_training.release import (
    GENERATION,
    load_dit,
    load_vae,
    new_checkpoint,
    write_dit,
    write_generation_config,
    write_vae,
)
from colaserve_training.rows import CorpusSource, VaeSource
from colaserve_training.stages import train_prior, train_vae
from colaserve_training.tokenizer import save_tokenizer, train_tokenizer
from colaserve_training.trainer import Job

CHAT_FRAME = "User: {prompt}\nAssistant:"
RUNS = ("vae", "prior", "polish")


@dataclass(frozen=True)
class DemoRecipe:
    """The whole run; the defaults made the bundled checkpoint."""

    seed: int = 0
    vocab_size: int = 2816
    vae: RunConfig = field(
        default_factory=lambda: RunConfig(
            steps=1200, rows=24, ema=0.99, log_every=50,
            optimizer=OptimizerConfig(adamw_lr=3e-3, warmup=30),
        )
    )  # fmt: skip
    prior: RunConfig = field(
        default_factory=lambda: RunConfig(
            steps=3600, rows=64, micro_batches=2, ema=0.998, log_every=50, save_every=300, autocast=True,
            optimizer=OptimizerConfig(adamw_lr=2e-3, muon_lr=0.02, cooldown=0.6),
        )
    )  # fmt: skip
    polish: RunConfig = field(
        default_factory=lambda: RunConfig(
            steps=1000, rows=64, micro_batches=2, ema=0.995, log_every=50, save_every=250, autocast=True,
            optimizer=OptimizerConfig(adamw_lr=1e-3, muon_lr=0.01, cooldown=0.9),
        )
    )  # fmt: skip
    polish_mix: Mix = field(default_factory=lambda: Mix(words=0.5, nonsense=0.5, opener=0.15))
    vae_loss: VaeLossConfig = field(default_factory=lambda: VaeLossConfig(decoder_noise=0.4))
    flow: FlowConfig = field(default_factory=FlowConfig)

    def scaled(self, vae_steps: int | None, prior_steps: int | None) -> DemoRecipe:
        """The same recipe with other numbers of steps (`prior_steps` for both passes of stage 2); None keeps one."""
        vae = replace(self.vae, steps=vae_steps or self.vae.steps)
        prior, polish = (replace(run, steps=prior_steps or run.steps) for run in (self.prior, self.polish))
        return replace(self, vae=vae, prior=prior, polish=polish)


def make_demo(
    out: Path, work: Path, recipe: DemoRecipe, resume: bool = False, quiet: bool = False, stop: Stop | None = None
) -> None:
    """Tokenizer, VAE, prior: the checkpoint into `out` (bfloat16), metrics and resumable states into `work`.

    The prior is trained twice: to know the facts, then more briefly with noisier questions, to know what they ask for.
    """
    seed, stop = recipe.seed, stop or Stop()

    def job(name: str, config: RunConfig) -> Job:
        return Job(config, work / name, resume=resume, quiet=quiet, stop=stop)

    seed_everything(seed)
    tokenizer = train_tokenizer(tokenizer_text(seed), recipe.vocab_size)
    vae = new_vae(PRESETS["demo"].vae_config(tokenizer.get_vocab_size()))
    train_vae(vae, VaeSource(Corpus(), tokenizer, seed), job("vae", replace(recipe.vae, seed=seed)), recipe.vae_loss)
    vae.to(torch.bfloat16).float()  # the prior learns the space of the weights as they are served
    seed_everything(seed + 1)
    dit = new_dit(PRESETS["demo"].dit_config())
    rows, noisy = CorpusSource(Corpus(), tokenizer, seed), CorpusSource(Corpus(recipe.polish_mix), tokenizer, seed + 1)
    train_prior(dit, vae, rows, job("prior", replace(recipe.prior, seed=seed)), recipe.flow)
    train_prior(dit, vae, noisy, job("polish", replace(recipe.polish, seed=seed + 1)), recipe.flow)
    with new_checkpoint(out) as draft:
        save_tokenizer(tokenizer, draft)
        write_generation_config(draft, **GENERATION, chat_frame=CHAT_FRAME)
        write_question_sets(draft / "questions")
        write_vae(vae, draft, "bfloat16")
        write_dit(dit, draft, "bfloat16")
    for name in RUNS:
        plot_losses(work / name)


def seed_everything(seed: int) -> None:
    """Every random generator there is; and only deterministic kernels from here on."""
    random.seed(seed)
    torch.manual_seed(seed)
    repeatable()


def load_generator(folder: Path, sampling: Sampling | None = None) -> Generator:
    """A checkpoint's in-process generator, for evaluation."""
    checkpoint = Checkpoint.open(folder)
    tokenizer = Tokenizer.from_file(str(checkpoint.tokenizer_path))
    return Generator(load_vae(folder), load_dit(checkpoint), tokenizer, sampling)


def score_table(scores: dict[str, Score]) -> str:
    """One line a set."""
    lines = (f"{name:32} {score.correct:5} / {score.count:5}  {score.percent:6.2f} %" for name, score in scores.items())
    return "\n".join(lines)
