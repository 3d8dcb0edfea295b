"""The training loop, the same for both stages, for one process and for several.

Ctrl-C, SIGTERM and SIGHUP end it after the running step, with a state.
"""

import json
import math
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from colaserve_services.errors import ColaserveError, UsageError
from colaserve_services.model.cpu_features import lacks_bfloat16
from colaserve_training.config import RunConfig
from colaserve_training.metrics import Metrics, say
from colaserve_training.optim import Ema, build_optimizers, set_rate
from colaserve_training.parallel import SINGLE, Objective, Parallel, like, shard_again, whole
from colaserve_training.rows import Batch, Row, Source, micro_batches
from colaserve_training.state import TrainingState, load_newest, save_state

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(ColaserveError):
    """A signal ended the run; its state was saved."""

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.exit_code = 128 + number


class Stop:
    """Which signal asked this process to stop; 0 while none did."""

    signal = 0


@contextmanager
def noticed(alone: bool = True) -> Iterator[Stop]:
    """Note signals instead of dying of them. A second one ends the process at once if it is `alone`.

    Under torchrun a Ctrl-C reaches each process twice, from the terminal and from torchrun, which kills processes
    that have not ended 30 seconds later. A signal that was ignored at start (nohup) stays ignored.
    """
    stop = Stop()

    def note(number: int, frame: FrameType | None) -> None:
        if alone and stop.signal:
            raise KeyboardInterrupt
        stop.signal = number

    heard = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, note) for number in heard}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass
