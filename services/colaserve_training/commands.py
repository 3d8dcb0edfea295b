"""`colaserve train ...`: tokenizer, vae, prior, demo. Under torchrun the vae and prior verbs use all processes."""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer

from colaserve_client.cli.output import table
from colaserve_eval.scoring import score_table
from colaserve_services.errors import CheckpointError, ColaserveError, UsageError
from colaserve_services.model.config import check_pair
from colaserve_services.model.dit import DiT
from colaserve_services.model.text_vae import TextVAE
from colaserve_training import demo as demo_recipe
from colaserve_training import release
from colaserve_training.config import PRESETS, SIZE, OptimizerConfig, RunConfig, field_options, full_rate, taken
from colaserve_training.corpus import tokenizer_text
from colaserve_training.data import Data, Reader, read_records
from colaserve_training.generate import Generator, Sampling, reconstructed
from colaserve_training.metrics import plot_losses, say
from colaserve_training.parallel import MODES, Objective, Parallel, started
from colaserve_training.prior_stage import JointObjective, PriorObjective
from colaserve_training.release import checkpoint_folder, claim, load_dit, load_vae, new_dit, new_vae, write_network
from colaserve_training.state import drafted
from colaserve_training.tokenizer import save_tokenizer, train_tokenizer
from colaserve_training.trainer import Stopped, Trainer, noticed
from colaserve_training.vae_stage import VaeObjective

FOLDER = click.Path(file_okay=False, path_type=Path)
FILE = click.Path(dir_okay=False, path_type=Path)

_DATA = (
    "Text or .jsonl file, or `demo`: the built-in corpus, which is the default. Weights are shares of the rows; "
    "without weights the sizes decide."
)
_SAMPLES, _SAMPLE_TOKENS = 3, 16
_HELD_OUT = "Share of each file's rows that is not trained on but validates; at most 512 rows."
_LEARNING_RATE = "AdamW's full rate.  [default: 2e-3, less for networks wider than 192; a tenth of it with --init]"

_RUN_OPTIONS = (
    click.option("--data", multiple=True, metavar="FILE[=WEIGHT]", help=_DATA),
    click.option("--out", type=FOLDER, required=True, help="For the checkpoint; OUT/run gets metrics and states."),
    click.option("--overwrite", is_flag=True, help="Replace the checkpoint in OUT, and delete the states of its run."),
    click.option("--resume", is_flag=True, help="Continue from the newest state in OUT/run, or start where none is."),
    click.option("--preset", type=click.Choice(list(PRESETS)), default="demo", show_default=True, help="New networks."),
    click.option("--context", type=SIZE, default=512, show_default=True, help="Longest sequence in tokens."),
    *field_options(RunConfig),
    click.option("--lr", type=click.FloatRange(min=0, min_open=True), help=_LEARNING_RATE),
    *field_options(OptimizerConfig),
    click.option("--held-out", type=click.FloatRange(0, 0.5), default=0.02, show_default=True, help=_HELD_OUT),
    click.option(
        "--prompt", "prompts", multiple=True, metavar="TEXT",
        help="Write sample texts after it.  [default: beginnings of held-out rows]",
    ),
    click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True),
    click.option("--parallel", type=click.Choice(MODES), default="ddp", show_default=True, help="Under torchrun."),
    click.option("--threads", type=click.IntRange(min=0), default=0, help="Threads a process; 0: torch's choice."),
    click.option("--dtype", type=click.Choice(list(release.DTYPES)), default="float32", show_default=True,
                 help="As written."),
)  # fmt: skip


def _run_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(_RUN_OPTIONS):
        command = option(command)
    return command


@click.group()
def train() -> None:
    """Train or fine-tune a Cola-DLM: tokenizer, Text VAE, prior."""


