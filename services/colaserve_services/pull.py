"""`colaserve pull`: fetch a checkpoint from the Hugging Face Hub, and check that every byte and tensor is there."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import click

from colaserve_services.errors import CheckpointError, Unavailable, UsageError
from colaserve_services.launch.progress import Progress, size

REPOSITORY = "ByteDance-Seed/Cola-DLM"
# What is served, and what a reader of the folder wants beside it. Pickles are never fetched.
WANTED = (
    "cola_dlm/*/config.json", "cola_dlm/*/model*.safetensors", "cola_dlm/*/model.safetensors.index.json",
    "tokenizer.json", "generation_config.json", "LICENSE*", "README.md",
)  # fmt: skip
CHUNK = 1 << 22


@dataclass(frozen=True)
class RemoteFile:
    """A file of the repository; `sha256` is the Hub's of large files, `blob` git's SHA-1 of the others."""

    path: str
    size: int
    sha256: str | None
    blob: str | None


@dataclass(frozen=True)
class Snapshot:
    """A revision of a repository."""

    repository: str
    commit: str
    files: tuple[RemoteFile, ...]

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)


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
    colaserve pull                                    the released Cola-DLM, about 9 GB
    colaserve pull someone/their-model --dir models/theirs --revision v2
    colaserve up --model Cola-DLM

    What is there is kept, and a broken download continues where it stopped. Then every file's size and SHA-256 is
    compared with the Hub's, the configs are read, and every tensor that they ask for must be in the files. HF_ENDPOINT
    names another hub, HF_TOKEN a token for it.
    """
    from colaserve_services.commands import run_or_explain

    target = directory or Path(repository.rpartition("/")[2])
    run_or_explain(lambda: fetch(repository, revision, target, check))


def fetch(repository: str, revision: str, directory: Path, check_only: bool = False) -> None:
    """Make `directory` hold that revision, whole. Raises UsageError, Unavailable and CheckpointError."""
    snapshot = look_up(repository, revision)
    click.echo(f"{repository} at {snapshot.commit[:12]}: {len(snapshot.files)} files, {size(snapshot.size)}", err=True)
    if not check_only:
        _check_room(snapshot, directory)
        with _hub_errors(repository, revision):
            _download(snapshot, directory)
    verify(snapshot, directory)
    _check_checkpoint(directory)
    click.echo(f"{directory} is complete. Serve it: colaserve up --model {directory}")


def look_up(repository: str, revision: str) -> Snapshot:
    """The files of a revision that a checkpoint needs."""
    from huggingface_hub import HfApi

    with _hub_errors(repository, revision):
        info = HfApi(_endpoint()).model_info(repository, revision=revision, files_metadata=True)
    files = tuple(_remote(sibling) for sibling in info.siblings or () if wanted(sibling.rfilename))
    if not any(file.path.endswith(".safetensors") for file in files):
        raise CheckpointError(
            f"{repository} at {revision}: no cola_dlm/*/model.safetensors; is it a Cola-DLM checkpoint?"
        )
    return Snapshot(repository, info.sha or revision, files)


def wanted(path: str) -> bool:
    """Whether a checkpoint needs this file."""
    return any(fnmatch(path, pattern) and path.count("/") == pattern.count("/") for pattern in WANTED)


def verify(snapshot: Snapshot, directory: Path) -> None:
    """Raise CheckpointError for the first file that is missing or not the Hub's, byte for byte."""
    progress, done = Progress("checking"), 0
    try:
        for file in snapshot.files:
            path = directory / file.path
            _check_size(file, path)
            digest = hashlib.sha256() if file.sha256 else hashlib.sha1(f"blob {file.size}\0".encode())  # noqa: S324 - git's
            for chunk in _chunks(path):
                digest.update(chunk)
                done += len(chunk)
                progress(done, snapshot.size)
            expected = file.sha256 or file.blob
            if expected and digest.hexdigest() != expected:
                raise CheckpointError(f"{path}: is not the Hub's file (its hash differs); delete it and pull again")
    finally:
        progress.close()


def _check_size(file: RemoteFile, path: Path) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; pull again")
    if path.stat().st_size != file.size:
        raise CheckpointError(f"{path}: has {path.stat().st_size} bytes, the Hub's file has {file.size}; pull again")


def _check_checkpoint(directory: Path) -> None:
    from colaserve_services.model import loading
    from colaserve_services.model.checkpoint import Checkpoint

    loading.check(Checkpoint.open(directory))


def _download(snapshot: Snapshot, directory: Path) -> None:
    from huggingface_hub import hf_hub_download

    for file in snapshot.files:  # one by one: the largest fills any line
        hf_hub_download(
            snapshot.repository, file.path, revision=snapshot.commit, local_dir=directory, endpoint=_endpoint()
        )


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT") or None


def _check_room(snapshot: Snapshot, directory: Path) -> None:
    missing = sum(file.size for file in snapshot.files if not (directory / file.path).is_file())
    there = next(parent for parent in (directory, *directory.absolute().parents) if parent.exists())
    free = shutil.disk_usage(there).free
    if missing > free:
        raise UsageError(f"--dir: {directory} has space for {size(free)}, {size(missing)} are to be fetched")


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk


def _remote(sibling: Any) -> RemoteFile:
    sha256 = sibling.lfs.sha256 if sibling.lfs else None
    return RemoteFile(sibling.rfilename, sibling.size or 0, sha256, None if sha256 else sibling.blob_id)


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