class Trainer:
    """Trains an objective on the rows of a source, from the first or a resumed step to the last."""

    objective: Objective
    source: Source
    config: RunConfig
    folder: Path  # metrics and resumable states
    parallel: Parallel = SINGLE
    resume: bool = False
    quiet: bool = False
    stop: Stop = field(default_factory=Stop)
    data: str = ""  # which; a run is resumed with the same
    held_out: Sequence[Row] = ()  # rows that are not trained on
    samples: Callable[[], Sequence[str]] | None = None  # texts of the network as it is

    def __post_init__(self) -> None:
        parts = self.config.micro_batches * self.parallel.world
        if self.config.rows % parts:
            raise UsageError(
                f"rows: got {self.config.rows}, expected a multiple of micro_batches x processes = {parts}"
            )
        self.quiet |= self.parallel.rank > 0
        self.module = self.parallel.wrap(self.objective)
        self.optimizers = build_optimizers(self.objective, self.config.optimizer)
        self.ema = Ema(self._parameters(), self.config.ema)
        self.step = 0

    def run(self) -> None:
        """Train to the last step. A signal ends the run earlier: its state is saved, and `Stopped` is raised."""
        name = self.objective.name
        if self.config.autocast and self.parallel.device.type == "cpu" and (lack := lacks_bfloat16()):
            self._say(f"{name}: {lack}: products are computed in float32, which is faster then")
        if self.resume:
            self._resume()
        elif self.parallel.rank == 0:
            shutil.rmtree(self.folder / "state", ignore_errors=True)  # of a run that this one replaces
        with Metrics(self.folder, self.step, self.config, name, self.quiet, self.parallel.rank) as metrics:
            while self.step < self.config.steps:
                values = self.train_step()
                if self._due(self.config.check_every):
                    values |= self._check()
                metrics.step(self.step - 1, values)
                number, finished = self.parallel.largest(self.stop.signal), self.step == self.config.steps
                if number or finished or self._due(self.config.save_every):
                    saved = self.save()
                if number and not finished:
                    raise Stopped(number, f"stopped after step {self.step} of {self.config.steps}; {saved}")

    def _say(self, text: str) -> None:
        if not self.quiet:
            say(text)

    def _due(self, every: int) -> bool:
        return bool(every) and self.step % every == 0

    def train_step(self) -> dict[str, float]:
        """One update: gradients of all micro-batches, clipped, applied; the losses of the whole step."""
        rate = set_rate(self.optimizers, self.step, self.config)
        groups = micro_batches(self.source.rows(self.step, self.config.rows), self.config.micro_batches)
        batches = self._drawn(groups, f"{self.objective.name}:{self.config.seed}:{self.step}")
        parts = []
        for batch in batches:
            losses = self._losses(batch)
            (losses["loss"] * self.parallel.world).backward()  # processes average gradients; losses are shares of a sum
            parts.append({name: value.detach() for name, value in losses.items()})
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

    def _drawn(self, groups: Sequence[Sequence[Row]], seed: str) -> Sequence[Batch]:
        return self.objective.draw(groups, seed, self.parallel.rank, self.parallel.world)

    def _losses(self, batch: Batch) -> dict[str, Tensor]:
        device = self.parallel.device
        narrow = self.config.autocast and not (device.type == "cpu" and lacks_bfloat16())
        with torch.autocast(device.type, torch.bfloat16) if narrow else nullcontext():
            losses: dict[str, Tensor] = self.module(batch.to(device))
        return losses

    def _check(self) -> dict[str, float]:
        """Validation loss and sample texts with the averaged weights, which are what a run is for.

        Held-out rows come in parts of a micro-batch, each with as many rows for every process.
        """
        size, world = self.config.rows // self.config.micro_batches, self.parallel.world
        parts = [self.held_out[start : start + size] for start in range(0, len(self.held_out), size)]
        with torch.no_grad(), self._averaged():
            if self.samples is not None:
                texts = self.objective.apply_whole(self.samples)
                self._say("\n".join(f"  step {self.step}: {text!r}" for text in texts))
            groups = [[part[: len(part) // world * world]] for part in parts if len(part) >= world]
            batches = [batch for group in groups for batch in self._drawn(group, "validation")]
            losses = [self.parallel.total(self._losses(batch)["loss"]) for batch in batches]
        return {"validation": sum(losses) / len(losses)} if losses else {}

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
            value.copy_(like(values[name], value))

    def _parameters(self) -> list[tuple[str, Tensor]]:
        return [(name, value) for name, value in self.objective.named_parameters() if value.requires_grad]

    def _settings(self) -> dict[str, Any]:
        """What a resumed run must have in common with the one before, as JSON has it."""
        config = {name: value for name, value in asdict(self.config).items() if not name.endswith("_every")}
        parameters = sum(value.numel() for _, value in self._parameters())
        settings = {"stage": self.objective.name, "data": self.data, "parameters": parameters, **config}
        return dict(json.loads(json.dumps(settings)))

    def save(self) -> str:
        """Write a resumable state and say where; every process takes part, the first one writes.

        A state that cannot be written (a full disk) does not end the run: earlier ones are still there.
        """
        tensors = self.parallel.gather(self._state_tensors())
        outcome = ""
        if self.parallel.rank == 0:
            state = TrainingState(self.step, tensors, self._settings())
            try:
                outcome = f"saved as {save_state(self.folder / 'state', state)}"
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
        found = load_newest(self.folder / "state", self._say)
        step = found[1].step if found else 0
        if self.parallel.largest(step) != step or self.parallel.largest(-step) != -step:
            raise UsageError(f"{self.folder}: the processes found different states; give them one shared folder")
        if found is None:
            self._say(f"{self.objective.name}: no state in {self.folder}; starting from the first step")
            return
        path, state = found
        for name, now in self._settings().items():
            if (before := state.settings.get(name)) != now:
                raise UsageError(f"{path}: {name} was {before} and is now {now}; resume with the same settings")
        self._set({name: state.tensors[f"weights/{name}"] for name, _ in self._parameters()})
        for name, value in self.ema.values.items():
            value.copy_(like(state.tensors[f"ema/{name}"], value))
        for name, optimizer in self.optimizers.items():
            plain, prefix = optimizer.state_dict(), f"optimizer/{name}/"
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            for key, value in state.tensors.items():
                if key.startswith(prefix):
                    index, leaf = key.removeprefix(prefix).split("/")
                    plain["state"].setdefault(int(index), {})[leaf] = like(value, parameters[int(index)])
            optimizer.load_state_dict(plain)
        self.step = step
        self._say(f"{self.objective.name}: resuming from {path} (step {step} of {self.config.steps})")

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
