"""Checkpoints on the Hugging Face Hub: found in its cache, else fetched and compared with the Hub's checksums."""

import logging
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from colaserve_services.errors import CheckpointError, Unavailable, UsageError
from colaserve_services.rpc import logs

# What is served, and what a reader of the folder wants beside it. Pickles are never fetched.
WANTED = [
    *(f"cola_dlm/{part}/{name}" for part in ("cola_dit", "cola_vae")
      for name in ("config.json", "model*.safetensors", "model.safetensors.index.json")),
    "tokenizer.json", "tokenizer_config.json", "generation_config.json", "MODEL_CARD.md", "LICENSE*", "README.md",
]  # fmt: skip
QUIET_SECONDS = 2.0  # nothing is said about what is done sooner
LINE_SECONDS = 5.0  # between two log lines about progress
_ID = re.compile(r"(\w[\w.-]*/[\w.-]+)(?:@(.+))?")

_log = logging.getLogger(__name__)


class HubId(NamedTuple):
    """A repository, and its branch, tag or commit."""

    repository: str
    revision: str

    @classmethod
    def parse(cls, text: str) -> "HubId | None":
        """OWNER/NAME[@REVISION], else None."""
        found = _ID.fullmatch(text)
        return found and cls(found[1], found[2] or "main")

    def __str__(self) -> str:
        return f"{self.repository} at {self.revision}"


def checkpoint_folder(model: str) -> Path:
    """The folder `model`, or the one with the checkpoint of this Hub id: in the Hub's cache, else fetched into it.

    What the cache has whole is used without asking the Hub. Raises UsageError, Unavailable and CheckpointError.
    """
    wanted = HubId.parse(model)
    if wanted is None or Path(model).exists():
        return Path(model)
    try:
        return cached(wanted) or fetch(wanted)
    except (UsageError, Unavailable) as error:
        raise type(error)(f"--model: {model} is no folder here; {error}") from error


def cached(wanted: HubId) -> Path | None:
    """The snapshot in the Hub's cache; None unless it is whole."""
    from huggingface_hub import errors, snapshot_download

    from colaserve_services.model.checkpoint import Checkpoint

    repository, revision = wanted
    try:
        found = snapshot_download(repository, revision=revision, allow_patterns=WANTED, local_files_only=True)
        return Checkpoint.open(found).directory
    except (errors.LocalEntryNotFoundError, errors.HFValidationError, CheckpointError):
        return None


def fetch(wanted: HubId, directory: Path | None = None, check_only: bool = False) -> Path:
    """Make `directory` (None: the Hub's cache) hold that revision, whole; return the folder.

    Files that are there are kept; small ones come first. Raises UsageError, Unavailable and CheckpointError.
    """
    from huggingface_hub import HfApi, constants, hf_hub_download

    logging.getLogger("huggingface_hub").handlers.clear()  # its lines go where ours do
    api, (repository, revision) = HfApi(), wanted
    with _hub_errors(wanted):
        info = api.model_info(repository, revision=revision, files_metadata=True)
    commit, found = info.sha or revision, {file.rfilename: file.size or 0 for file in info.siblings or ()}
    wanted_names = (name for name in found if any(fnmatch(name, pattern) for pattern in WANTED))
    sizes = {name: found[name] for name in sorted(wanted_names, key=found.__getitem__)}
    if not any(name.endswith(".safetensors") for name in sizes):
        raise CheckpointError(f"{wanted}: no cola_dlm/cola_dit/model.safetensors; is it a Cola-DLM checkpoint?")
    snapshots = Path(constants.HF_HUB_CACHE, f"models--{repository.replace('/', '--')}", "snapshots")
    folder = directory or snapshots / commit
    _log.info("%s is %s: %d files, %s", wanted, commit, len(sizes), size(sum(sizes.values())))
    if not check_only:
        missing = sum(nbytes for name, nbytes in sizes.items() if not (folder / name).is_file())
        there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
        if missing > (free := shutil.disk_usage(there).free):
            raise UsageError(f"{there} has space for {size(free)}, {size(missing)} are to be fetched")
        with _hub_errors(wanted):
            for name in sizes:  # in this thread, not in a pool that the end of the process would wait for
                hf_hub_download(repository, name, revision=commit, local_dir=directory, tqdm_class=Progress)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    _log.info("comparing every file with the Hub's checksum")
    with _hub_errors(wanted):
        compared = api.verify_repo_checksums(repository, revision=commit, local_dir=folder)
    differing = {mismatch["path"] for mismatch in compared.mismatches}
    for name in sizes:
        path = folder / name
        if name in compared.missing_paths:
            raise CheckpointError(f"{path}: missing; pull again")
        if name in differing:
            path = path.resolve()  # in the cache, a file elsewhere
            raise CheckpointError(f"{path}: is not the Hub's {name} (its hash differs); delete it, pull again")
    from colaserve_services.model import loading  # torch's, and so last
    from colaserve_services.model.checkpoint import Checkpoint

    loading.check(Checkpoint.open(folder))
    if directory is None and not check_only:  # only what was compared is found in the cache by this revision's name
        with _hub_errors(wanted):
            api.resolve_revision(repository, revision=revision)
    return folder


@contextmanager
def _hub_errors(wanted: HubId) -> Iterator[None]:
    """Failures of the Hub, of the way to it and of the disk as ours, one line each."""
    from huggingface_hub import errors

    repository, revision = wanted
    try:
        yield
    except errors.RevisionNotFoundError as error:
        raise UsageError(f"{repository} has no revision {revision!r} on the Hub") from error
    except errors.GatedRepoError as error:
        raise UsageError(f"{repository}: its owner asks for consent; set HF_TOKEN to a token that has it") from error
    except errors.RepositoryNotFoundError as error:
        raise UsageError(f"{repository}: no such repository on the Hub (or a private one: set HF_TOKEN)") from error
    except errors.HFValidationError as error:
        raise UsageError(f"{repository!r}: no repository's name; expected OWNER/NAME") from error
    except Exception as error:  # whatever the library's HTTP client of the day raises
        if isinstance(error, OSError) and error.errno and not isinstance(error, ConnectionError | TimeoutError):
            path = error.filename or f"a file of {repository}"
            raise UsageError(f"{path}: cannot be written: {error.strerror}") from error
        why = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise Unavailable(f"the Hub cannot be reached for {repository}: {why}; run it again to go on") from error


class Progress(tqdm):
    """Called with (bytes done, bytes in all), or updated as a tqdm bar by a library that makes it."""

    def __init__(self, desc: str = "", clock: Callable[[], float] = time.monotonic, **given: Any):
        self._what, self._clock, self._said = desc, clock, clock()
        off = True if logs.are_json() else None  # None: off where there is no terminal
        given |= {"unit": "B", "unit_scale": True, "delay": QUIET_SECONDS, "leave": False, "disable": off}
        super().__init__(desc=desc, **given)

    def __call__(self, done: int, total: int) -> None:
        self.total = total
        self.update(done - self.n)

    def update(self, n: float | None = 1) -> bool | None:
        """So many bytes more."""
        if not self.disable:
            return super().update(n)
        self.n += n or 0
        now, total = self._clock(), self.total or 0
        if now - self._said > LINE_SECONDS:
            self._said, share = now, round(self.n / max(total, 1), 2)
            _log.info("%s: %d%% of %s", self._what, 100 * share, size(total), extra={"fields": {"share": share}})
        return None


def size(count: float) -> str:
    """Bytes for eyes: 512 B, 3.1 MB, 7.3 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
