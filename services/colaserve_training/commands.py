"""`colaserve train ...`: tokenizer, vae, prior, demo. Under torchrun the vae and prior verbs use all processes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import click
import torch
from tokenizers import Tokenizer

from colaserve_services.errors import ColaserveError, UsageError
from colaserve_services.model.checkpoint import Checkpoint
from colaserve_services.model.config import check_pair
from colaserve_training import demo as demo_recipe
from colaserve_training.config import PRESETS, FlowConfig, JointConfig, VaeLossConfig
from colaserve_training.corpus import tokenizer_text
from colaserve_training.data import read_records
from colaserve_training.interrupts import Stopped, noticed
from colaserve_training.metrics import say
from colaserve_training.parallel import MODES, Parallel, started
from colaserve_training.prior_stage import PriorObjective
from colaserve_training.release import DTYPES, checkpoint_folder, claim, load_dit, load_vae, new_dit, new_vae
from colaserve_training.task import Task
from colaserve_training.tokenizer import save_tokenizer, train_tokenizer
from colaserve_training.vae_stage import VaeObjective

Folder = click.Path(file_okay=False, path_type=Path)
File = click.Path(dir_okay=False, path_type=Path)
Size = click.IntRange(1, 2**31 - 1)
Count = click.IntRange(0, 2**31 - 1)
Rate = click.FloatRange(min=0)

_DATA = (
    "Text or .jsonl file, or `demo`: the built-in corpus, which is the default. Weights are shares of the rows; "
    "without weights the sizes decide."
)
_HELD_OUT = "Share of each file's rows that is not trained on but validates; at most 512 rows."
_LEARNING_RATE = "AdamW's full rate.  [default: 2e-3, less for networks wider than 192; a tenth of it with --init]"

_OPTIONS = (
    click.option("--data", multiple=True, metavar="FILE[=WEIGHT]", help=_DATA),
    click.option("--out", type=Folder, required=True, help="For the checkpoint; OUT/run gets metrics and states."),
    click.option("--overwrite", is_flag=True, help="Replace the checkpoint in OUT, and delete the states of its run."),
    click.option("--resume", is_flag=True, help="Continue from the newest state in OUT/run, or start where none is."),
    click.option("--preset", type=click.Choice(list(PRESETS)), default="demo", show_default=True, help="New networks."),
    click.option("--steps", type=Size, default=1000, show_default=True),
    click.option("--rows", type=Size, default=64, show_default=True, help="Sequences a step, over all processes."),
    click.option("--micro-batches", type=Size, default=1, show_default=True, help="Passes that share a step."),
    click.option("--context", type=Size, default=512, show_default=True, help="Longest sequence in tokens."),
    click.option("--lr", type=click.FloatRange(min=0, min_open=True), help=_LEARNING_RATE),
    click.option("--muon-lr", type=Rate, default=0.0, show_default=True, help="Muon's full rate; 0: AdamW for all."),
    click.option("--weight-decay", type=Rate, default=0.0, show_default=True),
    click.option("--clip", type=Rate, default=1.0, show_default=True, help="Largest gradient norm; 0: any."),
    click.option("--warmup", type=Count, default=50, show_default=True, help="Steps until the rate is full."),
    click.option(
        "--ema", type=click.FloatRange(0, 1, max_open=True), default=0.995, show_default=True,
        help="Decay of the averaged weights; 0: off.",
    ),
    click.option("--seed", type=click.IntRange(0, 2**64 - 1), default=0, show_default=True),
    click.option(
        "--save-every", type=Count, default=500, show_default=True,
        help="Steps between states; 0: only at the end, and when a signal ends the run.",
    ),
    click.option(
        "--check-every", type=Count, default=100, show_default=True,
        help="Steps between checks: loss on held-out rows, and sample texts; 0: none.",
    ),
    click.option("--held-out", type=click.FloatRange(0, 0.5), default=0.02, show_default=True, help=_HELD_OUT),
    click.option(
        "--prompt", "prompts", multiple=True, metavar="TEXT",
        help="Write sample texts after it.  [default: beginnings of held-out rows]",
    ),
    click.option("--autocast", is_flag=True, help="bfloat16 matrix products."),
    click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True),
    click.option("--parallel", type=click.Choice(MODES), default="ddp", show_default=True, help="Under torchrun."),
    click.option("--threads", type=click.IntRange(min=0), default=0, help="Threads a process; 0: torch's choice."),
    click.option("--dtype", type=click.Choice(list(DTYPES)), default="float32", show_default=True, help="As written."),
)  # fmt: skip


def _run_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@click.group()
def train() -> None:
    """Train or fine-tune a Cola-DLM: tokenizer, Text VAE, prior."""


@train.command()
@click.option("--data", type=File, multiple=True, help="Text or .jsonl file; none: the built-in corpus.")
@click.option("--out", type=Folder, required=True, help="Folder for tokenizer.json.")
@click.option("--overwrite", is_flag=True, help="Replace the tokenizer.json in OUT.")
@click.option("--vocab-size", type=int, default=2816, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the built-in corpus.")
def tokenizer(data: tuple[Path, ...], out: Path, overwrite: bool, vocab_size: int, seed: int) -> None:
    """Train a byte-level BPE tokenizer."""
    with _one_line():
        if (out / "tokenizer.json").exists() and not overwrite:
            raise UsageError(f"{out}: holds a tokenizer; name another --out, or replace it with --overwrite")
        texts = [f"{prompt}{response}" for path in data for prompt, response in read_records(path)]
        made = train_tokenizer(texts if data else tokenizer_text(seed), vocab_size)
        click.echo(f"{save_tokenizer(made, out)}: {made.get_vocab_size()} entries")


@train.command()
@_run_options
@click.option("--init", type=Folder, help="Checkpoint to fine-tune, or `bundled`; its prior is copied as it is.")
@click.option("--tokenizer", "tokenizer_file", type=File, help="tokenizer.json, when starting from nothing.")
@click.option("--dim", type=Size, help="Of a new network; without this and the next three the preset decides.")
@click.option("--blocks", type=Size, help="Of the encoder and of the decoder each.")
@click.option("--block-size", type=Size, help="Of the VAE's masks, in latents; 1 is causal.")
@click.option("--patch-size", type=Size, help="Tokens a latent.")
def vae(
    init: Path | None, tokenizer_file: Path | None, dim: int | None, blocks: int | None, block_size: int | None,
    patch_size: int | None, **options: Any,
) -> None:  # fmt: skip
    """Stage 1: the Text VAE, from nothing (--tokenizer) or from a checkpoint (--init)."""
    if (init is None) == (tokenizer_file is None):
        raise click.ClickException("--init or --tokenizer: expected exactly one")
    with _prepared(options) as parallel:
        folder = checkpoint_folder(init) if init else cast(Path, tokenizer_file).parent
        words = _tokenizer(tokenizer_file or folder / "tokenizer.json")
        shape = PRESETS[options["preset"]].vae_config(words.get_vocab_size(), dim, blocks, block_size, patch_size)
        model = load_vae(folder) if init else new_vae(shape)
        task = Task(options, parallel, words, folder, bool(init), model)
        task.run(VaeObjective(model, VaeLossConfig(), task.special.pad, model.config.block_size))


@train.command()
@_run_options
@click.option("--init", type=Folder, help="Checkpoint to fine-tune, or `bundled`: its VAE, its prior, its tokenizer.")
@click.option("--vae", "vae_folder", type=Folder, help="Output of `train vae`, for a new prior.")
@click.option("--dim", type=Size, help="Of a new prior; without this and the next two the preset decides.")
@click.option("--layers", type=Size)
@click.option("--block-size", type=Size, help="Latents a generated block.")
@click.option("--joint", is_flag=True, help="Train the VAE along: its own losses, and a KL to the encoder it was.")
def prior(
    init: Path | None, vae_folder: Path | None, dim: int | None, layers: int | None, block_size: int | None,
    joint: bool, **options: Any,
) -> None:  # fmt: skip
    """Stage 2: the prior, from nothing on a trained VAE (--vae) or fine-tuned from a checkpoint (--init)."""
    if (init is None) == (vae_folder is None):
        raise click.ClickException(
            "--init or --vae: expected exactly one (a whole checkpoint, or the output of train vae)"
        )
    with _prepared(options) as parallel:
        folder = checkpoint_folder(cast(Path, init or vae_folder))
        words, text_vae = _tokenizer(folder / "tokenizer.json"), load_vae(folder)
        shape = PRESETS[options["preset"]].dit_config(text_vae.config.latent_dim, dim, layers, block_size)
        dit = load_dit(Checkpoint.open(folder)) if init else new_dit(shape)
        check_pair(text_vae.config, dit.config)
        task = Task(options, parallel, words, folder, bool(init), text_vae, dit)
        joined = JointConfig() if joint else None
        task.run(PriorObjective(dit, text_vae, FlowConfig(), task.special.pad, joined))


@contextmanager
def _prepared(options: dict[str, Any]) -> Iterator[Parallel]:
    """Threads, processes, the seed and the right to write to --out; see `_one_line`."""
    with _one_line():
        if options["threads"]:
            torch.set_num_threads(options["threads"])
        with started(options["device"], options["parallel"]) as parallel:
            claim(options["out"], [options["out"] / "run"], options["resume"], options["overwrite"])
            torch.manual_seed(options["seed"])
            yield parallel


@train.command()
@click.option("--out", type=Folder, required=True, help="Where the checkpoint goes.")
@click.option("--work", type=Folder, help="Metrics and resumable states; default OUT-run.")
@click.option("--overwrite", is_flag=True, help="Replace the checkpoint in OUT, and delete the states in WORK.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--threads", type=Size, default=2, show_default=True, help="Part of what makes the bytes repeatable.")
@click.option("--vae-steps", type=Size, help="Fewer steps, for a trial.")
@click.option("--prior-steps", type=Size, help="Fewer steps, for a trial.")
@click.option("--resume", is_flag=True, help="Continue from the newest states in WORK, or start where none is.")
@click.option("--score/--no-score", default=True, show_default=True, help="Ask it the question sets at the end.")
def demo(
    out: Path, work: Path | None, overwrite: bool, seed: int, threads: int, vae_steps: int | None,
    prior_steps: int | None, resume: bool, score: bool,
) -> None:  # fmt: skip
    """Make the bundled checkpoint from nothing: corpus, tokenizer, VAE, prior, question sets."""
    with _one_line():
        work = work or out.with_name(f"{out.name}-run")
        claim(out, [work / name for name in demo_recipe.RUNS], resume, overwrite)
        torch.set_num_threads(threads)
        start = time.monotonic()
        recipe = demo_recipe.DemoRecipe(seed).scaled(vae_steps, prior_steps)
        with noticed() as stop:
            demo_recipe.make_demo(out, work, recipe, resume, stop=stop)
        say(f"{out}: trained in {(time.monotonic() - start) / 60:.1f} minutes")
        if score:
            say(demo_recipe.score_lines(demo_recipe.score_sets(demo_recipe.load_generator(out))))


def _tokenizer(path: Path) -> Tokenizer:
    if not path.is_file():
        raise UsageError(f"{path}: no such tokenizer; `train tokenizer` makes one")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises a bare Exception
        raise UsageError(f"{path}: not a tokenizer ({error})") from error


class _BySignal(click.ClickException):
    def __init__(self, stopped: Stopped):
        super().__init__(f"{stopped}; the same command with --resume continues from there")
        self.exit_code = stopped.exit_code  # type: ignore[misc]


@contextmanager
def _one_line() -> Iterator[None]:
    """An operator's mistake, or a signal, ends the command with its one line, not with a traceback."""
    try:
        yield
    except Stopped as stopped:
        if os.environ.get("RANK", "0") != "0":  # the first process says it for all
            raise SystemExit(stopped.exit_code) from stopped
        raise _BySignal(stopped) from stopped
    except ColaserveError as error:
        raise click.ClickException(str(error)) from error
    except OSError as error:
        raise click.ClickException(f"{error.filename}: {error.strerror}" if error.filename else str(error)) from error
