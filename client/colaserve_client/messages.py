"""Request messages from Python values, and Python values from response messages, by the names of their fields.

What a field cannot carry is an `InvalidRequest` that names it. What only the server can judge, such as whether a prompt
fits into its context, is left to it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from functools import cache, partial
from types import NoneType
from typing import Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

from google.protobuf import message_factory
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from colaserve.v1 import types_pb2
from colaserve_client.arrays import FloatArray, array_from_tensor, shortest, tensor_from_array
from colaserve_client.errors import invalid
from colaserve_client.fields import Field, choices_of, fields_of, flat_fields, names_of
from colaserve_client.latents import Latents
from colaserve_client.results import TokenLogprobs, TopToken
from colaserve_client.settings import CallFields, GenerationRequest, NoiseSeed, Sampler, Sampling, Steering

M = TypeVar("M", bound=Message)
T = TypeVar("T")

_TRUTH = "true or false"
_NUMBERS: Mapping[int, str] = {
    FieldDescriptor.CPPTYPE_INT32: f"an integer from {-(1 << 31)} to {(1 << 31) - 1}",
    FieldDescriptor.CPPTYPE_INT64: f"an integer from {-(1 << 63)} to {(1 << 63) - 1}",
    FieldDescriptor.CPPTYPE_UINT32: f"an integer from 0 to {(1 << 32) - 1}",
    FieldDescriptor.CPPTYPE_UINT64: f"an integer from 0 to {(1 << 64) - 1}",
    FieldDescriptor.CPPTYPE_FLOAT: "a number",
    FieldDescriptor.CPPTYPE_DOUBLE: "a number",
    FieldDescriptor.CPPTYPE_BOOL: _TRUTH,
}


# Requests


def request(kind: type[M], settings: Mapping[str, Any], **values: object) -> M:
    """The message of a call's values and keywords; fields of its sampler and sampling may be keywords of their own.

    Raises `InvalidRequest` that names a field which is given in both ways.
    """
    names = set(kind.DESCRIPTOR.fields_by_name)
    both = {name: each for name, each in _SETTINGS.items() if name in names and each is not NoiseSeed}
    known = {*CallFields.__annotations__, *flat_fields(*both.values()), *names} - values.keys()
    if unknown := settings.keys() - known:
        raise TypeError(f"unexpected keyword argument {min(unknown)!r}")
    own = {name: value for name, value in settings.items() if name in names}
    merged = {name: _merged(name, each, settings) for name, each in both.items()}
    return build(kind, {**values, **own, **merged})


def _merged(name: str, kind: type[Any], settings: Mapping[str, Any]) -> Any:
    """A sampler or a sampling with those of its fields that were given as keywords."""
    given, table = settings.get(name), fields_of(kind)
    chosen = {each: field.flat for each, field in table.items() if settings.get(field.flat) is not None}
    if not chosen:
        return given
    given = kind() if given is None else of_kind(given, kind, name)
    for each, keyword in chosen.items():
        if getattr(given, each) not in (None, ()):
            raise invalid(keyword, f"given twice, as {keyword}= and in {name}=")
    return replace(given, **{each: settings[keyword] for each, keyword in chosen.items()})


def build(kind: type[M], values: Mapping[str, object], path: str = "", table: Mapping[str, Field] | None = None) -> M:
    """A message of Python values; None leaves a field unset, but for lists of strings, where it is an error. Errors
    name the field, with `path` before it.

    Latents and tensors may be arrays, enums are their names in lower case, and settings their dataclasses. `table` has
    the ranges of numbers, by default those of a generation.
    """
    message, table = kind(), fields_of(GenerationRequest) if table is None else table
    for name, value in values.items():
        field, where = kind.DESCRIPTOR.fields_by_name[name], f"{path}{name}"
        repeated = hasattr(getattr(message, name), "extend")
        if value is None and not (repeated and field.cpp_type == FieldDescriptor.CPPTYPE_STRING):
            continue
        expected = None if repeated else _NUMBERS.get(field.cpp_type)
        wire = _wire_value(field, repeated, value, where)
        try:
            if expected and isinstance(value, bool | int | float) and isinstance(value, bool) != (expected == _TRUTH):
                raise TypeError("protobuf takes true for 1, and 1 for true: neither was meant")
            message.MergeFrom(kind(**{name: wire}))
        except (TypeError, ValueError) as error:
            problem = f"got {_shown(value)}, expected {expected}" if expected else f"cannot be {_shown(value)}: {error}"
            raise invalid(where, problem) from error
        if expected and name in table and (fault := table[name].fault(wire)):
            raise invalid(where, fault)
    return message


def settings_message(kind: type[M], settings: object, path: str) -> M:
    """The message of a Sampler, a Sampling or a NoiseSeed."""
    table = fields_of(type(settings))
    return build(kind, {name: getattr(settings, name) for name in table}, path, table)


def _wire_value(field: Any, repeated: bool, value: Any, where: str) -> Any:
    """A value as protobuf takes it."""
    if field.enum_type is not None:
        names = choices_of(field.enum_type)
        if not (isinstance(value, str) and value in names):
            raise invalid(where, f"expected one of {', '.join(names)}, got {value!r}")
        return names[value]
    if field.message_type is None:
        return strings(value, where) if repeated and field.cpp_type == FieldDescriptor.CPPTYPE_STRING else value
    if repeated and (isinstance(value, Mapping) or not isinstance(value, Iterable)):
        raise invalid(where, f"expected a list, got {_shown(value)}")
    if isinstance(value, Message) or (repeated and any(isinstance(each, Message) for each in value)):
        return value
    convert = _MESSAGES.get(field.message_type.name) or partial(_settings, field)
    return (
        [convert(each, f"{where}[{index}]") for index, each in enumerate(value)] if repeated else convert(value, where)
    )


def _settings(field: Any, value: Any, where: str) -> Message:
    """A message of settings, or of a mapping of them; of a seed, a number is the base_seed of sample 0."""
    kind = _SETTINGS[field.name]
    if kind is Steering and isinstance(value, Mapping):
        given = {name: each for name, each in value.items() if each is not None}
        if "direction" not in given or given.keys() - fields_of(kind):
            expected = f"direction, and what else is wanted of {', '.join(fields_of(kind))}"
            raise invalid(where, f"got {', '.join(given) or 'nothing'}, expected {expected}")
        value = kind(**given)
    value = NoiseSeed(value) if kind is NoiseSeed and not isinstance(value, NoiseSeed) else of_kind(value, kind, where)
    return settings_message(message_factory.GetMessageClass(field.message_type), value, f"{where}.")


def _token_ids(ids: Sequence[int], where: str) -> Message:
    try:
        return types_pb2.TokenIds(ids=ids)
    except (TypeError, ValueError) as error:
        raise invalid(where, f"expected token ids, got {_shown(ids)}: {error}") from error


_SETTINGS: Mapping[str, type] = {"sampler": Sampler, "sampling": Sampling, "seed": NoiseSeed, "steering": Steering}
_MESSAGES: Mapping[str, Callable[[Any, str], Message]] = {
    "Latents": lambda latents, where: Latents.of(latents, where).to_proto(),
    "Tensor": tensor_from_array,
    "TokenIds": _token_ids,
}


def strings(values: Sequence[str], field: str) -> list[str]:
    """One string where several are expected would be taken letter by letter."""
    if isinstance(values, str):
        raise invalid(field, f"expected a list of strings, got one: write [{_shown(values)}]")
    if not isinstance(values, Iterable):
        raise invalid(field, f"expected a list of strings, got {_shown(values)}")
    return list(values)


def of_kind(value: T, kind: type, field: str) -> T:
    """The value itself; `InvalidRequest` when it is of another type."""
    if not isinstance(value, kind):
        raise invalid(field, f"expected {kind.__name__}, got {_shown(value)}")
    return value


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# Responses


def one(kind: type[T]) -> Callable[[Message], T]:
    """What reads an answer that is one such value."""
    return partial(read, kind)


def several(kind: type[T], field: str) -> Callable[[Message], list[T]]:
    """What reads an answer with a list of such values in a field."""
    return lambda message: [read(kind, each) for each in getattr(message, field)]


def read(kind: type[T], message: Message) -> T:
    """A dataclass of the message's fields; one that may be None in the dataclass is None where the message lacks it."""
    known, given = message.DESCRIPTOR.fields_by_name, {}
    for name, wire, hint in _hints(cast(Any, kind)):
        if wire in known:
            given[name] = _value(hint, known[wire], message)
        elif NoneType in get_args(hint):
            given[name] = None
    return kind(**given)


