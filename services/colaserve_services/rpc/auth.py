"""Bearer keys: read from a file or the environment, compared in constant time, read again when the file changes."""

import hashlib
import hmac
import re
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, Final

from colaserve_client.reading import Unreadable, read_lines
from colaserve_services.errors import NotAuthenticated, UsageError
from colaserve_services.rpc.watched_files import WatchedFiles

_ROLE_NAME: Final = re.compile(r"(colaserve-)?(gateway|coordinator|encoder|prior|decoder)(\.|$)")


class Keys:
    """The keys that clients may show. Only their SHA-256 is kept."""

    def __init__(self, keys: Iterable[str] = (), file: Path | None = None):
        self._fixed, self._file = _parse(enumerate(keys, 1), "key"), file
        self._watched = WatchedFiles(file)
        self._from_file = {} if file is None else _read(file)
        if not self._all():
            raise _no_key(file)

    @staticmethod
    def load(file: Path | None, role_key: str = "") -> "Keys | None":
        """Keys of a file (`KEY` or `NAME KEY` a line, # begins a comment) and the one that roles show; None without.

        UsageError for a file that holds no key, and for a key that HTTP cannot carry."""
        return None if file is None else Keys([f"role {role_key}"] if role_key else [], file)

    def identify(self, authorization: str) -> str:
        """The name of the key in `authorization` ("Bearer KEY"): given, or from its hash. Else NotAuthenticated."""
        scheme, _, key = authorization.partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise NotAuthenticated("no key: send `authorization: Bearer KEY`")
        if self._file is not None:
            self._from_file = self._watched.read_again(partial(_read_some, self._file)) or self._from_file
        shown = _digest(key.strip())
        names = [name for known, name in self._all().items() if hmac.compare_digest(shown, known)]  # looks at each
        if not names:
            raise NotAuthenticated("unknown key")
        return names[0]

    def _all(self) -> dict[bytes, str]:
        return self._fixed | self._from_file


def _read_some(file: Path) -> dict[bytes, str]:
    """Keys of a file that had some; one that was emptied is a mistake, or still being written."""
    if keys := _read(file):
        return keys
    raise _no_key(file)


def _read(file: Path) -> dict[bytes, str]:
    try:
        return _parse(read_lines(file), f"--api-keys-file: {file}: line")
    except Unreadable as error:
        raise UsageError(f"--api-keys-file: cannot read {error}") from error


def _no_key(file: Path | None) -> UsageError:
    if file is None:
        return UsageError("there is no key")
    return UsageError(f"--api-keys-file: {file} holds no key; write one a line")


_COMMENT: Final = re.compile(r"(^|\s)#.*")  # a key may hold the sign
_BLANKS: Final = " \t\r"


def _parse(lines: Iterable[tuple[int, str]], source: str) -> dict[bytes, str]:
    """Digest to name. A wrong line: UsageError, which gives its number and shows no key."""
    keys = {}
    for number, line in lines:
        words = re.split(f"[{_BLANKS}]+", _COMMENT.sub("", line).strip(_BLANKS))
        if words == [""]:
            continue
        if len(words) > 2:
            raise UsageError(f"{source} {number} has {len(words)} words, expected KEY or NAME KEY")
        key = checked(words[-1], f"{source} {number}")
        keys[_digest(key)] = words[0] if len(words) == 2 else f"key-{_digest(key).hex()[:8]}"
    return keys


def checked(key: str, source: str) -> str:
    """A key, without the blanks around it; UsageError for none, and for one that HTTP cannot carry."""
    key = key.strip()
    if not key:
        raise UsageError(f"{source} holds no key")
    if not (key.isascii() and key.isprintable()):
        raise UsageError(f"{source} has characters that HTTP cannot carry; a key is of printable ASCII")
    return key


def is_role_key(authorization: str, role_key: str) -> bool:
    """Whether `authorization` shows the key that the roles show each other; False where they have none."""
    scheme, _, key = authorization.partition(" ")
    return (
        scheme.lower() == "bearer" and bool(role_key) and hmac.compare_digest(_digest(key.strip()), _digest(role_key))
    )


def has_role_certificate(context: Any) -> bool:
    """Whether the other end of a gRPC connection showed a certificate, verified by mutual TLS, of one of our roles:
    a DNS name of it begins with gateway, coordinator, ..., or with colaserve- before that."""
    shown = context.auth_context()
    names = [*shown.get("x509_subject_alternative_name", ()), *shown.get("x509_common_name", ())]
    return any(_ROLE_NAME.match(name.decode(errors="replace")) for name in names)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
