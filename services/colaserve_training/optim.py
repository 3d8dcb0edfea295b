"""Optimizers, learning-rate schedule and averaged weights."""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from colaserve_services.model.cpu_features import lacks_bfloat16
from colaserve_training.config import OptimizerConfig, RunConfig


def build_optimizers(module: nn.Module, config: OptimizerConfig) -> dict[str, torch.optim.Optimizer]:
    """One AdamW, and a Muon for the matrices inside blocks if `muon_lr` is set; fixed order of parameters."""
    matrices, rest = list[nn.Parameter](), list[nn.Parameter]()
    for name, parameter in module.named_parameters():
        in_block = parameter.ndim == 2 and "blocks." in name and min(parameter.shape) > 1
        if parameter.requires_grad:
            (matrices if config.muon_lr and in_block else rest).append(parameter)
    adamw = torch.optim.AdamW(rest, lr=config.adamw_lr, betas=config.betas, weight_decay=config.weight_decay)
    optimizers: dict[str, torch.optim.Optimizer] = {"adamw": adamw}
    if matrices:
        optimizers["muon"] = Muon(matrices, lr=config.muon_lr, weight_decay=config.weight_decay)
    return optimizers


class Muon(torch.optim.Optimizer):
    """torch.optim.Muon, to the bit; but where a CPU lacks bfloat16 its products are in float32.

    They took 28 s a step of the demo's prior there instead of a fraction of one (docs/decisions.md).
    """

    def __init__(self, parameters: Iterable[Tensor], lr: float, weight_decay: float, momentum: float = 0.95):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is not None:
                    self._update(matrix, matrix.grad, **{name: v for name, v in group.items() if name != "params"})

    def _update(self, matrix: Tensor, gradient: Tensor, lr: float, weight_decay: float, momentum: float) -> None:
        mean = self.state[matrix].setdefault("momentum_buffer", torch.zeros_like(gradient))
        mean.lerp_(gradient, 1 - momentum)
        matrix.mul_(1 - lr * weight_decay)
        rows, columns = matrix.shape
        direction = _orthogonal(gradient.lerp(mean, momentum))
        matrix.add_(direction, alpha=-lr * math.sqrt(max(1, rows / columns)))


def _orthogonal(x: Tensor) -> Tensor:
    """Newton and Schulz's iteration: singular values near 1, in five steps of a quintic."""
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = x.shape[0] <= x.shape[1]
    x = x.float() if x.device.type == "cpu" and lacks_bfloat16() else x.bfloat16()
    x = x if wide else x.T
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.T


def rate_at(step: int, steps: int, config: OptimizerConfig) -> float:
    """Share of the full rate at `step`: linear warm-up, constant, then half a cosine down to `final`."""
    warm = min(1.0, (step + 1) / max(1, config.warmup))
    start = steps * (1 - config.cooldown)
    if step < start:
        return warm
    progress = (step - start) / max(1.0, steps - start)
    return warm * (config.final + (1 - config.final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def set_rate(optimizers: Mapping[str, torch.optim.Optimizer], step: int, run: RunConfig) -> float:
    """Give each optimizer its rate for a step; returns the share of the full rate."""
    share = rate_at(step, run.steps, run.optimizer)
    full = {"adamw": run.optimizer.adamw_lr, "muon": run.optimizer.muon_lr}
    for name, optimizer in optimizers.items():
        for group in optimizer.param_groups:
            group["lr"] = share * full[name]
    return share


class Ema:
    """Exponential moving average of parameters; its memory grows from a few steps to 1 / (1 - decay)."""

    def __init__(self, parameters: Iterable[tuple[str, Tensor]], decay: float):
        self.decay = decay
        self.values = {name: value.detach().clone() for name, value in parameters}

    @torch.no_grad()
    def update(self, parameters: Iterable[tuple[str, Tensor]], step: int) -> None:
        """Fold in the weights after `step` (from 0): average += (1 - decay') * (weights - average)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, value in parameters:
            self.values[name].lerp_(value.detach(), 1 - decay)
