"""The two stages as functions, networks in and trained networks out: what the commands and the recipe are made of."""

from __future__ import annotations

from pathlib import Path

import torch

from colaserve_services.model.dit import DiT
from colaserve_services.model.text_vae import TextVAE
from colaserve_services.training.config import FlowConfig, JointConfig, RunConfig, VaeLossConfig
from colaserve_services.training.parallel import SINGLE, Parallel
from colaserve_services.training.prior_stage import PriorStage
from colaserve_services.training.rows import Source
from colaserve_services.training.trainer import Trainer
from colaserve_services.training.vae_stage import VaeStage


def train_vae(
    vae: TextVAE,
    source: Source,
    run: RunConfig,
    folder: Path,
    loss: VaeLossConfig | None = None,
    pad_id: int = 2,
    block_size: int = 4,
    parallel: Parallel = SINGLE,
    resume: bool = False,
    quiet: bool = False,
) -> TextVAE:
    """Stage 1. `folder` gets metrics, curves and states; the returned VAE holds the averaged weights."""
    stage = VaeStage(vae, source, run, loss or VaeLossConfig(), pad_id, block_size)
    trainer = Trainer(stage, run, folder, parallel, quiet)
    trainer.run(resume=resume)
    _adopt(vae, trainer, "vae.")
    return vae


def train_prior(
    dit: DiT,
    vae: TextVAE,
    source: Source,
    run: RunConfig,
    folder: Path,
    flow: FlowConfig | None = None,
    joint: JointConfig | None = None,
    pad_id: int = 2,
    parallel: Parallel = SINGLE,
    resume: bool = False,
    quiet: bool = False,
) -> DiT:
    """Stage 2. With `joint`, `vae` is trained along and changed too."""
    stage = PriorStage(dit, vae, source, run, flow or FlowConfig(), pad_id, joint)
    trainer = Trainer(stage, run, folder, parallel, quiet)
    trainer.run(resume=resume)
    _adopt(dit, trainer, "dit.")
    if joint:
        _adopt(vae, trainer, "vae_objective.vae.")
    return dit


@torch.no_grad()
def _adopt(model: TextVAE | DiT, trainer: Trainer, prefix: str) -> None:
    """Give `model` the run's result."""
    weights = {name.removeprefix(prefix): v for name, v in trainer.ema_weights().items() if name.startswith(prefix)}
    parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
    assert weights.keys() == parameters.keys(), "the trainer must know every parameter of the model"
    for name, value in weights.items():
        trainer.parallel.fill(parameters[name], value)
