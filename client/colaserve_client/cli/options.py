"""Options that several verbs share. Each group reaches its verb as one value. How to reach the server can be said by
variables too, and the command line wins; everything else is an option alone."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from colaserve_client.blocking import BaseClient, Client
from colaserve_client.cli.types import Number, TrimmedPath
from colaserve_client.fields import Field, fields_of, flat_fields
from colaserve_client.settings import DEFAULT_TARGET, GenerationRequest, NoiseSeed, Retry, Sampler, Sampling, Tls

Verb = TypeVar("Verb", bound=Callable[..., Any])
C = TypeVar("C", bound=BaseClient[Any])
T = TypeVar("T")
EXISTING_FILE = click.Path(path_type=Path, dir_okay=False, exists=True, allow_dash=True)
VARIABLES = ("target", "key", "timeout", "tls_ca", "tls_client_cert", "tls_client_key")  # COLASERVE_TARGET and so on

FILE = click.Path(path_type=Path, dir_okay=False)
PEM_FILE = TrimmedPath(path_type=Path, dir_okay=False)


class SectionedCommand(click.Command):
    """A command whose help shows its options section by section."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx) if isinstance(parameter, click.Option) else None
            if record is not None:
                sections.setdefault(getattr(parameter, "section", "Options"), []).append(record)
        for section, records in sections.items():
            with formatter.section(section):
                formatter.write_dl(records)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the verb; variables that it read once, and that nothing was given for, are named first."""
        for parameter in self.params:
            if isinstance(parameter, SectionedOption) and parameter.is_missed(ctx):
                old = _variable(parameter)
                click.echo(f"colaserve: {old} is not read any more: give {longest(parameter)}", err=True)
        return super().invoke(ctx)


class SectionedOption(click.Option):
    """An option of one section of the help; one of VARIABLES is a variable too."""

    def __init__(self, *args: Any, section: str = "Options", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.section = section
        if self.name in VARIABLES:
            self.envvar, self.show_envvar = _variable(self), True

    def is_missed(self, ctx: click.Context) -> bool:
        """Whether only a variable that is not read any more says something about this option."""
        given = ctx.get_parameter_source(self.name or "") == ParameterSource.COMMANDLINE
        return self.envvar is None and not given and bool(os.environ.get(_variable(self)))


def longest(option: click.Option) -> str:
    """The option's longest name."""
    return max(option.opts, key=len)


def _variable(option: click.Option) -> str:
    return "COLASERVE_" + longest(option).lstrip("-").upper().replace("-", "_")


def option(*names: str, section: str = "Options", **settings: Any) -> Callable[[Verb], Verb]:
    """`click.option` in a section of the help."""
    return click.option(*names, cls=SectionedOption, section=section, **settings)


def _connection(*names: str, **settings: Any) -> Callable[[Verb], Verb]:
    return option(*names, section="Server", **settings)


json_option = option("--json", "as_json", is_flag=True, help="Print JSON for machines.")

_CONNECTION = (
    _connection("--target", default=DEFAULT_TARGET, show_default=True, help="Where the server is."),
    _connection("--key", help="Bearer key. Better the variable: a command line is seen by all."),
    _connection("--timeout", type=Number(0, min_open=True), help="Seconds a call may take.  [default: none]"),
    _connection("--tries", type=click.IntRange(1), default=4, show_default=True,
                help="Tries of a call that finds the server busy or away."),
    _connection("--tls", is_flag=True, help="Encrypt, and trust the authorities that gRPC ships with."),
    _connection("--tls-ca", type=PEM_FILE, help="Encrypt, and trust this authority (PEM)."),
    _connection("--tls-client-cert", type=PEM_FILE, help="This side's certificate, for mutual TLS (PEM)."),
    _connection("--tls-client-key", type=PEM_FILE, help="The key of --tls-client-cert (PEM)."),
    _connection("--tls-server-name", help="The name in the server's certificate, when it is not the target's."),
)  # fmt: skip


def _with(options: Sequence[Callable[[Any], Any]], verb: Any) -> Any:
    for each in reversed(options):
        verb = each(verb)
    return verb


def tls_of(tls: bool, ca: Path | None, cert: Path | None, key: Path | None, server_name: str | None) -> Tls | None:
    """The settings of an encrypted connection; None when no option asks for one."""
    if tls or any(value is not None for value in (ca, cert, key, server_name)):
        return Tls(ca, cert, key, server_name)
    return None


