"""Bearer keys: read from a file or the environment, compared in constant time, read again when the file changes."""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Iterable
from pathlib import Path

from colaserve_services.errors import NotAuthenticated, UsageError

LOOK_SECONDS = 1.0  # between two looks at the file


class Keys:
    """The keys that clients may show. Only their SHA-256 is kept."""

    def __init__(self, keys: Iterable[str] = (), file: Path | None = None):
        self._fixed = tuple(_digest(key) for key in keys)
        self._file, self._looked, self._stamp = file, float("-inf"), (0.0, 0)
        self._from_file: tuple[bytes, ...] = ()
        self._look()
        if not self._all():
            raise UsageError(f"--api-keys-file: {file} holds no key; write one a line")

    @staticmethod
    def load(file: Path | None, text: str = "") -> Keys | None:
        """Keys of a file (one a line, # begins a comment) and of a comma-separated text; None without either."""
        given = [part.strip() for part in text.split(",") if part.strip()]
        return Keys(given, file) if given or file is not None else None

    def identify(self, authorization: str) -> str:
        """The client's name (8 hex digits of its key's hash), or NotAuthenticated. `authorization`: "Bearer KEY"."""
        scheme, _, key = authorization.partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise NotAuthenticated("no key: send `authorization: Bearer KEY`")
        self._look()
        shown = _digest(key.strip())
        matches = [hmac.compare_digest(shown, known) for known in self._all()]  # all of them, whatever matched
        if not any(matches):
            raise NotAuthenticated("unknown key")
        return shown.hex()[:8]

    def _all(self) -> tuple[bytes, ...]:
        return self._fixed + self._from_file

    def _look(self) -> None:
        if self._file is None or time.monotonic() - self._looked < LOOK_SECONDS:
            return
        self._looked = time.monotonic()
        try:
            status = self._file.stat()
            stamp = (status.st_mtime, status.st_size)
            if stamp != self._stamp:
                self._from_file, self._stamp = tuple(_read(self._file)), stamp
        except OSError as error:
            if not self._from_file:
                raise UsageError(f"--api-keys-file: cannot read {self._file}: {error.strerror or error}") from error


def _read(file: Path) -> Iterable[bytes]:
    lines = (line.split("#")[0].strip() for line in file.read_text(encoding="utf-8").splitlines())
    return [_digest(line) for line in lines if line]


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
