"""How a process serves and calls: small frozen settings, made once from the command line (`launch/settings.py`)."""

import resource
from dataclasses import dataclass, field
from pathlib import Path

MAX_CALLS = 1024
MAX_MESSAGE_BYTES = 64 * 1024 * 1024  # of one gRPC message, either way; requests have 16 MiB at most


def descriptors(share: float) -> int:
    """So much of the files that the process may have open, at least one."""
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 2**20 if most == resource.RLIM_INFINITY else max(int(most * share), 1)


@dataclass(frozen=True)
class Tls:
    """PEM files of one side of connections, read again when they change."""

    cert: Path | None = None  # the chain of this side; None: it has no certificate
    key: Path | None = None
    ca: Path | None = None  # of the other side; None: clients show none, servers the system knows

    @property
    def of_server(self) -> "Tls | None":
        """How a server uses them: not at all without a certificate."""
        return None if self.cert is None else self


@dataclass(frozen=True)
class ServerSettings:
    """One gRPC server."""

    host: str = "127.0.0.1"
    port: int = 0  # 0: a free one
    tls: Tls | None = None
    role_key: str = field(default="", repr=False)  # that the roles show each other; whoever shows it may name a caller
    max_calls: int = MAX_CALLS  # at once; health checks and GetInfo are not counted
    max_connections: int = field(default_factory=lambda: descriptors(0.25))  # open ones; more are closed at once
    first_message_seconds: float = 30.0  # that a connection's handshake, or a call's first message, may take to come
    max_connection_age: float = 120.0  # seconds, then clients connect anew and find new replicas; 0: for ever
    drain_seconds: float = 2.0  # between NOT_SERVING and refusing calls, so that balancers see it
    grace_seconds: float = 30.0  # that running calls have to end after that


@dataclass(frozen=True)
class ChannelSettings:
    """Connections to other services."""

    tls: Tls | None = None
    api_key: str = field(default="", repr=False)  # sent as a bearer key


@dataclass(frozen=True)
class LogSettings:
    """Log lines on stderr; they never hold text or latents."""

    format: str = "auto"  # "json", "text", or "auto": text on a terminal, JSON elsewhere
    level: str = "info"
