"""Log lines with the request id: JSON for machines, plain for a terminal. Text and latents never get in."""

import json
import logging
import os
import re
import sys
import threading
from datetime import UTC, datetime
from typing import Any, Final, TextIO

from colaserve_services.rpc.requests import current_request_id
from colaserve_services.rpc.settings import LogSettings

_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")

access = logging.getLogger("colaserve_services.access")


def configure(settings: LogSettings, role: str = "", stream: TextIO | None = None) -> None:
    """Send this process' log lines to `stream` (stderr), each with its role. Call it once, from the launcher."""
    stream = stream or sys.stderr
    as_text = settings.format == "text" or (settings.format == "auto" and stream.isatty())
    handler = logging.StreamHandler(stream)
    handler.setFormatter(TextFormatter(role) if as_text else JsonFormatter(role))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)  # libraries
    logging.captureWarnings(True)
    threading.excepthook = _log_death
    if settings.format == "json":  # gRPC's core writes lines of its own to stderr; calls fail with the same
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    logging.getLogger("colaserve_services").setLevel(settings.level.upper())


def are_json() -> bool:
    """Whether log lines are JSON."""
    return any(isinstance(handler.formatter, JsonFormatter) for handler in logging.getLogger().handlers)


def _log_death(death: threading.ExceptHookArgs) -> None:
    """A thread that an exception ended is a log line, like everything else."""
    if death.exc_value is not None:
        error = (death.exc_type, death.exc_value, death.exc_traceback)
        logging.getLogger(__name__).critical("a thread ended by an exception", exc_info=error)


class _Formatter(logging.Formatter):
    def __init__(self, role: str = ""):
        super().__init__()
        self.role = role


class JsonFormatter(_Formatter):
    """One JSON object a line: time, level, role, logger, message, request_id, the fields of the call, exception."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "role": self.role,
            "logger": record.name.removeprefix("colaserve_services."),
            "message": record.getMessage(),
        }
        if request_id := current_request_id():
            line["request_id"] = request_id
        line |= fields(record)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


class TextFormatter(_Formatter):
    """The same for eyes."""

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created).astimezone().strftime("%H:%M:%S")
        extra = "".join(f" {name}={_one_line(value)}" for name, value in fields(record).items())
        request = f" request_id={current_request_id()}" if current_request_id() else ""
        text = f"{when} {record.levelname.lower():7} {self.role:11} {record.getMessage()}{extra}{request}"
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


def _one_line(value: Any) -> str:
    """A value, which may be a caller's, without characters that could forge a line or command a terminal."""
    return _CONTROL.sub(lambda found: repr(found[0])[1:-1], str(value))


def fields(record: logging.LogRecord) -> dict[str, Any]:
    """What was given as `extra={"fields": {...}}`."""
    given = getattr(record, "fields", None)
    return given if isinstance(given, dict) else {}
