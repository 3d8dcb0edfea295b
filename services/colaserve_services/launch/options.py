"""Command-line options out of dataclasses: a field that `option` describes is a flag and the variable COLASERVE_<NAME>.

The command line wins over the variable, the variable over the default.
"""

import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import field, fields
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

import click

from colaserve_client.cli.options import Number, SectionedCommand, SectionedOption, Text, Trimmed, TrimmedPath
from colaserve_services.errors import ColaserveError, UsageError
from colaserve_services.rpc.settings import LogSettings, Tls

STAGES: Final = ("encoder", "prior", "decoder")
MOST_REPLICAS: Final = 64
TLS_NAMES: Final = ("tls.crt", "tls.key", "ca.crt")
LOG_FORMATS: Final = ("auto", "json", "text")
LOG_LEVELS: Final = ("debug", "info", "warning", "error")
MOST_SECONDS: Final = 2_000_000.0  # 23 days; in milliseconds still an option of a gRPC channel

S = TypeVar("S")

PORT = click.IntRange(0, 65535)
TEXT = Text()
TRIMMED = Trimmed()
FILE = TrimmedPath(path_type=Path, dir_okay=False)
MODEL = click.Path()
DTYPES = click.Choice(["auto", "float32", "bfloat16", "int8", "float8"])
POSITIVE = click.IntRange(1, 2**32 - 1)  # what a uint32 of the wire contract holds
COUNT = click.IntRange(0, 2**32 - 1)
SECONDS = Number(0, MOST_SECONDS)
SOME_SECONDS = Number(0, MOST_SECONDS, min_open=True)


class Parsed(Trimmed):
    """A text that `read` makes a value of; its ValueError says what is wrong."""

    def __init__(self, name: str, read: Callable[[str], Any]):
        self.name, self._read = name, read

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):  # the default
            return value
        try:
            return self._read(super().convert(value, param, ctx))
        except ValueError as error:
            self.fail(str(error), param, ctx)


def _whole(text: str, least: int, end: int) -> int | None:
    """The number that a text of digits is, from `least` and below `end`; else None."""
    return int(text) if text.isascii() and text.isdecimal() and least <= int(text) < end else None


def byte_budget(text: str) -> int:
    """A number of bytes; auto is 0."""
    if text == "auto":
        return 0
    if (found := _whole(text, 1, 2**63)) is None:
        raise ValueError(f"got {text!r}, expected auto or a number of bytes, at least 1")
    return found


def _by_stage(text: str) -> Iterator[tuple[str, str]]:
    """[STAGE=]VALUE with commas, as pairs; "" is every stage that is not named."""
    for part in filter(None, (part.strip() for part in text.split(","))):
        stage, sign, found = part.rpartition("=")
        if sign and stage not in STAGES:
            raise ValueError(f"got {part!r}, expected encoder, prior or decoder before the =")
        yield stage, found


def devices(text: str) -> dict[str, str]:
    """Where stages compute: {"": "cpu", "prior": "cuda:1"}. Which devices there are is found out later."""
    found = dict(_by_stage(text))
    for device in found.values():
        if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", device):
            raise ValueError(f"got {device!r}, expected cpu, cuda or cuda:N")
    return {"": "cpu", **found}


def replicas(text: str) -> dict[str, int]:
    """How many processes stages have: {"prior": 2}."""
    counts = {stage: _whole(count, 1, MOST_REPLICAS + 1) for stage, count in _by_stage(text)}
    found = {stage: count for stage, count in counts.items() if stage and count is not None}
    if found.keys() != counts.keys():
        raise ValueError(f"got {text!r}, expected STAGE=1 to {MOST_REPLICAS}, as in prior=2,decoder=2")
    return found


def log_settings(text: str) -> LogSettings:
    """FORMAT[:LEVEL] of log lines."""
    format_, _, level = text.partition(":")
    if format_ not in LOG_FORMATS or (level or "info") not in LOG_LEVELS:
        expected = f"one of {', '.join(LOG_FORMATS)}, and after a colon one of {', '.join(LOG_LEVELS)}"
        raise ValueError(f"got {text!r}, expected {expected}")
    return LogSettings(format_, level or "info")


class TlsFolder(TrimmedPath):
    """A folder with tls.crt and tls.key, ca.crt, or all three, as Kubernetes' Secrets have them."""

    def __init__(self) -> None:
        super().__init__(path_type=Path, file_okay=False)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        folder = Path(os.fspath(super().convert(value, param, ctx)))
        cert, key, ca = (file if (file := folder / name).is_file() else None for name in TLS_NAMES)
        if (cert is None) != (key is None) or (cert is None and ca is None):
            self.fail(f"{folder} has no tls.crt and tls.key", param, ctx)
        return Tls(cert, key, ca)


