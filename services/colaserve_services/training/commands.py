"""`colaserve train ...`: tokenizer, vae, prior, demo. Under torchrun the vae and prior verbs use all processes."""

from __future__ import annotations

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
from colaserve_services.text.special_ids import SpecialIds
from colaserve_services.training import demo as demo_recipe
from colaserve_services.training.config import JointConfig, OptimizerConfig, RunConfig
from colaserve_services.training.corpus import Corpus, tokenizer_text
from colaserve_services.training.data import read_dataset, read_records
from colaserve_services.training.evaluate import score_sets
from colaserve_services.training.init import new_dit, new_vae
from colaserve_services.training.parallel import MODES, started
from colaserve_services.training.release import (
    DTYPES,
    copy_companions,
    copy_prior,
    load_dit,
    load_vae,
    special_ids,
    tiny_dit_config,
    tiny_vae_config,
    write_dit,
    write_vae,
)
from colaserve_services.training.rows import CorpusSource, ListSource, Source, VaeSource
from colaserve_services.training.stages import train_prior, train_vae
from colaserve_services.training.tokenizer import save_tokenizer, train_tokenizer

Folder = click.Path(file_okay=False, path_type=Path)
File = click.Path(dir_okay=False, path_type=Path)


@click.group()
def train() -> None:
    """Train or fine-tune a Cola-DLM: tokenizer, Text VAE, prior."""


def _options(*options: Callable[..., Any]) -> Callable[..., Any]:
    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return add


run_options = _options(
    click.option("--data", "data", type=File, multiple=True, help="Text or .jsonl file; none: the built-in corpus."),
    click.option("--out", type=Folder, required=True, help="Where the checkpoint goes."),
    click.option("--steps", type=int, default=1000, show_default=True),
    click.option("--rows", type=int, default=64, show_default=True, help="Sequences a step, over all processes."),
    click.option("--micro-batches", type=int, default=1, show_default=True, help="Passes that share a step."),
    click.option("--context", type=int, default=512, show_default=True, help="Longest sequence in tokens."),
    click.option("--lr", type=float, default=2e-3, show_default=True, help="AdamW's full rate."),
    click.option("--muon-lr", type=float, default=0.0, show_default=True, help="Muon's full rate; 0: AdamW for all."),
    click.option("--weight-decay", type=float, default=0.0, show_default=True),
    click.option("--clip", type=float, default=1.0, show_default=True, help="Largest gradient norm; 0: any."),
    click.option("--warmup", type=int, default=50, show_default=True),
    click.option("--ema", type=float, default=0.995, show_default=True, help="Decay of the averaged weights; 0: off."),
    click.option("--seed", type=int, default=0, show_default=True),
    click.option("--save-every", type=int, default=500, show_default=True, help="Steps between states; 0: none."),
    click.option("--resume", is_flag=True, help="Go on from the newest state in OUT/run."),
    click.option("--autocast", is_flag=True, help="bfloat16 matrix products."),
    click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True),
    click.option("--parallel", type=click.Choice(MODES), default="ddp", show_default=True, help="Under torchrun."),
    click.option("--threads", type=int, default=0, help="Threads a process; 0: torch's choice."),
    click.option("--dtype", type=click.Choice(list(DTYPES)), default="float32", show_default=True, help="As written."),
)


def _run_config(options: dict[str, Any]) -> RunConfig:
    if options["threads"]:
        torch.set_num_threads(options["threads"])
    optimizer = OptimizerConfig(
        adamw_lr=options["lr"], muon_lr=options["muon_lr"], weight_decay=options["weight_decay"],
        clip=options["clip"], warmup=options["warmup"],
    )  # fmt: skip
    return RunConfig(
        steps=options["steps"], rows=options["rows"], micro_batches=options["micro_batches"], seed=options["seed"],
        ema=options["ema"], save_every=options["save_every"], autocast=options["autocast"], optimizer=optimizer,
    )  # fmt: skip


