"""Kinds of values that options take, where click's own are too lenient; and options that several verbs share. Each
group reaches its verb as one value. How to reach the server can be said by variables too, and the command line wins;
everything else is an option alone.
"""

import math
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, is_dataclass
from functools import partial, wraps
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from colaserve_client.blocking import BaseClient, Client
from colaserve_client.errors import ColaserveError, InvalidRequest
from colaserve_client.fields import Field, fields_of, flat_fields
from colaserve_client.reading import read_json
from colaserve_client.settings import (
    DEFAULT_TARGET,
    GenerationRequest,
    NoiseSeed,
    Retry,
    Sampler,
    Sampling,
    Scoring,
    Tls,
)


class Number(click.FloatRange):
    """A finite number within its range; Python reads NaN and infinity as numbers too."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not math.isfinite(number := click.FLOAT.convert(value, param, ctx)):
            self.fail(f"{value} is no finite number.", param, ctx)
        return super().convert(number, param, ctx)


class Text(click.types.StringParamType):
    """A text that can be sent: bytes of the command line or of a variable that are no UTF-8 are refused."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        text = super().convert(value, param, ctx)
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            self.fail(f"{text!r} is not UTF-8.", param, ctx)
        return text


class Trimmed(Text):
    """A text without the blanks around it: an address, a name or a key."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(value, param, ctx).strip()


class TrimmedPath(click.Path):
    """A path without the blanks around it, which a variable or a mounted secret may bring along."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(value.strip() if isinstance(value, str) else value, param, ctx)


class JsonFile(Text):
    """A file with a JSON object."""

    name = "file"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return read_json(super().convert(value, param, ctx))


class Listed(Text):
    """Values of a kind with commas between them: "1,2" is two."""

    name = "list"

    def __init__(self, kind: "click.ParamType[Any]"):
        self._kind = kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        text = super().convert(value, param, ctx)
        return [self._kind.convert(item.strip(), param, ctx) for item in text.split(",")]


Verb = Callable[..., Any]
C = TypeVar("C", bound=BaseClient[Any])
T = TypeVar("T")
EXISTING_FILE = click.Path(path_type=Path, dir_okay=False, exists=True, allow_dash=True)
LATENTS_FILE = click.Path(path_type=Path, dir_okay=False, exists=True)
FILE = click.Path(path_type=Path, dir_okay=False)
PEM_FILE = TrimmedPath(path_type=Path, dir_okay=False)
VARIABLES = ("target", "key", "timeout", "tls_ca", "tls_client_cert", "tls_client_key")  # COLASERVE_TARGET and so on
_SETTINGS = {"sampler": Sampler, "sampling": Sampling, "seed": NoiseSeed}
_FIELDS = {  # what errors call a field -> the name of its option, where they differ
    f"{message}.{name}": field.flat for message, kind in _SETTINGS.items() for name, field in fields_of(kind).items()
} | {"tls.ca": "tls_ca", "tls.cert": "tls_client_cert", "tls.key": "tls_client_key", "interpolation": "path"}


class SectionedCommand(click.Command):
    """A command whose help shows its options section by section."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {"Options": []}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx) if isinstance(parameter, click.Option) else None
            if record is not None:
                sections.setdefault(getattr(parameter, "section", "Options"), []).append(record)
        for section, records in sections.items():
            with formatter.section(section):
                formatter.write_dl(records)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the verb; variables that it read once, and that nothing was given for, are named first."""
        for parameter in (each for each in self.params if isinstance(each, SectionedOption) and each.envvar is None):
            given = ctx.get_parameter_source(parameter.name or "") == ParameterSource.COMMANDLINE
            if not given and os.environ.get(old := _variable(parameter)):
                click.echo(f"colaserve: {old} is not read any more: give {longest(parameter)}", err=True)
        try:
            return super().invoke(ctx)
        except InvalidRequest as error:
            raise by_option(error) from error.__cause__


def by_option(error: ColaserveError) -> ColaserveError:
    """The error, with the running verb's option in place of the request's field, where there is one."""
    field, parameters = error.details.field, click.get_current_context().command.params
    options = {each.name: longest(each) for each in parameters if isinstance(each, click.Option)}
    option = options.get(_FIELDS.get(field, field))
    if option is None or not str(error).startswith(f"{field}:"):
        return error
    return InvalidRequest(f"{option}{str(error).removeprefix(field)}", error.details)


