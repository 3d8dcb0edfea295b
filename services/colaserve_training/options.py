"""The options that `train vae` and `train prior` share, and the settings they make."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch

from colaserve_training.config import OptimizerConfig, RunConfig
from colaserve_training.parallel import MODES
from colaserve_training.presets import PRESETS
from colaserve_training.release import DTYPES

Folder = click.Path(file_okay=False, path_type=Path)
File = click.Path(dir_okay=False, path_type=Path)
Size = click.IntRange(min=1)

_HELP = {
    "data": "Text or .jsonl file, or `demo`: the built-in corpus, which is the default. Weights are shares of "
    "the rows; without weights the sizes decide.",
    "out": "Where the checkpoint goes; OUT/run gets metrics and states.",
    "overwrite": "Replace the checkpoint in OUT, and forget the states of an earlier run there.",
    "resume": "Go on from the newest state in OUT/run; start where there is none.",
    "lr": "AdamW's full rate.  [default: 2e-3, less for networks wider than 192; a tenth of it with --init]",
    "save_every": "Steps between states; 0: only at the end, and when a signal ends the run.",
    "check_every": "Steps between checks: loss on held-out rows, and sample texts; 0: none.",
    "held_out": "Share of each file's rows that is not trained on but validates; at most 512 rows.",
    "prompt": "Write sample texts after it.  [default: beginnings of held-out rows]",
}

_OPTIONS = (
    click.option("--data", multiple=True, metavar="FILE[=WEIGHT]", help=_HELP["data"]),
    click.option("--out", type=Folder, required=True, help=_HELP["out"]),
    click.option("--overwrite", is_flag=True, help=_HELP["overwrite"]),
    click.option("--resume", is_flag=True, help=_HELP["resume"]),
    click.option("--preset", type=click.Choice(list(PRESETS)), default="demo", show_default=True, help="New networks."),
    click.option("--steps", type=int, default=1000, show_default=True),
    click.option("--rows", type=int, default=64, show_default=True, help="Sequences a step, over all processes."),
    click.option("--micro-batches", type=int, default=1, show_default=True, help="Passes that share a step."),
    click.option("--context", type=Size, default=512, show_default=True, help="Longest sequence in tokens."),
    click.option("--lr", type=float, help=_HELP["lr"]),
    click.option("--muon-lr", type=float, default=0.0, show_default=True, help="Muon's full rate; 0: AdamW for all."),
    click.option("--weight-decay", type=float, default=0.0, show_default=True),
    click.option("--clip", type=float, default=1.0, show_default=True, help="Largest gradient norm; 0: any."),
    click.option("--warmup", type=int, default=50, show_default=True),
    click.option("--ema", type=float, default=0.995, show_default=True, help="Decay of the averaged weights; 0: off."),
    click.option("--seed", type=int, default=0, show_default=True),
    click.option("--save-every", type=int, default=500, show_default=True, help=_HELP["save_every"]),
    click.option("--check-every", type=int, default=100, show_default=True, help=_HELP["check_every"]),
    click.option("--held-out", type=click.FloatRange(0, 0.5), default=0.02, show_default=True, help=_HELP["held_out"]),
    click.option("--prompt", "prompts", multiple=True, metavar="TEXT", help=_HELP["prompt"]),
    click.option("--autocast", is_flag=True, help="bfloat16 matrix products."),
    click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True),
    click.option("--parallel", type=click.Choice(MODES), default="ddp", show_default=True, help="Under torchrun."),
    click.option("--threads", type=click.IntRange(min=0), default=0, help="Threads a process; 0: torch's choice."),
    click.option("--dtype", type=click.Choice(list(DTYPES)), default="float32", show_default=True, help="As written."),
)


def run_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def run_config(options: dict[str, Any]) -> RunConfig:
    """The run's settings, checked; without --lr a rate has still to be put in."""
    if options["threads"]:
        torch.set_num_threads(options["threads"])
    rate = {} if options["lr"] is None else {"adamw_lr": options["lr"]}
    shared = {name: options[name] for name in ("muon_lr", "weight_decay", "clip", "warmup")}
    names = ("steps", "rows", "micro_batches", "seed", "ema", "save_every", "check_every", "autocast")
    return RunConfig(**{name: options[name] for name in names}, optimizer=OptimizerConfig(**rate, **shared))
