"""The training loop, the same for both stages, for one process and for several."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from colaserve_services.errors import UsageError
from colaserve_services.model.cpu_features import lacks_bfloat16
from colaserve_training.config import RunConfig
from colaserve_training.interrupts import Stop, Stopped
from colaserve_training.metrics import Metrics, say
from colaserve_training.optim import Ema, build_optimizers, set_rate
from colaserve_training.parallel import SINGLE, Objective, Parallel, like, shard_again, whole
from colaserve_training.rows import Row, Source, micro_batches
from colaserve_training.state import TrainingState, load_newest, save_state


@dataclass(frozen=True)
class Job:
    """One run: its settings, its folder, and what surrounds it."""

    config: RunConfig
    folder: Path  # metrics and resumable states
    parallel: Parallel = SINGLE
    resume: bool = False
    quiet: bool = False
    stop: Stop = field(default_factory=Stop)
    data: str = ""  # which; a run is resumed with the same
    held_out: Sequence[Row] = ()  # rows that are not trained on
    samples: Callable[[], Sequence[str]] | None = None  # texts of the network as it is


class Trainer:
    """Trains an objective on the rows of a source, from the first or a resumed step to the last."""

    def __init__(self, objective: Objective, source: Source, job: Job):
        self.objective, self.source, self.job = objective, source, job
        self.config, self.parallel = job.config, job.parallel
        parts = self.config.micro_batches * self.parallel.world
        if self.config.rows % parts:
            raise UsageError(
                f"rows: got {self.config.rows}, expected a multiple of micro_batches x processes = {parts}"
            )
        self.quiet = job.quiet or self.parallel.rank > 0
        self.module = self.parallel.wrap(objective)
        self.optimizers = build_optimizers(objective, self.config.optimizer)
        self.ema = Ema(self._parameters(), self.config.ema)
        self.step = 0

    def run(self) -> None:
        """Train to the last step. A signal ends the run earlier: its state is saved, and `Stopped` is raised."""
        if self.config.autocast and self.parallel.device.type == "cpu" and (lack := lacks_bfloat16()):
            self._say(f"{self.objective.name}: {lack}: products are computed in float32, which is faster then")
        if self.job.resume:
            self._resume()
        elif self.parallel.rank == 0:
            shutil.rmtree(self.job.folder / "state", ignore_errors=True)  # of a run that this one replaces
        name, rank = self.objective.name, self.parallel.rank
        with Metrics(self.job.folder, self.step, self.config, name, self.quiet, rank) as metrics:
            while self.step < self.config.steps:
                values = self.train_step()
                if _due(self.config.check_every, self.step):
                    values |= self._check()
                metrics.step(self.step - 1, values)
                self._save_if_due()

    def _say(self, text: str) -> None:
        if not self.quiet:
            say(text)

    def _save_if_due(self) -> None:
        signal = self.parallel.largest(self.job.stop.signal)
        finished = self.step == self.config.steps
        if signal or finished or _due(self.config.save_every, self.step):
            saved = self.save()
        if signal and not finished:
            raise Stopped(signal, f"stopped after step {self.step} of {self.config.steps}; {saved}")

    def train_step(self) -> dict[str, float]:
        """One update: gradients of all micro-batches, clipped, applied; the losses of the whole step."""
        rate = set_rate(self.optimizers, self.step, self.config)
        parts = [self._backward(batch) for batch in self._batches()]
        sums = {name: self.parallel.total(torch.stack([part[name] for part in parts]).sum()) for name in parts[0]}
        bound = self.config.optimizer.clip or float("inf")
        norm = float(whole(nn.utils.clip_grad_norm_((p for _, p in self._parameters()), bound)))
        if not all(map(math.isfinite, (*sums.values(), norm))):
            raise UsageError(
                f"step {self.step + 1}: the loss or its gradient is not finite ({sums}, norm {norm}); "
                f"lower the learning rate"
            )
        for optimizer in self.optimizers.values():
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.ema.update(self._parameters(), self.step)
        self.step += 1
        return {**sums, "rate": rate, "norm": norm}

    def _batches(self) -> Sequence[Any]:
        groups = micro_batches(self.source.rows(self.step, self.config.rows), self.config.micro_batches)
        seed = f"{self.objective.name}:{self.config.seed}:{self.step}"
        return self.objective.draw(groups, seed, self.parallel.rank, self.parallel.world)

    def _backward(self, batch: Any) -> dict[str, Tensor]:
        with self._precision():
            parts = self.module(batch.to(self.parallel.device))
        (parts["loss"] * self.parallel.world).backward()  # processes average gradients; losses are shares of a sum
        return {name: value.detach() for name, value in parts.items()}

    def _precision(self) -> AbstractContextManager[Any]:
        device = self.parallel.device.type
        narrow = self.config.autocast and not (device == "cpu" and lacks_bfloat16())
        return torch.autocast(device, torch.bfloat16) if narrow else nullcontext()

    def _check(self) -> dict[str, float]:
        """Validation loss and sample texts with the averaged weights, which are what a run is for."""
        with torch.no_grad(), self._averaged():
            if self.job.samples is not None:
                texts = self.objective.apply_whole(self.job.samples)
                self._say("\n".join(f"  step {self.step}: {text!r}" for text in texts))
            losses = [self._validation(part) for part in self._held_out()]
        return {"validation": sum(losses) / len(losses)} if losses else {}

    def _held_out(self) -> list[list[Row]]:
        """The held-out rows in parts of a micro-batch, each with rows for every process."""
        size, world = self.config.rows // self.config.micro_batches, self.parallel.world
        parts = [list(self.job.held_out[start : start + size]) for start in range(0, len(self.job.held_out), size)]
        return [part[: len(part) // world * world] for part in parts if len(part) >= world]

    def _validation(self, rows: list[Row]) -> float:
        (batch,) = self.objective.draw([rows], "validation", self.parallel.rank, self.parallel.world)
        with self._precision():
            return self.parallel.total(self.module(batch.to(self.parallel.device))["loss"])

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The network with the averaged weights instead of its own."""
        own = {name: value.detach().clone() for name, value in self._parameters()}
        if self.config.ema:
            self._set(self.ema.values)
        try:
            yield
        finally:
            shard_again(self.module)
            self._set(own)

    @torch.no_grad()
    def _set(self, values: Mapping[str, Tensor]) -> None:
        for name, value in self._parameters():
            value.copy_(values[name])

    def _parameters(self) -> list[tuple[str, Tensor]]:
        return [(name, value) for name, value in self.objective.named_parameters() if value.requires_grad]

    def _settings(self) -> dict[str, Any]:
        """What a resumed run must have in common with the one before."""
        config = {name: value for name, value in asdict(self.config).items() if not name.endswith("_every")}
        parameters = sum(value.numel() for _, value in self._parameters())
        return {"stage": self.objective.name, "data": self.job.data, "parameters": parameters, **config}

    def save(self) -> str:
        """Write a resumable state and say where; every process takes part, the first one writes.

        A state that cannot be written (a full disk) does not end the run: earlier ones are still there.
        """
        tensors = self.parallel.gather(self._state_tensors())
        outcome = ""
        if self.parallel.rank == 0:
            state = TrainingState(self.step, tensors, self._settings())
            try:
                outcome = f"saved as {save_state(self.job.folder / 'state', state)}"
            except (OSError, SafetensorError) as error:
                outcome = f"its state could not be saved ({error})"
                self._say(f"warning: step {self.step}: {outcome}")
        self.parallel.barrier()
        return outcome

    def _state_tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from ((f"weights/{name}", value) for name, value in self._parameters())
        yield from ((f"ema/{name}", value) for name, value in self.ema.values.items())
        for name, optimizer in self.optimizers.items():
            for index, entry in optimizer.state_dict()["state"].items():
                yield from ((f"optimizer/{name}/{index}/{key}", torch.as_tensor(x)) for key, x in entry.items())

    def _resume(self) -> None:
        found = load_newest(self.job.folder / "state", self._say)
        step = found[1].step if found else 0
        if self.parallel.largest(step) != step or self.parallel.largest(-step) != -step:
            raise UsageError(f"{self.job.folder}: the processes found different states; give them one shared folder")
        if found is None:
            self._say(f"{self.objective.name}: no state in {self.job.folder}; starting from the first step")
            return
        path, state = found
        _refuse_other_settings(state.settings, self._settings(), path)
        self._adopt(state)
        self._say(f"{self.objective.name}: resuming from {path} (step {step} of {self.config.steps})")

    @torch.no_grad()
    def _adopt(self, state: TrainingState) -> None:
        for name, value in self._parameters():
            value.copy_(like(state.tensors[f"weights/{name}"], value))
            self.ema.values[name].copy_(like(state.tensors[f"ema/{name}"], value))
        for name, optimizer in self.optimizers.items():
            plain, prefix = optimizer.state_dict(), f"optimizer/{name}/"
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            for key, value in state.tensors.items():
                if key.startswith(prefix):
                    index, leaf = key.removeprefix(prefix).split("/")
                    plain["state"].setdefault(int(index), {})[leaf] = like(value, parameters[int(index)])
            optimizer.load_state_dict(plain)
        self.step = state.step

    def result(self) -> dict[str, dict[str, Tensor]]:
        """The weights of each trained network ("vae", "dit") with the averaged values, for the first process alone.

        Without averaging (`ema` 0) they are the last ones.
        """
        averaged = self.ema.values if self.config.ema else {}
        weights = self.parallel.gather({**dict(self.objective.named_parameters()), **averaged}.items())
        networks: dict[str, dict[str, Tensor]] = {}
        for name, value in weights.items():
            network, _, own = name.partition(".")
            networks.setdefault(network, {})[own] = value
        return networks


def _due(every: int, step: int) -> bool:
    return bool(every) and step % every == 0


def _refuse_other_settings(old: dict[str, Any], new: dict[str, Any], path: Path) -> None:
    new = json.loads(json.dumps(new))  # tuples become lists, as in the file
    different = [name for name in new if old.get(name) != new[name]]
    if different:
        name = different[0]
        raise UsageError(f"{path}: {name} was {old.get(name)} and is now {new[name]}; resume with the same settings")