@train.command()
@click.option("--data", type=FILE, multiple=True, help="Text or .jsonl file; none: the built-in corpus.")
@click.option("--out", type=FOLDER, required=True, help="Folder for tokenizer.json.")
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
@click.option("--init", type=FOLDER, help="Checkpoint to fine-tune, or `bundled`; its prior is copied as it is.")
@click.option("--tokenizer", "tokenizer_file", type=FILE, help="tokenizer.json, when starting from nothing.")
@click.option("--dim", type=SIZE, help="Of a new network; without this and the next three the preset decides.")
@click.option("--blocks", type=SIZE, help="Of the encoder and of the decoder each.")
@click.option("--block-size", type=SIZE, help="Of the VAE's masks, in latents; 1 is causal.")
@click.option("--patch-size", type=SIZE, help="Tokens a latent.")
def vae(init: Path | None, tokenizer_file: Path | None, **options: Any) -> None:
    """Stage 1: the Text VAE, from nothing (--tokenizer) or from a checkpoint (--init)."""
    given = _either(init, tokenizer_file, "--init or --tokenizer: expected exactly one")
    with _prepared(options) as parallel:
        folder = checkpoint_folder(init) if init else given.parent
        words = _tokenizer(tokenizer_file or folder / "tokenizer.json")
        shape = {name: options[name] for name in ("dim", "blocks", "block_size", "patch_size")}
        config = PRESETS[options["preset"]].vae_config(words.get_vocab_size(), **shape)
        model = load_vae(folder) if init else new_vae(config)
        task = Task(options, parallel, words, folder, bool(init), model)
        task.run(VaeObjective(model, task.special.pad, model.config.block_size))


@train.command()
@_run_options
@click.option("--init", type=FOLDER, help="Checkpoint to fine-tune, or `bundled`: its VAE, its prior, its tokenizer.")
@click.option("--vae", "vae_folder", type=FOLDER, help="Output of `train vae`, for a new prior.")
@click.option("--dim", type=SIZE, help="Of a new prior; without this and the next two the preset decides.")
@click.option("--layers", "num_layers", type=SIZE)
@click.option("--block-size", type=SIZE, help="Latents a generated block.")
@click.option("--joint", is_flag=True, help="Train the VAE along: its own losses, and a KL to the encoder it was.")
def prior(init: Path | None, vae_folder: Path | None, joint: bool, **options: Any) -> None:
    """Stage 2: the prior, from nothing on a trained VAE (--vae) or fine-tuned from a checkpoint (--init)."""
    expected = "--init or --vae: expected exactly one (a whole checkpoint, or the output of train vae)"
    given = _either(init, vae_folder, expected)
    with _prepared(options) as parallel:
        folder = checkpoint_folder(given)
        words, text_vae = _tokenizer(folder / "tokenizer.json"), load_vae(folder)
        shape = {name: options[name] for name in ("dim", "num_layers", "block_size")}
        config = PRESETS[options["preset"]].dit_config(text_vae.config.latent_dim, **shape)
        dit = load_dit(folder) if init else new_dit(config)
        check_pair(text_vae.config, dit.config)
        task = Task(options, parallel, words, folder, bool(init), text_vae, dit)
        task.run((JointObjective if joint else PriorObjective)(dit, text_vae, task.special.pad))


def _either(one: Path | None, other: Path | None, expected: str) -> Path:
    """The one that is given. Raises ClickException unless it is exactly one."""
    if (one is None) == (other is None):
        raise click.ClickException(expected)
    return one or other or Path()


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
@click.option("--out", type=FOLDER, required=True, help="Where the checkpoint goes.")
@click.option("--work", type=FOLDER, help="Metrics and resumable states; default OUT-run.")
@click.option("--overwrite", is_flag=True, help="Replace the checkpoint in OUT, and delete the states in WORK.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--threads", type=SIZE, default=2, show_default=True, help="Part of what makes the bytes repeatable.")
@click.option("--vae-steps", type=SIZE, help="Fewer steps, for a trial.")
@click.option("--prior-steps", type=SIZE, help="Fewer steps, for a trial.")
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
            say(table(*score_table(demo_recipe.score_sets(demo_recipe.load_generator(out)))))


def _tokenizer(path: Path) -> Tokenizer:
    if not path.is_file():
        raise UsageError(f"{path}: no such tokenizer; `train tokenizer` makes one")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises a bare Exception
        raise UsageError(f"{path}: not a tokenizer ({error})") from error


