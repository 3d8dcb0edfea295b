"""TLS credentials. Servers read a certificate again when its files change; a broken new one is logged and ignored."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import grpc

from colaserve_services.errors import UsageError
from colaserve_services.rpc.settings import ClientTls, ServerTls

_log = logging.getLogger(__name__)


def server_credentials(tls: ServerTls) -> grpc.ServerCredentials:
    """Credentials that follow the files of `tls`; raise UsageError when these cannot be read now."""
    source = _Certificates(tls)
    first = source.read()
    fetch: Any = source.changed  # None, for unchanged, is missing in the stubs
    return grpc.dynamic_ssl_server_credentials(first, fetch, tls.client_ca is not None)


def channel_credentials(tls: ClientTls) -> grpc.ChannelCredentials:
    """Credentials of a client; raise UsageError when a file cannot be read."""
    if (tls.cert is None) != (tls.key is None):
        raise UsageError("a client certificate needs both its certificate and its key")
    return grpc.ssl_channel_credentials(_optional(tls.ca), _optional(tls.key), _optional(tls.cert))


class _Certificates:
    """Looks at the files at each handshake."""

    def __init__(self, tls: ServerTls):
        self._tls = tls
        self._seen = self._stamps()

    def read(self) -> grpc.ServerCertificateConfiguration:
        tls = self._tls
        pair = [(_bytes(tls.key), _bytes(tls.cert))]
        return grpc.ssl_server_certificate_configuration(pair, _optional(tls.client_ca))

    def _stamps(self) -> tuple[tuple[int, int], ...]:
        return stamps(self._tls.cert, self._tls.key, self._tls.client_ca)

    def changed(self) -> grpc.ServerCertificateConfiguration | None:
        """The new configuration, or None when nothing changed."""
        seen = self._stamps()
        if seen == self._seen:
            return None
        self._seen = seen
        try:
            configuration = self.read()
        except UsageError as error:
            _log.error("the old certificate stays in use: %s", error)
            return None
        _log.info("certificate read again from %s", self._tls.cert)
        return configuration


def stamps(*files: Path | None) -> tuple[tuple[int, int], ...]:
    """What changes when one of the files does."""
    return tuple(_stamp(path) for path in files if path is not None)


def _stamp(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError:
        return (0, 0)
    return (status.st_mtime_ns, status.st_ino)


def _optional(path: Path | None) -> bytes | None:
    return None if path is None else _bytes(path)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"TLS: cannot read {path}: {error.strerror or error}") from error
