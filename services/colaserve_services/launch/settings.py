"""Command-line values to settings; what cannot go together is a UsageError here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from colaserve_services.engine.limits import EngineLimits
from colaserve_services.errors import UsageError
from colaserve_services.launch.options import DEMO
from colaserve_services.rpc.auth import Keys, checked
from colaserve_services.rpc.settings import (
    AdmissionLimits,
    ChannelSettings,
    ClientTls,
    LogSettings,
    MetricsSettings,
    ServerSettings,
    ServerTls,
)

Params = Mapping[str, Any]
STAGES = ("encoder", "prior", "decoder")
MOST_REPLICAS = 64
DEFAULTS = (
    "max_new_tokens", "steps", "guidance_scale", "solver", "guidance_start", "guidance_end", "resamples", "temperature",
    "top_k", "top_p", "repetition_penalty", "chat_frame",
)  # fmt: skip


@dataclass(frozen=True)
class ModelSettings:
    """Which checkpoint, and how it computes."""

    directory: Path
    device: str = "cpu"
    dtype: str = "auto"
    threads: int | None = None  # None: torch's choice


@dataclass(frozen=True)
class WatchSettings:
    """How the process is watched."""

    metrics: MetricsSettings
    log: LogSettings
    ports_file: Path | None = None
    otlp_endpoint: str | None = None  # where traces go; None: there are none


def model(params: Params) -> ModelSettings:
    """The checkpoint, and how it computes."""
    return ModelSettings(checkpoint(params), params["device"], params["dtype"], params["threads"])


def checkpoint(params: Params) -> Path:
    """The checkpoint's folder; UsageError when the bundled one is asked for and not there."""
    directory: Path = params["model"]
    if directory == DEMO and not (directory / "tokenizer.json").is_file():
        raise UsageError(f"--model: this installation has no bundled checkpoint ({directory}); name a folder")
    return directory


def replicas(params: Params) -> dict[str, int]:
    """How many processes of a stage --replicas asks for."""
    found = {}
    for part in filter(None, (part.strip() for part in params["replicas"].split(","))):
        stage, _, count = part.partition("=")
        if stage not in STAGES or not count.isascii() or not count.isdecimal() or not 1 <= int(count) <= MOST_REPLICAS:
            raise UsageError(
                f"--replicas: got {part!r}, expected encoder, prior or decoder = 1 to {MOST_REPLICAS}, as in prior=2"
            )
        found[stage] = int(count)
    return found


def engine(params: Params) -> EngineLimits:
    """Limits of each engine."""
    names = (
        "max_context", "max_running", "max_waiting", "max_waiting_work", "kv_bytes", "prefix_cache_bytes", "run_ahead",
        "prefill_chunk", "idle_seconds",
    )  # fmt: skip
    return EngineLimits(**{name: params[name] for name in names})


def server(params: Params) -> ServerSettings:
    """The gRPC server."""
    return ServerSettings(
        host=params["host"],
        port=params["grpc_port"],
        health_port=params["health_port"],
        tls=_server_tls(params, "tls"),
        admission=admission(params),
        max_message_bytes=params["max_message_bytes"],
        max_concurrent_streams=params["max_concurrent_streams"],
        max_connection_age=params["max_connection_age"],
        keepalive_seconds=params["keepalive_seconds"],
        drain_seconds=params["drain_seconds"],
        grace_seconds=params["grace_seconds"],
    )


def gateway_server(params: Params) -> ServerSettings:
    """What a process without a gRPC server needs of this: how it drains."""
    return ServerSettings(
        host=params["host"], drain_seconds=params["drain_seconds"], grace_seconds=params["grace_seconds"]
    )


def admission(params: Params) -> AdmissionLimits:
    """Bounds of the gRPC server, and of the HTTP server."""
    names = ("max_calls", "max_calls_per_client", "max_rate_per_client")
    return AdmissionLimits(**{name: params[name] for name in names})


def keys(params: Params) -> Keys | None:
    """Who may call; None: everybody."""
    return Keys.load(params["api_keys_file"], params["api_keys"])


def channel(params: Params) -> ChannelSettings:
    """How other services are called."""
    ca, cert, key = (params[f"tls_{name}"] for name in ("ca", "client_cert", "client_key"))
    if ca is None and (cert or key or params["tls_server_name"]):
        raise UsageError("--tls-ca: needed with --tls-client-cert, --tls-client-key and --tls-server-name")
    tls = None if ca is None else ClientTls(ca, cert, key, params["tls_server_name"])
    return ChannelSettings(
        tls=tls,
        api_key=upstream_key(params),
        max_message_bytes=params["max_message_bytes"],
        keepalive_seconds=params["keepalive_seconds"],
    )


def upstream_key(params: Params) -> str:
    """The key that this process shows to the servers it calls; empty: none."""
    return checked(params["upstream_key"], "--upstream-key:") if params["upstream_key"] else ""


def http_tls(params: Params) -> ServerTls | None:
    """TLS of the HTTP port."""
    return _server_tls(params, "http_tls")


def watch(params: Params) -> WatchSettings:
    """Metrics, logs, the file of ports."""
    return WatchSettings(
        MetricsSettings(params["host"], params["metrics_port"], params["metrics_aliases"]),
        LogSettings(params["log_format"], params["log_level"]),
        params["ports_file"],
        params["otlp_endpoint"],
    )


def request_defaults(params: Params) -> dict[str, Any]:
    """What flags say in place of the checkpoint's own defaults."""
    return {name: params[name] for name in DEFAULTS if params[name] is not None}


def target(params: Params, name: str) -> str:
    """The address given by --<name>."""
    if not params[name]:
        raise UsageError(f"--{name}: needed; host:port, dns:///host:port or a list with commas")
    return str(params[name])


def _server_tls(params: Params, prefix: str) -> ServerTls | None:
    cert, key, client_ca = (params[f"{prefix}_{name}"] for name in ("cert", "key", "client_ca"))
    flag = "--" + prefix.replace("_", "-")
    if (cert is None) != (key is None):
        raise UsageError(f"{flag}-cert and {flag}-key go together")
    if cert is None:
        if client_ca is not None:
            raise UsageError(f"{flag}-client-ca: needs {flag}-cert and {flag}-key")
        return None
    return ServerTls(cert, key, client_ca)
