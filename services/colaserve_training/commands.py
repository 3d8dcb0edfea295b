"""`colaserve train ...`: tokenizer, vae, prior, demo. Under torchrun the vae and prior verbs use all processes."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
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
from colaserve_training.config import JointConfig
from colaserve_training.corpus import tokenizer_text
from colaserve_training.data import read_records
from colaserve_training.evaluate import score_sets
from colaserve_training.init import new_dit, new_vae
from colaserve_training.interrupts import Stopped, noticed
from colaserve_training.metrics import say
from colaserve_training.options import File, Folder, Size, run_config, run_options
from colaserve_training.parallel import started
from colaserve_training.presets import PRESETS
from colaserve_training.release import checkpoint_folder, claim, copy_prior, load_dit, load_vae
from colaserve_training.stages import train_prior, train_vae
from colaserve_training.task import Task
from colaserve_training.tokenizer import save_tokenizer, train_tokenizer


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
        records = [record for path in data for record in read_records(path)]
        texts = (f"{record.prompt}{record.response}" for record in records) if data else tokenizer_text(seed)
        made = train_tokenizer(texts, vocab_size)
        click.echo(f"{save_tokenizer(made, out)}: {made.get_vocab_size()} entries")


@train.command()
@run_options
@click.option("--init", type=Folder, help="Checkpoint to go on from, or `bundled`; its prior is copied as it is.")
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
    with _one_line(), started(options["device"], options["parallel"]) as parallel:
        run = run_config(options)
        if (init is None) == (tokenizer_file is None):
            raise UsageError("--init or --tokenizer: expected exactly one")
        claim(options["out"], [options["out"] / "run"], options["resume"], options["overwrite"])
        folder = checkpoint_folder(init) if init else cast(Path, tokenizer_file).parent
        words = _tokenizer(tokenizer_file or folder / "tokenizer.json")
        torch.manual_seed(run.seed)
        shape = PRESETS[options["preset"]].vae_config(words.get_vocab_size(), dim, blocks, block_size, patch_size)
        model = load_vae(folder) if init else new_vae(shape)
        task = Task(options, run, parallel, words, folder, bool(init), model)
        with task.job() as (job, source):
            train_vae(model, source, job, pad_id=task.special.pad, block_size=model.config.block_size)
            task.write(copy_prior if init else None)


@train.command()
@run_options
@click.option("--init", type=Folder, help="Checkpoint to fine-tune, or `bundled`: its VAE, its prior, its tokenizer.")
@click.option("--vae", "vae_folder", type=Folder, help="Output of `train vae`, for a new prior.")
@click.option("--dim", type=Size, help="Of a new prior; without this and the next two the preset decides.")
@click.option("--layers", type=Size)
@click.option("--block-size", type=Size, help="Latents a generated block.")
@click.option("--joint", is_flag=True, help="Train the VAE along, with its own losses and a leash to its start.")
def prior(
    init: Path | None, vae_folder: Path | None, dim: int | None, layers: int | None, block_size: int | None,
    joint: bool, **options: Any,
) -> None:  # fmt: skip
    """Stage 2: the prior, from nothing on a trained VAE (--vae) or fine-tuned from a checkpoint (--init)."""
    with _one_line(), started(options["device"], options["parallel"]) as parallel:
        run = run_config(options)
        if (init is None) == (vae_folder is None):
            raise UsageError("--init or --vae: expected exactly one (a whole checkpoint, or the output of train vae)")
        claim(options["out"], [options["out"] / "run"], options["resume"], options["overwrite"])
        folder = checkpoint_folder(cast(Path, init or vae_folder))
        words, text_vae = _tokenizer(folder / "tokenizer.json"), load_vae(folder)
        torch.manual_seed(run.seed)
        shape = PRESETS[options["preset"]].dit_config(text_vae.config.latent_dim, dim, layers, block_size)
        dit = load_dit(Checkpoint.open(folder)) if init else new_dit(shape)
        check_pair(text_vae.config, dit.config)
        task = Task(options, run, parallel, words, folder, bool(init), text_vae, dit)
        with task.job() as (job, source):
            train_prior(dit, text_vae, source, job, joint=JointConfig() if joint else None, pad_id=task.special.pad)
            task.write()


@train.command()
@click.option("--out", type=Folder, required=True, help="Where the checkpoint goes.")
@click.option("--work", type=Folder, help="Metrics and resumable states; default OUT-run.")
@click.option("--overwrite", is_flag=True, help="Replace the checkpoint in OUT, and forget the states in WORK.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--threads", type=Size, default=2, show_default=True, help="Part of what makes the bytes repeatable.")
@click.option("--vae-steps", type=Size, help="Fewer steps, for a trial.")
@click.option("--prior-steps", type=Size, help="Fewer steps, for a trial.")
@click.option("--resume", is_flag=True, help="Go on from the newest states in WORK; start where there is none.")
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
            say(demo_recipe.score_table(score_sets(demo_recipe.load_generator(out))))


def _tokenizer(path: Path) -> Tokenizer:
    if not path.is_file():
        raise UsageError(f"{path}: no such tokenizer; `train tokenizer` makes one")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises a bare Exception
        raise UsageError(f"{path}: not a tokenizer ({error})") from error


class _BySignal(click.ClickException):
    def __init__(self, stopped: Stopped):
        super().__init__(f"{stopped}; the same command with --resume goes on from there")
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