@dataclass(frozen=True)
class Server:
    """How to reach a server."""

    target: str
    key: str | None
    tls: Tls | None
    timeout: float | None
    retry: Retry

    def connect(self, kind: type[C]) -> C:
        """A client of it."""
        return kind(self.target, key=self.key, tls=self.tls, timeout=self.timeout, retry=self.retry)


def server_options(verb: Callable[..., Any]) -> Callable[..., Any]:
    """How to reach the server; the verb gets `server`."""

    @wraps(verb)
    def wrapped(*args: Any, target: str, key: str | None, timeout: float | None, tries: int, **others: Any) -> Any:
        parts = [others.pop(f"tls{part}") for part in ("", "_ca", "_client_cert", "_client_key", "_server_name")]
        return verb(*args, server=Server(target, key, tls_of(*parts), timeout, Retry(tries)), **others)

    return _with(_CONNECTION, wrapped)  # type: ignore[no-any-return]


def client_options(verb: Callable[..., Any]) -> Callable[..., Any]:
    """How to reach the server; the verb gets `client`, which is closed after it."""

    @wraps(verb)
    def wrapped(*args: Any, server: Server, **others: Any) -> Any:
        with server.connect(Client) as client:
            return verb(*args, client=client, **others)

    return server_options(wrapped)


def field_options(
    *kinds: type, section: str = "Options", without: Sequence[str] = ()
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: an option for each field of the dataclasses; the verb gets their values by their flat names."""
    table = {name: field for name, field in flat_fields(*kinds).items() if name not in without}
    options = [option(*_names(field), section=section, **_kind(field)) for field in table.values()]
    return lambda verb: _with(options, verb)


def _names(field: Field) -> tuple[str, str]:
    return field.option or f"--{field.flat.replace('_', '-')}", field.flat


def _kind(field: Field) -> dict[str, Any]:
    if field.kind is bool:
        return {"is_flag": True, "help": field.help}
    if field.choices is not None:
        return {"type": click.Choice(list(field.choices)), "help": field.doc}
    if field.multiple:
        return {"multiple": True, "help": field.help}
    return {"type": field.kind, "help": field.help}


def taken(kind: type[T], values: dict[str, Any]) -> T:
    """A dataclass of the values that `field_options` gave for its fields, which are taken out of `values`."""
    return kind(**{name: values.pop(field.flat) for name, field in fields_of(kind).items() if field.flat in values})


def sampler_options(verb: Callable[..., Any]) -> Callable[..., Any]:
    """How latents are sampled; the verb gets `sampler`."""

    @wraps(verb)
    def wrapped(*args: Any, **values: Any) -> Any:
        return verb(*args, sampler=taken(Sampler, values), **values)

    return field_options(Sampler, section="From noise to latents (default: as the server has it)")(wrapped)


def sampling_options(verb: Callable[..., Any]) -> Callable[..., Any]:
    """How tokens are drawn; the verb gets `sampling`."""

    @wraps(verb)
    def wrapped(*args: Any, **values: Any) -> Any:
        return verb(*args, sampling=taken(Sampling, values), **values)

    return field_options(Sampling, section="From latents to tokens (default: as the server has it)")(wrapped)


def seed_options(verb: Callable[..., Any]) -> Callable[..., Any]:
    """The noise; the verb gets `seed`."""

    @wraps(verb)
    def wrapped(*args: Any, **values: Any) -> Any:
        seed, sample = values.pop("seed"), values.pop("sample_id")
        if seed is None and sample is not None:
            raise click.UsageError("--sample-id tells samples of one --seed apart: give both")
        return verb(*args, seed=None if seed is None else NoiseSeed(seed, sample or 0), **values)

    return field_options(NoiseSeed)(wrapped)


def request_options(verb: Callable[..., Any]) -> Callable[..., Any]:
    """What a generation is asked for beside its prompt; the verb gets `request`, whose prompt is empty."""

    @wraps(verb)
    def wrapped(*args: Any, **values: Any) -> Any:
        names = [field.name for field in fields(GenerationRequest) if field.name != "prompt"]
        request = GenerationRequest("", **{name: values.pop(name) for name in names})
        return verb(*args, request=request, **values)

    return field_options(GenerationRequest)(sampler_options(sampling_options(seed_options(wrapped))))