@contextmanager
def _one_line() -> Iterator[None]:
    """An operator's mistake, or a signal, ends the command with its one line, not with a traceback."""
    try:
        yield
    except Stopped as stopped:
        if os.environ.get("RANK", "0") == "0":  # the first process says it for all
            click.echo(f"Error: {stopped}; the same command with --resume continues from there", err=True)
        raise SystemExit(stopped.exit_code) from stopped
    except ColaserveError as error:
        raise click.ClickException(str(error)) from error
    except OSError as error:
        raise click.ClickException(f"{error.filename}: {error.strerror}" if error.filename else str(error)) from error


@dataclass
class Task:
    """One command's networks and options; without a prior it is stage 1."""

    options: dict[str, Any]
    parallel: Parallel
    words: Tokenizer
    folder: Path  # of the tokenizer and the defaults
    fine_tuning: bool
    vae: TextVAE
    dit: DiT | None = None

    def __post_init__(self) -> None:
        self.special = release.special_ids(self.folder, self.words)
        self.out: Path = self.options["out"]

    def run(self, objective: Objective) -> None:
        """Train, and write the checkpoint; a signal in between ends the run with a state."""
        end = self.special.pad if self.special.end_of_text is None else self.special.end_of_text
        context, seed, held_out = (self.options[name] for name in ("context", "seed", "held_out"))
        reader = Reader(self.words, context, end, seed, self.dit is None, held_out, self._say)
        data = reader.read(self.options["data"])
        width = self.vae.config.dim if self.dit is None else self.dit.config.txt_dim
        rate = self.options["lr"] or full_rate(width, self.fine_tuning)
        self._say(f"learning rate {rate:.3g}{', for fine-tuning' if self.fine_tuning else ''}")
        run = taken(RunConfig, self.options, optimizer=taken(OptimizerConfig, self.options, adamw_lr=rate))
        prompts = self._prompts(data)
        if find_spec("matplotlib") is None:
            self._say("matplotlib is not installed: no loss.png will be drawn, metrics.jsonl has the numbers")
        with noticed(self.parallel.world == 1) as stop:
            trainer = Trainer(
                objective, data.source, run, self.out / "run", self.parallel, self.options["resume"], stop=stop,
                data=data.digest, held_out=data.held_out, samples=lambda: self._samples(prompts),
            )  # fmt: skip
            trainer.run()
            weights = trainer.result()
            if self.parallel.rank == 0:
                self._write(weights)

    def _say(self, text: str) -> None:
        if self.parallel.rank == 0:
            say(text)

    def _prompts(self, data: Data) -> list[list[int]]:
        """Ids of the beginnings that sample texts continue."""
        if self.options["prompts"]:
            return [self.words.encode(text, add_special_tokens=False).ids for text in self.options["prompts"]]
        rows = data.held_out[:_SAMPLES] or data.source.rows(0, _SAMPLES)
        return [list(row.ids[: row.prompt or -(-len(row.ids) // 2)]) for row in rows]

    def _samples(self, prompts: list[list[int]]) -> list[str]:
        """The prompts and what the prior writes after them; in stage 1, what the VAE makes of the prompts."""
        if self.dit is None:
            return [self.words.decode(ids) for ids in reconstructed(self.vae, prompts, self.special.pad)]
        sampling = Sampling(max_new_tokens=_SAMPLE_TOKENS, end_ids=self.special.end, pad_id=self.special.pad)
        found = Generator(self.vae, self.dit, self.words, sampling).tokens(prompts)
        return [self.words.decode([*ids, *new]) for ids, new in zip(prompts, found, strict=True)]

    def _write(self, weights: dict[str, Any]) -> None:
        """The checkpoint, then the curves. What was not trained is copied or written as it was read."""
        dtype = self.options["dtype"]
        try:
            with drafted(self.out) as draft:
                release.write_companions(self.folder, draft, self.words, self.special)
                write_network("vae", self.vae.config, weights.get("vae") or self.vae.state_dict(), draft, dtype)
                if self.dit is not None:
                    write_network("dit", self.dit.config, weights["dit"], draft, dtype)
                elif self.fine_tuning:
                    prior = "cola_dlm/cola_dit"
                    shutil.copytree(self.folder / prior, draft / prior)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{self.out}: the checkpoint could not be written ({error}); its weights are saved in "
                f"{self.out / 'run'}, and the same command with --resume writes it"
            ) from error
        self._say(f"{self.out}: written")
        plot_losses(self.out / "run")
