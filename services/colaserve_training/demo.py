"""`colaserve train demo`: the bundled checkpoint from nothing, the same bytes for the same seed on one machine."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from colaserve_eval.demo import demo_folder, demo_tasks
from colaserve_eval.scoring import score
from colaserve_training import release
from colaserve_training.config import PRESETS, OptimizerConfig, RunConfig, VaeLossConfig
from colaserve_training.corpus import Corpus, tokenizer_text
from colaserve_training.generate import Generator, Sampling
from colaserve_training.metrics import plot_losses
from colaserve_training.parallel import Objective, repeatable
from colaserve_training.prior_stage import PriorObjective
from colaserve_training.release import load_dit, load_vae, new_dit, new_vae, write_network
from colaserve_training.rows import CorpusSource, Source, VaeSource
from colaserve_training.state import drafted
from colaserve_training.tokenizer import PAD_ID, save_tokenizer, train_tokenizer
from colaserve_training.trainer import Stop, Trainer
from colaserve_training.vae_stage import VaeObjective

CHAT_FRAME = "User: {prompt}\nAssistant:"
RUNS = ("vae", "prior", "polish")


VAE_RUN = RunConfig(
    steps=1200, rows=24, ema=0.99, log_every=50, check_every=0, optimizer=OptimizerConfig(adamw_lr=3e-3, warmup=30)
)  # fmt: skip
PRIOR_RUN = RunConfig(
    steps=3600, rows=64, micro_batches=2, ema=0.998, log_every=50, save_every=300, check_every=0, autocast=True,
    optimizer=OptimizerConfig(adamw_lr=2e-3, muon_lr=0.02, cooldown=0.6),
)  # fmt: skip
POLISH_RUN = RunConfig(
    steps=1000, rows=64, micro_batches=2, ema=0.995, log_every=50, save_every=250, check_every=0, autocast=True,
    optimizer=OptimizerConfig(adamw_lr=1e-3, muon_lr=0.01, cooldown=0.9),
)  # fmt: skip
POLISH = Corpus(words=0.5, nonsense=0.5, opener=0.15)
DEMO_LOSS = VaeLossConfig(decoder_noise=0.4)


@dataclass(frozen=True)
class DemoRecipe:
    """The whole run; the defaults made the bundled checkpoint."""

    seed: int = 0
    vocab_size: int = 2816
    vae: RunConfig = VAE_RUN
    prior: RunConfig = PRIOR_RUN
    polish: RunConfig = POLISH_RUN

    def scaled(self, vae_steps: int | None, prior_steps: int | None) -> "DemoRecipe":
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
        trainer = Trainer(objective, source, config, work / name, resume=resume, quiet=quiet, stop=stop)
        trainer.run()
        for network, weights in trainer.result().items():
            objective.get_submodule(network).load_state_dict(weights)

    repeatable()
    torch.manual_seed(seed)
    tokenizer = train_tokenizer(tokenizer_text(seed), recipe.vocab_size)
    vae = new_vae(PRESETS["demo"].vae_config(tokenizer.get_vocab_size()))
    texts = VaeSource(Corpus(), tokenizer, seed)
    train("vae", VaeObjective(vae, PAD_ID, 4, DEMO_LOSS), texts, replace(recipe.vae, seed=seed))
    vae.to(torch.bfloat16).float()  # the prior learns the space of the weights as they are served
    torch.manual_seed(seed + 1)
    dit = new_dit(PRESETS["demo"].dit_config())
    prior = PriorObjective(dit, vae, PAD_ID)
    train("prior", prior, CorpusSource(Corpus(), tokenizer, seed), replace(recipe.prior, seed=seed))
    train("polish", prior, CorpusSource(POLISH, tokenizer, seed + 1), replace(recipe.polish, seed=seed + 1))
    with drafted(out) as draft:
        save_tokenizer(tokenizer, draft)
        release.write_generation_config(draft, **release.GENERATION, chat_frame=CHAT_FRAME)
        shutil.copytree(demo_folder() / "questions", draft / "questions")
        write_network("vae", vae.config, vae.state_dict(), draft, "bfloat16")
        write_network("dit", dit.config, dit.state_dict(), draft, "bfloat16")
    for name in RUNS:
        plot_losses(work / name)


def load_generator(folder: Path, sampling: Sampling | None = None) -> Generator:
    """A checkpoint's in-process generator, for evaluation."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return Generator(load_vae(folder), load_dit(folder), tokenizer, sampling)


def score_sets(generator: Generator, names: Sequence[str] | None = None, every: int = 1) -> dict[str, Any]:
    """The score of the demo's question sets of `names` (default: all), of every `every`-th question."""
    answered = {}
    for task in demo_tasks():
        if names is None or task.name in names:
            asked = task.questions[::every]
            answers = generator.texts([question.prompt for question in asked])
            answered[task.name] = [replace(each, generate=text) for each, text in zip(asked, answers, strict=True)]
    return score(answered)