class SectionedOption(click.Option):
    """An option of one section of the help; one of VARIABLES is a variable too."""

    def __init__(self, *args: Any, section: str = "Options", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.section = section
        if self.name in VARIABLES:
            self.envvar, self.show_envvar = _variable(self), True


def longest(option: click.Option) -> str:
    """The option's longest name."""
    return max(option.opts, key=len)


def _variable(option: click.Option) -> str:
    return "COLASERVE_" + longest(option).lstrip("-").upper().replace("-", "_")


def option(*names: str, section: str = "Options", **settings: Any) -> Callable[[Verb], Verb]:
    """`click.option` in a section of the help."""
    return click.option(*names, cls=SectionedOption, section=section, **settings)


_connection = partial(option, section="Server")
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


def _with(options: Sequence[Callable[[Verb], Verb]], verb: Verb) -> Verb:
    for each in reversed(options):
        verb = each(verb)
    return verb


def grouped(
    name: str, options: Sequence[Callable[[Verb], Verb]], make: Callable[[dict[str, Any]], Any]
) -> Callable[[Verb], Verb]:
    """Decorator: options that reach the verb as one value, which `make` takes out of all that were given."""

    def decorate(verb: Verb) -> Verb:
        @wraps(verb)
        def wrapped(**values: Any) -> Any:
            made = make(values)
            return verb(**values, **{name: made})

        return _with(options, wrapped)

    return decorate


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


def _server(values: dict[str, Any]) -> Server:
    target, key, timeout, tries, encrypted = map(values.pop, ("target", "key", "timeout", "tries", "tls"))
    parts = [values.pop(f"tls_{part}") for part in ("ca", "client_cert", "client_key", "server_name")]
    tls = Tls(*parts) if encrypted or any(part is not None for part in parts) else None
    return Server(target, key, tls, timeout, Retry(tries))


server_options = grouped("server", _CONNECTION, _server)


def client_options(verb: Verb) -> Verb:
    """How to reach the server; the verb gets `client`, which is closed after it."""

    @wraps(verb)
    def wrapped(*, server: Server, **others: Any) -> Any:
        with server.connect(Client) as client:
            return verb(client=client, **others)

    return server_options(wrapped)


def field_options(kind: type, section: str = "Options", without: Collection[str] = ()) -> list[Callable[[Verb], Verb]]:
    """An option for each field of a dataclass; the verb gets their values by their flat names."""
    return [_option_of(field, section) for name, field in flat_fields(kind).items() if name not in without]


def _option_of(field: Field, section: str) -> Callable[[Verb], Verb]:
    made: dict[str, Any] = {"type": field.kind, "help": field.help}
    if field.kind is bool:
        made = {"is_flag": True, "help": field.help}
    elif field.choices is not None:
        made = {"type": click.Choice(list(field.choices)), "help": field.doc}
    elif field.multiple:
        made |= {"multiple": True, "type": JsonFile() if is_dataclass(field.kind) else None}
    return option(field.option or f"--{field.flat.replace('_', '-')}", field.flat, section=section, **made)


def taken(kind: type[T], values: dict[str, Any]) -> T:
    """A dataclass of the values that `field_options` gave for its fields, which are taken out of `values`."""
    return kind(**{name: values.pop(field.flat) for name, field in fields_of(kind).items() if field.flat in values})


def _seed(values: dict[str, Any]) -> NoiseSeed | None:
    seed, sample = values.pop("seed"), values.pop("sample_id")
    if seed is None and sample is not None:
        raise click.UsageError("--sample-id tells samples of one --seed apart: give both")
    return None if seed is None else NoiseSeed(seed, sample or 0)


def _request(values: dict[str, Any]) -> GenerationRequest:
    names = [name for name in GenerationRequest.__dataclass_fields__ if name in values and name != "prompt"]
    return GenerationRequest("", **{name: values.pop(name) for name in names})


_LATENTS = field_options(Sampler, "From noise to latents (default: as the server has it)")
_TOKENS = field_options(Sampling, "From latents to tokens (default: as the server has it)")
sampler_options = grouped("sampler", _LATENTS, partial(taken, Sampler))
sampling_options = grouped("sampling", _TOKENS, partial(taken, Sampling))
scoring_options = grouped("scoring", field_options(Scoring), partial(taken, Scoring))
seed_options = grouped("seed", field_options(NoiseSeed), _seed)


def request_options(verb: Verb, without: Collection[str] = ()) -> Verb:
    """The settings of a generation beside its prompt; the verb gets `request`, whose prompt is empty."""
    verb = grouped("request", (), _request)(verb)
    own = field_options(GenerationRequest, without=without)
    return _with(own, sampler_options(sampling_options(seed_options(verb))))
