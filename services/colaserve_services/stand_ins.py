"""What is found in place of a large file when a download or a clone did not bring it."""

from pathlib import Path

_LFS = b"version https://git-lfs.github.com/spec/"


def stand_in(path: Path) -> str | None:
    """What the file is, with what to do about it, when it is not what its name says; None: nothing of this kind."""
    try:
        with path.open("rb") as file:
            head = file.read(256).removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    except OSError:
        return None
    if head.startswith(_LFS):
        return "a git-lfs pointer in place of the file; `git lfs pull` fetches it"
    if head.startswith((b"<!doctype html", b"<html", b"<head")):
        return "an HTML page in place of the file; download it again, with a token where the model needs one"
    return None
