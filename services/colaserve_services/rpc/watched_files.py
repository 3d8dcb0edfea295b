"""Keys and certificates that are renewed while a process runs."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from colaserve_services.errors import UsageError

T = TypeVar("T")
Stamp = tuple[int, int, int] | None  # None: there is no such file

_log = logging.getLogger(__name__)


class WatchedFiles:
    """Files that are read again when they change; to be made before they are read first."""

    def __init__(self, *files: Path | None):
        self._files = [file for file in files if file is not None]
        self._in_use = self._stamps()
        self._complaint = ""

    def read_again(self, read: Callable[[], T]) -> T | None:
        """What `read` makes of files that changed, else None.

        After a UsageError of `read` too: it is logged, once, and the next look reads again.
        """
        stamps = self._stamps()
        if stamps == self._in_use:
            return None
        try:
            content = read()
        except UsageError as error:
            if str(error) != self._complaint:
                _log.error("what was read before stays in use: %s", error)
            self._complaint = str(error)
            return None
        self._in_use, self._complaint = stamps, ""
        _log.info("read again: %s", ", ".join(map(str, self._files)))
        return content

    def _stamps(self) -> list[Stamp]:
        return [_stamp(file) for file in self._files]


def _stamp(file: Path) -> Stamp:
    try:
        status = file.stat()
    except OSError:
        return None
    return (status.st_ino, status.st_size, status.st_ctime_ns)  # the time also changes with the mode