def option(default: Any, text: str, kind: click.ParamType[Any] = TEXT, shown: str = "") -> Any:
    """A dataclass field that is an option; `shown` stands in its help in place of the default."""
    made: dict[str, Any] = {"default_factory": default} if callable(default) else {"default": default}
    return field(**made, metadata={"help": text, "kind": kind, "shown": shown})


def sections_of(settings: type) -> dict[str, list[click.Option]]:
    """The options of a role's settings, by what the dataclasses that they are made of say of themselves."""
    parts = [part for part in settings.__mro__ if part is not object and part.__annotations__]
    return {
        part.__doc__ or "": [
            _option(each, part.__doc__ or "") for each in fields(part) if each.name in part.__annotations__
        ]
        for part in parts
    }


def _option(spec: Any, section: str) -> click.Option:
    known = spec.metadata
    more: dict[str, Any] = {"is_flag": True, "default": False, "show_default": False}
    if not isinstance(spec.default, bool):
        default = spec.default if isinstance(spec.default, int | float | str) else None
        more = {"type": known["kind"], "default": default, "show_default": known["shown"] or default not in (None, "")}
    variable = "COLASERVE_" + spec.name.upper()
    more |= {"help": known["help"], "envvar": variable, "show_envvar": True, "section": section}
    return SectionedOption(["--" + spec.name.replace("_", "-")], **more)


class RoleCommand(SectionedCommand, Generic[S]):
    """A command that makes a role's settings of its options. With --log json the error that ends it is JSON too.

    `work` gets the settings, and what the command line says as variables that would say the same.
    """

    def __init__(self, name: str, settings: type[S], work: Callable[[S, Mapping[str, str]], None], text: str):
        self.sections = sections_of(settings)
        self._own = [each for section in self.sections.values() for each in section]
        # `colaserve up MODEL` is `colaserve up --model MODEL`
        arguments = [click.Argument(["checkpoint"], type=MODEL, required=False, metavar="[MODEL]")] * (name == "up")
        super().__init__(name, params=[*arguments, *self._own], help=text, callback=self._run)
        self._settings, self._work = settings, work
        self._said: dict[str, str] = {}

    def _run(self, **values: Any) -> None:
        given = {name: value for name, value in values.items() if value is not None}
        run_or_explain(lambda: self._work(self._settings(**given), self._said))

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Refuse what is no option, or none of its values."""
        with self._errors(_given(args, "--log") or os.environ.get("COLASERVE_LOG", "")):
            run_or_explain(lambda: check_removed(args, os.environ))
            said: dict[str, Any]
            said, _, _ = self.make_parser(ctx).parse_args(list(args))
            given = {str(each.envvar): said[each.name] for each in self._own if each.name in said}
            self._said = {name: value if isinstance(value, str) else "1" for name, value in given.items()}
            left = super().parse_args(ctx, args)
            if model := ctx.params.pop("checkpoint", None):
                if "model" in said:
                    raise click.UsageError("the model is given twice, as an argument and with --model", ctx)
                ctx.params["model"] = model
            return left

    def invoke(self, ctx: click.Context) -> Any:
        """Run it."""
        log = ctx.params.get("log")
        with self._errors("" if log is None else log.format):
            return super().invoke(ctx)

    def _errors(self, log: str) -> AbstractContextManager[None]:
        if log.partition(":")[0] != "json":
            return nullcontext()
        from colaserve_services.launch.process import errors_as_json

        return errors_as_json("colaserve" if self.name == "up" else self.name or "")


def _given(args: list[str], name: str) -> str:
    """The value of an option on a command line that was not parsed yet."""
    values = [value for flag, value in itertools.pairwise([*args, ""]) if flag == name]
    values += [arg.removeprefix(f"{name}=") for arg in args if arg.startswith(f"{name}=")]
    return values[-1] if values else ""


class _Misuse(click.ClickException):
    exit_code = 2


def run_or_explain(work: Callable[[], None]) -> None:
    """Do the work; an error that is the operator's becomes one line and exit code 1 (2: the options do not fit)."""
    try:
        work()
    except ColaserveError as error:
        raise (_Misuse if isinstance(error, UsageError) else click.ClickException)(str(error)) from error


# Options of earlier versions, each also a variable: what replaced it, so that no setting is ignored silently.

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
