"""How every part of colaserve writes a file as a whole.

A regular file is replaced: its new content is written beside it, brought to the disk and renamed, so that a reader, or
a crash, finds the old content or the new one. The file keeps its mode and owner, and a link stays and is followed.
Where replacing would change more than the content, the file is written in place: devices and pipes, a file with
several names, anything below /dev and /proc, and a file in a folder that takes no new files.
"""

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Final

_REFUSED: Final = {errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY}


def write_file(path: str | PathLike[str], content: str | bytes) -> None:
    """Give a file this content, text as UTF-8. An OSError, a full disk say, names `path`, and the old file stays."""
    data = content.encode() if isinstance(content, str) else content
    with named(path):
        if _replaceable(path):
            with contextlib.suppress(_NotReplaced):
                _replace(Path(os.path.realpath(path)), data)
                return
        with open(path, "wb") as file:
            file.write(data)


@contextlib.contextmanager
def named(path: str | PathLike[str]) -> Iterator[None]:
    """An OSError about a file, which writing raises without a name, gets this one."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename == os.fspath(path):
            raise
        raise type(error)(error.errno, error.strerror, os.fspath(path)) from error


class _NotReplaced(Exception):
    """The folder takes no file beside this one, or this process may not give the file to its owner."""


def _replaceable(path: str | PathLike[str]) -> bool:
    if os.path.abspath(path).startswith(("/dev/", "/proc/")):
        return False
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return True
    return stat.S_ISREG(found.st_mode) and found.st_nlink == 1 and os.access(path, os.W_OK)


def _replace(path: Path, data: bytes) -> None:
    draft = path.with_name(f".{secrets.token_hex(8)}.part")
    try:
        with open(draft, "xb") as file:
            _take_over(file.fileno(), path)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except OSError as error:
        if error.errno in _REFUSED:
            raise _NotReplaced from error
        raise
    finally:
        draft.unlink(missing_ok=True)


def _take_over(file: int, path: Path) -> None:
    """Give a new file the owner and the mode of the one at `path`, if there is one."""
    try:
        old = os.stat(path)
    except FileNotFoundError:
        return
    new = os.fstat(file)
    if (new.st_uid, new.st_gid) != (old.st_uid, old.st_gid):
        os.fchown(file, old.st_uid, old.st_gid)
    os.fchmod(file, stat.S_IMODE(old.st_mode))
