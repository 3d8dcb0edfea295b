"""`colaserve pull`: fetch a checkpoint from the Hugging Face Hub, and check that every byte and tensor is there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

import click

from colaserve_services.errors import CheckpointError, Unavailable, UsageError
from colaserve_services.launch.progress import size

if TYPE_CHECKING:
    from huggingface_hub import HfApi

REPOSITORY = "ByteDance-Seed/Cola-DLM"
# What is served, and what a reader of the folder wants beside it. Pickles are never fetched.
WANTED = (
    "cola_dlm/*/config.json", "cola_dlm/*/model*.safetensors", "cola_dlm/*/model.safetensors.index.json",
    "tokenizer.json", "generation_config.json", "LICENSE*", "README.md",
)  # fmt: skip


@click.command()
@click.argument("repository", default=REPOSITORY, envvar="COLASERVE_PULL_REPOSITORY")
@click.option("--revision", default="main", show_default=True, help="Branch, tag or commit.")
@click.option(
    "--dir", "directory", type=click.Path(path_type=Path, file_okay=False), help="Where to [./<repository's name>]."
)
@click.option("--check", is_flag=True, help="Fetch nothing; check what is there.")
def pull(repository: str, revision: str, directory: Path | None, check: bool) -> None:
    """Fetch a checkpoint from the Hugging Face Hub and check it.

    \b
    colaserve pull                               # the released Cola-DLM, about 9 GB
    colaserve pull someone/their-model --dir models/theirs --revision v2
    colaserve up --model Cola-DLM

    What is there is kept, and a broken download continues where it stopped. Then every file's size and SHA-256 is
    compared with the Hub's, the configs are read, and every tensor that they ask for must be in the files. HF_ENDPOINT
    names another hub, HF_TOKEN a token for it.
    """
    from colaserve_services.launch.options import run_or_explain

    target = directory or Path(repository.rpartition("/")[2])
    run_or_explain(lambda: fetch(repository, revision, target, check))


def fetch(repository: str, revision: str, directory: Path, check_only: bool = False) -> None:
    """Make `directory` hold that revision, whole. Raises UsageError, Unavailable and CheckpointError."""
    from huggingface_hub import HfApi, snapshot_download

    endpoint = os.environ.get("HF_ENDPOINT") or None
    api = HfApi(endpoint)
    with _hub_errors(repository, revision):
        info = api.model_info(repository, revision=revision, files_metadata=True)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or () if wanted(file.rfilename)}
    if not any(path.endswith(".safetensors") for path in sizes):
        raise CheckpointError(
            f"{repository} at {revision}: no cola_dlm/*/model.safetensors; is it a Cola-DLM checkpoint?"
        )
    commit = info.sha or revision
    click.echo(f"{repository} at {commit[:12]}: {len(sizes)} files, {size(sum(sizes.values()))}", err=True)
    if not check_only:
        _check_space(sizes, directory)
        with _hub_errors(repository, revision):
            snapshot_download(
                repository, revision=commit, local_dir=directory, allow_patterns=list(sizes), endpoint=endpoint,
                max_workers=1,  # one by one: the largest fills any line
            )  # fmt: skip
    _verify(api, repository, commit, directory, sizes)
    _check_tensors(directory)
    click.echo(f"{directory} is complete. Serve it: colaserve up --model {directory}")


def wanted(path: str) -> bool:
    """Whether a checkpoint needs this file."""
    return any(fnmatch(path, pattern) and path.count("/") == pattern.count("/") for pattern in WANTED)


def _verify(api: HfApi, repository: str, commit: str, directory: Path, names: Iterable[str]) -> None:
    """Raise CheckpointError for the first file that is missing or not the Hub's, byte for byte."""
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such folder")
    click.echo(f"{directory}: comparing every file with the Hub's checksum", err=True)
    with _hub_errors(repository, commit):
        found = api.verify_repo_checksums(repository, revision=commit, local_dir=directory)
    differing = {mismatch["path"] for mismatch in found.mismatches}
    for name in names:
        if name in found.missing_paths:
            raise CheckpointError(f"{directory / name}: missing; pull again")
        if name in differing:
            raise CheckpointError(
                f"{directory / name}: is not the Hub's file (its hash differs); delete it, pull again"
            )


def _check_tensors(directory: Path) -> None:
    from colaserve_services.model import loading
    from colaserve_services.model.checkpoint import Checkpoint

    loading.check(Checkpoint.open(directory))


def _check_space(sizes: Mapping[str, int], directory: Path) -> None:
    missing = sum(nbytes for path, nbytes in sizes.items() if not (directory / path).is_file())
    there = next(parent for parent in (directory, *directory.absolute().parents) if parent.exists())
    free = shutil.disk_usage(there).free
    if missing > free:
        raise UsageError(f"--dir: {directory} has space for {size(free)}, {size(missing)} are to be fetched")


@contextmanager
def _hub_errors(repository: str, revision: str) -> Iterator[None]:
    """The Hub's failures as ours, one line each."""
    from huggingface_hub import errors

    try:
        yield
    except errors.RevisionNotFoundError as error:
        raise UsageError(f"--revision: {repository} has no {revision!r}") from error
    except errors.GatedRepoError as error:
        raise UsageError(f"{repository}: its owner asks for consent; set HF_TOKEN to a token that has it") from error
    except errors.RepositoryNotFoundError as error:
        raise UsageError(f"{repository}: no such repository on the Hub (or a private one: set HF_TOKEN)") from error
    except errors.HFValidationError as error:
        raise UsageError(f"{repository!r}: no repository's name; expected owner/name") from error
    except Exception as error:  # whatever the library's HTTP client of the day raises
        why = _first_line(error)
        raise Unavailable(f"the Hub cannot be reached for {repository}: {why}; pull again to go on") from error


def _first_line(error: Exception) -> str:
    lines: Sequence[str] = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
