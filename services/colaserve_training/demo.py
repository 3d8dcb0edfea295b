"""`colaserve train demo`: the bundled checkpoint from nothing, the same bytes for the same seed on one machine."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from colaserve_eval.demo import demo_folder, demo_tasks
from colaserve_eval.records import Record
from colaserve_eval.scores import score
from colaserve_services.model.checkpoint import Checkpoint
from colaserve_training.config import PRESETS, FlowConfig, OptimizerConfig, RunConfig, VaeLossConfig
from colaserve_training.corpus import Corpus, Disturbance, tokenizer_text
from colaserve_training.generate import Generator, Sampling
from colaserve_training.interrupts import Stop
from colaserve_training.metrics import plot_losses
from colaserve_training.parallel import Objective, repeatable
from colaserve_training.prior_stage import PriorObjective
from colaserve_training.release import (
    GENERATION,
    load_dit,
    load_vae,
    new_checkpoint,
    new_dit,
    new_vae,
    write_dit,
    write_generation_config,
    write_vae,
)
from colaserve_training.rows import CorpusSource, Source, VaeSource
from colaserve_training.tokenizer import PAD_ID, save_tokenizer, train_tokenizer
from colaserve_training.trainer import Job, Trainer
from colaserve_training.vae_stage import VaeObjective

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
    polish_disturbance: Disturbance = field(default_factory=lambda: Disturbance(words=0.5, nonsense=0.5, opener=0.15))
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

    def train(name: str, objective: Objective, source: Source, config: RunConfig) -> None:
        trainer = Trainer(objective, source, Job(config, work / name, resume=resume, quiet=quiet, stop=stop))
        trainer.run()
        for network, weights in trainer.result().items():
            objective.get_submodule(network).load_state_dict(weights)

    repeatable()
    torch.manual_seed(seed)
    tokenizer = train_tokenizer(tokenizer_text(seed), recipe.vocab_size)
    vae = new_vae(PRESETS["demo"].vae_config(tokenizer.get_vocab_size()))
    rows, noisy = CorpusSource(Corpus(), tokenizer, seed), Corpus(recipe.polish_disturbance)
    texts = VaeSource(Corpus(), tokenizer, seed)
    train("vae", VaeObjective(vae, recipe.vae_loss, PAD_ID, 4), texts, replace(recipe.vae, seed=seed))
    vae.to(torch.bfloat16).float()  # the prior learns the space of the weights as they are served
    torch.manual_seed(seed + 1)
    dit = new_dit(PRESETS["demo"].dit_config())
    prior = PriorObjective(dit, vae, recipe.flow, PAD_ID)
    train("prior", prior, rows, replace(recipe.prior, seed=seed))
    train("polish", prior, CorpusSource(noisy, tokenizer, seed + 1), replace(recipe.polish, seed=seed + 1))
    with new_checkpoint(out) as draft:
        save_tokenizer(tokenizer, draft)
        write_generation_config(draft, **GENERATION, chat_frame=CHAT_FRAME)
        shutil.copytree(demo_folder() / "questions", draft / "questions")
        write_vae(vae.config, vae.state_dict(), draft, "bfloat16")
        write_dit(dit.config, dit.state_dict(), draft, "bfloat16")
    for name in RUNS:
        plot_losses(work / name)


def load_generator(folder: Path, sampling: Sampling | None = None) -> Generator:
    """A checkpoint's in-process generator, for evaluation."""
    checkpoint = Checkpoint.open(folder)
    tokenizer = Tokenizer.from_file(str(checkpoint.tokenizer_path))
    return Generator(load_vae(folder), load_dit(checkpoint), tokenizer, sampling)


def score_sets(generator: Generator, names: Sequence[str] | None = None, every: int = 1) -> dict[str, Any]:
    """Ask the demo's question sets of `names` (default: all), every `every`-th question: {name: {n, correct, ...}}."""
    tasks = [task for task in demo_tasks() if names is None or task.name in names]
    answered = {task.name: _answered(generator, task.questions[::every]) for task in tasks}
    figures: dict[str, Any] = score(answered)["tasks"]
    return figures


def _answered(generator: Generator, questions: Sequence[Record]) -> list[Record]:
    answers = generator.texts([question.prompt for question in questions])
    return [replace(question, generate=answer) for question, answer in zip(questions, answers, strict=True)]


def score_lines(figures: dict[str, Any]) -> str:
    """One line a set."""
    rows = ((name, found["correct"], found["n"], found["accuracy"]) for name, found in figures.items())
    return "\n".join(f"{name:32} {correct:5} / {count:5}  {share:6.2f} %" for name, correct, count, share in rows)