@cache
def _hints(kind: Any) -> Sequence[tuple[str, str, Any]]:
    """Name, name in the message, and type of each field."""
    hints, table = get_type_hints(kind), fields_of(kind)
    return [(each.name, table[each.name].wire or each.name, hints[each.name]) for each in fields(kind)]


def _value(hint: Any, field: Any, message: Message) -> Any:
    value, optional = getattr(message, field.name), NoneType in get_args(hint)
    if optional:
        if field.has_presence and not message.HasField(field.name):
            return None
        [hint] = [each for each in get_args(hint) if each is not NoneType] or [hint]
    if field.enum_type is not None and optional and value == 0:
        return None
    if get_origin(hint) in (tuple, Sequence):
        kind = get_args(hint)[0]
        return _token_logprobs(message) if kind is TokenLogprobs else tuple(map(_reader(kind, field), value))
    return _reader(hint, field)(value)


def _reader(hint: Any, field: Any) -> Callable[[Any], Any]:
    """What makes a Python value of one on the wire."""
    if hint is float:
        return shortest
    if hint is Latents:
        return Latents.from_proto
    if hint == FloatArray:
        return partial(array_from_tensor, field=field.name)
    if get_origin(hint) is Literal:
        return partial(_enum_name, field)
    return one(hint) if isinstance(hint, type) and is_dataclass(hint) else lambda value: value


def _enum_name(field: Any, number: int) -> str:
    names = names_of(field.enum_type)
    if number not in names:
        raise ValueError(f"{field.name}: {number} is not one of {sorted(names)}")
    return names[number]


def _token_logprobs(message: Any) -> tuple[TokenLogprobs, ...]:
    """One a token; none when the server sent none."""
    tops = [_rows(TopToken, top) for top in message.top_logprobs] or [()] * len(message.logprobs)
    return _rows(TokenLogprobs, message, tops) if message.logprobs else ()


def _rows(kind: Callable[..., T], message: Any, *more: Iterable[object]) -> tuple[T, ...]:
    """A value for each token of a message's lists; a decoder sends no texts."""
    texts = getattr(message, "tokens", ()) or [""] * len(message.token_ids)
    rows = zip(message.token_ids, map(shortest, message.logprobs), texts, *more, strict=True)
    return tuple(kind(*row) for row in rows)
