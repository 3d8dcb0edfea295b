"""Options of earlier versions, each also a variable: what replaced it, so that no setting is ignored silently."""

from collections.abc import Iterable, Mapping
from typing import Final

from colaserve_services.errors import UsageError

_DEFAULTS: Final = "say it in a JSON file, in the form of generation_config.json, and name that with --defaults"
_TLS: Final = "put tls.crt, tls.key and, for mutual TLS, ca.crt into a folder and name that with --tls"
_HTTP_TLS: Final = "put tls.crt, tls.key and, to verify clients, ca.crt into a folder and name that with --http-tls"
_FIXED: Final = "its value is right for everybody now, and fixed"
_CALLERS: Final = "bound the calls of one caller with the coordinator's --max-per-caller"

REMOVED: Final[Mapping[str, str]] = {
    "api-keys": "write the keys into a file, one a line, and name that with --api-keys-file",
    "attempts": _FIXED,
    **dict.fromkeys(
        ("chat-frame", "guidance-end", "guidance-scale", "guidance-start", "max-new-tokens", "repetition-penalty",
         "resamples", "solver", "steps", "temperature", "top-k", "top-p"),
        _DEFAULTS,
    ),
    "health-port": "probes ask the metrics port: GET /live and GET /ready, without TLS and keys",
    **dict.fromkeys(("http-tls-cert", "http-tls-key", "http-tls-client-ca"), _HTTP_TLS),
    "keepalive-seconds": _FIXED,
    "log-format": "write --log FORMAT",
    "log-level": "write --log FORMAT:LEVEL",
    "max-body-bytes": _FIXED,
    "max-calls": "bound the calls at work with the coordinator's --max-generations",
    **dict.fromkeys(("max-calls-per-client", "max-rate-per-client"), _CALLERS),
    "max-choices": _FIXED,
    "max-concurrent-streams": _FIXED,
    "max-connection-age": "it is 120 s everywhere",
    "max-message-bytes": _FIXED,
    "max-per-key": "it is called --max-per-caller",
    "max-queued": "it is twice --max-generations",
    **dict.fromkeys(("max-waiting", "max-waiting-work"), "sessions wait in the coordinator: see --queue-seconds"),
    "prefill-chunk": _FIXED,
    "prefix-cache-bytes": "it lives in what sessions leave of --kv-bytes",
    **dict.fromkeys(("tls-ca", "tls-cert", "tls-client-ca", "tls-client-cert", "tls-client-key", "tls-key"), _TLS),
    "tls-server-name": "certificates name the hosts that are called",
    "upstream-key": "set the variable COLASERVE_ROLE_KEY at the gateway and at the coordinator",
}  # fmt: skip
_OF_THE_CLIENT: Final = {"tls-ca", "tls-client-cert", "tls-client-key"}  # whose variables these are still


def check_removed(arguments: Iterable[str], environment: Mapping[str, str]) -> None:
    """Raise UsageError for the first option or variable that is gone; it says what replaced it."""
    given = {argument.partition("=")[0] for argument in arguments}
    for name, instead in REMOVED.items():
        variable = "COLASERVE_" + name.upper().replace("-", "_")
        if f"--{name}" in given:
            raise UsageError(f"--{name} is gone: {instead}")
        if environment.get(variable) and name not in _OF_THE_CLIENT:
            raise UsageError(f"{variable} is gone: {instead}")
