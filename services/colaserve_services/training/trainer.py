"""The training loop, the same for both stages, for one process and for several."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from colaserve_services.errors import UsageError
from colaserve_services.training.config import RunConfig
from colaserve_services.training.metrics import Metrics, plot_losses
from colaserve_services.training.optim import Ema, build_optimizers, rate_at, set_rate
from colaserve_services.training.parallel import SINGLE, Parallel
from colaserve_services.training.state import TrainingState, load_state, newest_state, save_state


class Stage(Protocol):
    """What a stage adds to the loop."""

    name: str
    module: nn.Module  # forward(batch) -> {"loss": ..., further parts}, normalised over the whole step

    def batches(self, step: int, rank: int, world: int) -> Sequence[Any]:
        """This process's micro-batches of a step; a function of its arguments and the stage's settings."""


class Trainer:
    """Runs a stage from its first or a resumed step to the last; `ema_weights` are the result."""

    def __init__(self, stage: Stage, config: RunConfig, folder: Path, parallel: Parallel = SINGLE, quiet: bool = False):
        self.stage, self.config, self.folder, self.parallel, self.quiet = stage, config, folder, parallel, quiet
        if config.rows % (config.micro_batches * parallel.world):
            parts = config.micro_batches * parallel.world
            raise UsageError(f"rows: got {config.rows}, expected a multiple of micro_batches x processes = {parts}")
        self.module = parallel.wrap(stage.module)
        self.optimizers = build_optimizers(stage.module, config.optimizer)
        self.ema = Ema(self._parameters(), config.ema)
        self.step = 0

    def run(self, until: int | None = None, resume: bool = False) -> None:
        """Train up to `until` (default: all steps). With `resume`, go on from the newest state if there is one."""
        if resume:
            self._resume()
        steps, rank = self.config.steps, self.parallel.rank
        metrics = Metrics(self.folder, self.step, steps, self.stage.name, self.quiet, rank)
        last = min(until or self.config.steps, self.config.steps)
        while self.step < last:
            values = self.train_step()
            metrics.step(self.step - 1, values, self.config.log_every)
            if self.config.save_every and self.step % self.config.save_every == 0:
                self.save()
        metrics.close()
        if self.parallel.rank == 0 and self.step == self.config.steps:
            plot_losses(metrics.path, self.folder / "loss.png")

    def train_step(self) -> dict[str, float]:
        """One update: gradients of all micro-batches, clipped, applied; the losses of the whole step."""
        rate = rate_at(self.step, self.config.steps, self.config.optimizer)
        set_rate(self.optimizers, rate, self.config.optimizer)
        parts = [self._backward(batch) for batch in self._batches()]
        norm = self._clip()
        for optimizer in self.optimizers.values():
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.ema.update(self._parameters(), self.step)
        self.step += 1
        sums = {name: self.parallel.total(torch.stack([part[name] for part in parts]).sum()) for name in parts[0]}
        if not all(map(_finite, sums.values())):
            raise UsageError(f"step {self.step}: the loss is not finite ({sums}); lower the learning rate")
        return {**sums, "rate": rate, "norm": norm}

    def _batches(self) -> Sequence[Any]:
        return self.stage.batches(self.step, self.parallel.rank, self.parallel.world)

    def _backward(self, batch: Any) -> dict[str, Tensor]:
        device = self.parallel.device
        precision = torch.autocast(device.type, torch.bfloat16) if self.config.autocast else nullcontext()
        with precision:
            parts = self.module(batch.to(device))
        (parts["loss"] * self.parallel.world).backward()  # processes average gradients; losses are shares of a sum
        return {name: value.detach() for name, value in parts.items()}

    def _clip(self) -> float:
        bound = self.config.optimizer.clip or float("inf")
        norm = nn.utils.clip_grad_norm_((p for _, p in self._parameters()), bound)
        return float(self.parallel.whole(norm))

    def _parameters(self) -> list[tuple[str, Tensor]]:
        return [(name, value) for name, value in self.stage.module.named_parameters() if value.requires_grad]

    def settings(self) -> dict[str, Any]:
        return {"stage": self.stage.name, **asdict(self.config)}

    def save(self) -> None:
        """Write a resumable state; every process takes part, the first one writes."""
        optimizers = {name: self.parallel.optimizer_state(opt) for name, opt in self.optimizers.items()}
        weights = {name: self.parallel.whole(value) for name, value in self._parameters()}
        ema = {name: self.parallel.whole(value) for name, value in self.ema.values.items()}
        if self.parallel.rank == 0:
            save_state(self.folder / "state", TrainingState(self.step, weights, ema, optimizers, self.settings()))
        self.parallel.barrier()

    def _resume(self) -> None:
        path = newest_state(self.folder / "state")
        if path is None:
            return
        state = load_state(path)
        _refuse_other_settings(state.settings, self.settings(), path)
        with torch.no_grad():
            for name, value in self._parameters():
                self.parallel.fill(value, state.weights[name])
                self.parallel.fill(self.ema.values[name], state.ema[name])
        for name, optimizer in self.optimizers.items():
            self.parallel.load_optimizer(optimizer, state.optimizers[name])
        self.step = state.step

    def ema_weights(self) -> dict[str, Tensor]:
        """The averaged (or, without averaging, the last) value of every trained parameter, whole, on the CPU."""
        source = self.ema.values.items() if self.config.ema else self._parameters()
        return {name: self.parallel.whole(value.detach()).cpu().clone() for name, value in source}


def _finite(value: float) -> bool:
    return value == value and abs(value) != float("inf")


def _refuse_other_settings(old: dict[str, Any], new: dict[str, Any], path: Path) -> None:
    new = json.loads(json.dumps(new))  # tuples become lists, as in the file
    different = [name for name in new if old.get(name) != new[name]]
    if different:
        name = different[0]
        raise UsageError(f"{path}: {name} was {old.get(name)} and is now {new[name]}; resume with the same settings")
