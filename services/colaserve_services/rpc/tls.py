"""TLS credentials. Servers read a certificate again when its files change; a broken new one is logged and ignored."""

from __future__ import annotations

import ssl
from functools import partial
from pathlib import Path
from typing import Any

import grpc

from colaserve_services.errors import UsageError
from colaserve_services.rpc.settings import ClientTls, ServerTls
from colaserve_services.rpc.watched_files import WatchedFiles


def server_credentials(tls: ServerTls) -> grpc.ServerCredentials:
    """Credentials that follow the files of `tls`, at which each handshake looks.

    Raise UsageError when these cannot be read now, or do not fit.
    """
    watched, read = WatchedFiles(tls.cert, tls.key, tls.client_ca), partial(_configuration, tls)
    fetch: Any = partial(watched.read_again, read)  # None, for unchanged, is missing in the stubs
    return grpc.dynamic_ssl_server_credentials(read(), fetch, tls.client_ca is not None)


def channel_credentials(tls: ClientTls) -> grpc.ChannelCredentials:
    """Credentials of a client; raise UsageError when a file cannot be read, or the key is not the certificate's."""
    if (tls.cert is None) != (tls.key is None):
        raise UsageError("a client certificate needs both its certificate and its key")
    ca, key, cert = (_bytes(path) for path in (tls.ca, tls.key, tls.cert))
    _context(tls.cert, tls.key, tls.ca)
    return grpc.ssl_channel_credentials(ca, key, cert)


def server_context(tls: ServerTls) -> ssl.SSLContext:
    """OpenSSL's context of a server; raise UsageError when a file cannot be read, or they do not fit."""
    context = _context(tls.cert, tls.key, tls.client_ca)
    context.verify_mode = ssl.CERT_NONE if tls.client_ca is None else ssl.CERT_REQUIRED
    return context


def _configuration(tls: ServerTls) -> grpc.ServerCertificateConfiguration:
    key, cert, client_ca = (_bytes(path) for path in (tls.key, tls.cert, tls.client_ca))
    _context(tls.cert, tls.key, tls.client_ca)
    return grpc.ssl_server_certificate_configuration([(key, cert)], client_ca)


def _context(cert: Path | None, key: Path | None, ca: Path | None) -> ssl.SSLContext:
    """Finds out now what gRPC finds out in handshakes only."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        if cert is not None:
            context.load_cert_chain(cert, key, password="")  # else it asks for one at the terminal
        if ca is not None:
            context.load_verify_locations(ca)
    except OSError as error:  # ssl.SSLError is one
        files = ", ".join(str(path) for path in (cert, key, ca) if path is not None)
        raise UsageError(f"TLS: cannot use {files}: {error.strerror or error}") from error
    return context


def _bytes(path: Path | None) -> bytes | None:
    try:
        return None if path is None else path.read_bytes()
    except OSError as error:
        raise UsageError(f"TLS: cannot read {path}: {error.strerror or error}") from error
