"""TLS credentials. Servers read a certificate again when its files change; a broken new one is logged and ignored."""

import ssl
from functools import partial
from typing import Any

import grpc

from colaserve_services.errors import UsageError
from colaserve_services.rpc.settings import Tls
from colaserve_services.rpc.watched_files import WatchedFiles


def server_credentials(tls: Tls) -> grpc.ServerCredentials:
    """Credentials that follow the files of `tls`, at which each handshake looks.

    Raise UsageError when these cannot be read now, or do not fit.
    """
    watched, read = WatchedFiles(tls.cert, tls.key, tls.ca), partial(_configuration, tls)
    fetch: Any = partial(watched.read_again, read)  # None, for unchanged, is missing in the stubs
    return grpc.dynamic_ssl_server_credentials(read(), fetch, tls.ca is not None)


def channel_credentials(tls: Tls) -> grpc.ChannelCredentials:
    """Credentials of a client; raise UsageError when a file cannot be read, or the key is not the certificate's."""
    if (tls.cert is None) != (tls.key is None):
        raise UsageError("a client certificate needs both its certificate and its key")
    return grpc.ssl_channel_credentials(*_contents(tls))


def server_context(tls: Tls) -> ssl.SSLContext:
    """OpenSSL's context of a server; raise UsageError when a file cannot be read, or they do not fit."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        if tls.cert is not None:
            context.load_cert_chain(tls.cert, tls.key, password="")  # else it asks for one at the terminal
        if tls.ca is not None:
            context.load_verify_locations(tls.ca)
            context.verify_mode = ssl.CERT_REQUIRED
    except OSError as error:  # ssl.SSLError is one
        files = ", ".join(str(path) for path in (tls.cert, tls.key, tls.ca) if path is not None)
        raise UsageError(f"TLS: cannot use {files}: {error.strerror or error}") from error
    return context


def _configuration(tls: Tls) -> grpc.ServerCertificateConfiguration:
    ca, *pair = _contents(tls)
    return grpc.ssl_server_certificate_configuration([pair], ca)


def _contents(tls: Tls) -> list[bytes | None]:
    """Of ca, key and cert, which OpenSSL takes: gRPC would find out in handshakes only."""
    try:
        found = [None if path is None else path.read_bytes() for path in (tls.ca, tls.key, tls.cert)]
    except OSError as error:
        raise UsageError(f"TLS: cannot read {error.filename}: {error.strerror or error}") from error
    server_context(tls)
    return found
