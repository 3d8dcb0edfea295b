"""Bearer keys: read from a file or the environment, compared in constant time, read again when the file changes."""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from colaserve_services.errors import NotAuthenticated, UsageError

LOOK_SECONDS = 1.0  # between two looks at the file

_log = logging.getLogger(__name__)


class Keys:
    """The keys that clients may show. Only their SHA-256 is kept."""

    def __init__(self, keys: Iterable[str] = (), file: Path | None = None):
        self._fixed = _parse(keys)
        self._file, self._looked, self._stamp = file, float("-inf"), (0.0, 0)
        self._from_file: dict[bytes, str] = {}
        self._look(first=True)
        if not self._all():
            raise UsageError(f"--api-keys-file: {file} holds no key; write one a line")

    @staticmethod
    def load(file: Path | None, text: str = "") -> Keys | None:
        """Keys of a file (`KEY` or `NAME KEY` a line, # begins a comment) and of a comma-separated text, or None."""
        given = [part.strip() for part in re.split(r"[,\n]", text) if part.strip()]
        return Keys(given, file) if given or file is not None else None

    def identify(self, authorization: str) -> str:
        """The name of the key in `authorization` ("Bearer KEY"): given, or from its hash. Else NotAuthenticated."""
        scheme, _, key = authorization.partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise NotAuthenticated("no key: send `authorization: Bearer KEY`")
        self._look()
        shown = _digest(key.strip())
        names = [name for known, name in self._all().items() if hmac.compare_digest(shown, known)]  # looks at each
        if not names:
            raise NotAuthenticated("unknown key")
        return names[0]

    def _all(self) -> dict[bytes, str]:
        return self._fixed | self._from_file

    def _look(self, first: bool = False) -> None:
        if self._file is None or time.monotonic() - self._looked < LOOK_SECONDS:
            return
        self._looked = time.monotonic()
        try:
            self._read(self._file)
        except UsageError as error:
            if first:
                raise
            _log.error("the old keys stay in use: %s", error)

    def _read(self, file: Path) -> None:
        try:
            status = file.stat()
            stamp = (status.st_mtime, status.st_size)
            if stamp != self._stamp:
                self._stamp = stamp
                self._from_file = _parse(file.read_text(encoding="utf-8").splitlines())
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--api-keys-file: cannot read {file}: {error}") from error


_COMMENT: Final = re.compile(r"(^|\s)#.*")  # a key may hold the sign


def _parse(lines: Iterable[str]) -> dict[bytes, str]:
    """Digest to name. A line of more than two words: UsageError, which shows no key."""
    keys = {}
    for number, line in enumerate(lines, start=1):
        words = _COMMENT.sub("", line).split()
        if len(words) > 2:
            raise UsageError(f"--api-keys-file: line {number} has {len(words)} words, expected KEY or NAME KEY")
        if words:
            digest = _digest(words[-1])
            keys[digest] = words[0] if len(words) == 2 else f"key-{digest.hex()[:8]}"
    return keys


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
