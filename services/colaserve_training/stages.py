"""The two stages as functions: networks in, the same networks with the run's averaged weights out."""

from __future__ import annotations

import torch
from torch import nn

from colaserve_services.model.dit import DiT
from colaserve_services.model.text_vae import TextVAE
from colaserve_training.config import FlowConfig, JointConfig, VaeLossConfig
from colaserve_training.prior_stage import PriorStage
from colaserve_training.rows import Source
from colaserve_training.trainer import Job, Trainer
from colaserve_training.vae_stage import VaeStage


def train_vae(
    vae: TextVAE, source: Source, job: Job, loss: VaeLossConfig | None = None, pad_id: int = 2, block_size: int = 4
) -> None:
    """Stage 1. The job's folder gets metrics and states; afterwards `vae` holds the averaged weights."""
    trainer = Trainer(VaeStage(vae, source, job.config, loss or VaeLossConfig(), pad_id, block_size), job)
    trainer.run()
    _adopt(trainer, {"vae.": vae})


def train_prior(
    dit: DiT,
    vae: TextVAE,
    source: Source,
    job: Job,
    flow: FlowConfig | None = None,
    joint: JointConfig | None = None,
    pad_id: int = 2,
) -> None:
    """Stage 2. With `joint`, `vae` is trained along and changed too."""
    trainer = Trainer(PriorStage(dit, vae, source, job.config, flow or FlowConfig(), pad_id, joint), job)
    trainer.run()
    _adopt(trainer, {"dit.": dit, "vae_objective.vae.": vae} if joint else {"dit.": dit})


@torch.no_grad()
def _adopt(trainer: Trainer, models: dict[str, nn.Module]) -> None:
    """Give the models the run's result: whole tensors, on the first process alone where there are several."""
    weights, parallel = trainer.ema_weights(), trainer.parallel
    for prefix, model in models.items():
        frozen = parallel.gather((name, p) for name, p in model.named_parameters() if not p.requires_grad)
        if parallel.rank > 0:
            continue
        trained = {name.removeprefix(prefix): v for name, v in weights.items() if name.startswith(prefix)}
        assert trained.keys() | frozen.keys() == dict(model.named_parameters()).keys(), "every parameter has a value"
        for name, value in {**trained, **frozen}.items():
            owner, _, leaf = name.rpartition(".")
            gradient = model.get_parameter(name).requires_grad
            setattr(model.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=gradient))