@train.command()
@click.option("--data", type=File, multiple=True, help="Text or .jsonl file; none: the built-in corpus.")
@click.option("--out", type=Folder, required=True, help="Folder for tokenizer.json.")
@click.option("--vocab-size", type=int, default=2816, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the built-in corpus.")
def tokenizer(data: tuple[Path, ...], out: Path, vocab_size: int, seed: int) -> None:
    """Train a byte-level BPE tokenizer."""
    with _one_line():
        records = [record for path in data for record in read_records(path)]
        texts = (f"{record.prompt}{record.response}" for record in records) if data else tokenizer_text(seed)
        made = train_tokenizer(texts, vocab_size)
        click.echo(f"{save_tokenizer(made, out)}: {made.get_vocab_size()} entries")


@train.command()
@run_options
@click.option("--init", type=Folder, help="Checkpoint to go on from; its prior is copied as it is.")
@click.option("--tokenizer", "tokenizer_file", type=File, help="tokenizer.json, when starting from nothing.")
@click.option("--dim", type=int, default=128, show_default=True)
@click.option("--blocks", type=int, default=2, show_default=True, help="Of the encoder and of the decoder each.")
@click.option("--block-size", type=int, default=1, show_default=True, help="Of the VAE's masks; 1 is causal.")
def vae(init: Path | None, tokenizer_file: Path | None, dim: int, blocks: int, block_size: int, **options: Any) -> None:
    """Stage 1: the Text VAE, from nothing (--tokenizer) or from a checkpoint (--init)."""
    with _one_line(), started(options["device"], options["parallel"]) as parallel:
        run, out = _run_config(options), options["out"]
        if (init is None) == (tokenizer_file is None):
            raise UsageError("--init or --tokenizer: expected exactly one")
        folder = init or cast(Path, tokenizer_file).parent
        words = _tokenizer(tokenizer_file or folder / "tokenizer.json")
        torch.manual_seed(run.seed)
        model = load_vae(init) if init else new_vae(tiny_vae_config(words.get_vocab_size(), dim, blocks, block_size))
        special, source = _data(options, words, folder, True, parallel.rank)
        train_vae(
            model, source, run, out / "run", None, special.pad, model.config.block_size, parallel, options["resume"]
        )
        if parallel.rank == 0:
            copy_companions(folder, out)
            write_vae(model, out, options["dtype"])
            if init:
                copy_prior(init, out)
            else:
                save_tokenizer(words, out)


@train.command()
@run_options
@click.option("--init", type=Folder, help="Checkpoint to fine-tune: its VAE, its prior, its tokenizer.")
@click.option("--vae", "vae_folder", type=Folder, help="Output of `train vae`, for a new prior.")
@click.option("--dim", type=int, default=192, show_default=True)
@click.option("--layers", type=int, default=4, show_default=True)
@click.option("--block-size", type=int, default=4, show_default=True, help="Latents a generated block.")
@click.option("--joint", is_flag=True, help="Train the VAE along, with its own losses and a leash to its start.")
def prior(
    init: Path | None, vae_folder: Path | None, dim: int, layers: int, block_size: int, joint: bool, **options: Any
) -> None:
    """Stage 2: the prior, from nothing on a trained VAE (--vae) or fine-tuned from a checkpoint (--init)."""
    with _one_line(), started(options["device"], options["parallel"]) as parallel:
        run, out = _run_config(options), options["out"]
        if (init is None) == (vae_folder is None):
            raise UsageError("--init or --vae: expected exactly one (a whole checkpoint, or the output of train vae)")
        folder = cast(Path, init or vae_folder)
        words, text_vae = _tokenizer(folder / "tokenizer.json"), load_vae(folder)
        torch.manual_seed(run.seed)
        shape = tiny_dit_config(dim, layers, text_vae.config.latent_dim, block_size)
        dit = load_dit(Checkpoint.open(init)) if init else new_dit(shape)
        special, source = _data(options, words, folder, False, parallel.rank)
        leash = JointConfig() if joint else None
        train_prior(
            dit, text_vae, source, run, out / "run", joint=leash, pad_id=special.pad, parallel=parallel,
            resume=options["resume"],
        )  # fmt: skip
        if parallel.rank == 0:
            copy_companions(folder, out)
            write_vae(text_vae, out, options["dtype"])
            write_dit(dit, out, options["dtype"])


@train.command()
@click.option("--out", type=Folder, required=True, help="Where the checkpoint goes.")
@click.option("--work", type=Folder, help="Metrics and resumable states; default OUT-run.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--threads", type=int, default=2, show_default=True, help="Part of what makes the bytes repeatable.")
@click.option("--vae-steps", type=int, help="Fewer steps, for a trial.")
@click.option("--prior-steps", type=int, help="Fewer steps, for a trial.")
@click.option("--resume", is_flag=True, help="Go on from the newest states in WORK.")
@click.option("--score/--no-score", default=True, show_default=True, help="Ask it the question sets at the end.")
def demo(
    out: Path, work: Path | None, seed: int, threads: int, vae_steps: int | None, prior_steps: int | None,
    resume: bool, score: bool,
) -> None:  # fmt: skip
    """Make the bundled checkpoint from nothing: corpus, tokenizer, VAE, prior, question sets."""
    with _one_line():
        torch.set_num_threads(threads)
        start = time.monotonic()
        recipe = demo_recipe.DemoRecipe(seed).scaled(vae_steps, prior_steps)
        demo_recipe.make_demo(out, work or out.with_name(f"{out.name}-run"), recipe, resume)
        click.echo(f"{out}: trained in {(time.monotonic() - start) / 60:.1f} minutes")
        if score:
            click.echo(demo_recipe.score_table(score_sets(demo_recipe.load_generator(out))))


def _tokenizer(path: Path) -> Tokenizer:
    if not path.is_file():
        raise UsageError(f"{path}: no such tokenizer; `train tokenizer` makes one")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises a bare Exception
        raise UsageError(f"{path}: not a tokenizer ({error})") from error


def _data(
    options: dict[str, Any], words: Tokenizer, folder: Path, stage_one: bool, rank: int
) -> tuple[SpecialIds, Source]:
    """The special ids of a checkpoint folder, and what to train on."""
    special = special_ids(folder, words)
    if options["data"]:
        end = special.pad if special.end_of_text is None else special.end_of_text
        dataset = read_dataset(options["data"], words, options["context"], end)
        if rank == 0:
            click.echo(dataset.summary())
        return special, ListSource(dataset.rows, options["seed"])
    kind = VaeSource if stage_one else CorpusSource
    return special, kind(Corpus(), words, options["seed"])


@contextmanager
def _one_line() -> Iterator[None]:
    """An operator's mistake ends the command with its one line, not with a traceback."""
    try:
        yield
    except ColaserveError as error:
        raise click.ClickException(str(error)) from error
