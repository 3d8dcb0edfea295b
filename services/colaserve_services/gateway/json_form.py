"""Messages of a service as JSON: fields have the names of the protos, enums are their names in lower case.

The schemas, which check requests and make the OpenAPI document, are derived from the messages' descriptors, the ranges
from client/colaserve_client/settings.py. A new method or field of a service needs no code here.
"""

import base64
import json
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib.resources import files
from typing import Annotated, Any, Final, Literal, NotRequired, Union

import numpy as np
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message_factory import GetMessageClass
from pydantic import BeforeValidator, Field, WithJsonSchema, create_model
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from colaserve.v1 import types_pb2
from colaserve_client.arrays import array_from_tensor, shortest
from colaserve_client.fields import choices_of, fields_of, names_of
from colaserve_client.settings import GenerationRequest, NoiseSeed, Sampler, Sampling, Scoring, Steering
from colaserve_services.bounds import COUNTS
from colaserve_services.gateway.dialects.fields import MOST_IDS, UINT32, Strict, Text, TokenIds, at_most, kind_of
from colaserve_services.gateway.errors import invalid
from colaserve_services.rpc.arrays import to_message

_DTYPES: Final[Mapping[str, Any]] = choices_of(types_pb2.DataType.DESCRIPTOR)
_DTYPE_NAMES: Final = names_of(types_pb2.DataType.DESCRIPTOR)
_LARGEST: Final = float(np.finfo(np.float32).max)
_SETTINGS: Final[Mapping[str, type]] = {  # those of a generation stand for other requests' fields of the same names
    **{kind.__name__: kind for kind in (NoiseSeed, Sampler, Sampling, Steering)},
    "LatentServiceScoreRequest": Scoring,
}
_SCALARS: Final[Mapping[int, Any]] = {
    FieldDescriptor.CPPTYPE_BOOL: bool,
    FieldDescriptor.CPPTYPE_DOUBLE: float,
    FieldDescriptor.CPPTYPE_FLOAT: Annotated[float, Field(ge=-_LARGEST, le=_LARGEST)],
    FieldDescriptor.CPPTYPE_STRING: Text,
    FieldDescriptor.CPPTYPE_UINT32: Annotated[int, Field(ge=0, le=UINT32)],
    FieldDescriptor.CPPTYPE_UINT64: Annotated[int, Field(ge=0, lt=2**64)],
}
_ELEMENTS: Final = {"anyOf": [{"type": "string", "contentEncoding": "base64"}, {"type": "array", "items": {}}]}


class ArrayFields(Strict):
    """An array of numbers."""

    data: Annotated[Any, WithJsonSchema(_ELEMENTS)] = Field(
        description="The elements: base64 of little-endian numbers, row by row; or nested lists, read as float32."
    )
    shape: Annotated[list[Annotated[int, Field(ge=0, le=UINT32)]], at_most(8)] | None = Field(
        None, description="The extents, outermost first; needed beside base64."
    )
    dtype: Literal[tuple(_DTYPES)] | None = Field(None, description="Of base64; float32.")  # type: ignore[valid-type]


class LatentFields(ArrayFields):
    """Latents (n, d)."""

    space: Text | None = Field(None, description="The fingerprint of their space; left out, it is not checked.")


class Array(TypedDict):
    """An array of numbers: base64 of little-endian numbers, row by row, or nested lists."""

    shape: list[int]
    dtype: Literal[tuple(_DTYPES)]  # type: ignore[valid-type]
    data: Annotated[Any, WithJsonSchema(_ELEMENTS)]


class LatentArray(Array):
    """Latents (n, d)."""

    space: str


def comment_of(item: FieldDescriptor | MethodDescriptor) -> str:
    """The comment of a field or a method in the protos."""
    return _comments().get(item.full_name.removeprefix("colaserve.v1."), "")


@cache
def _comments() -> Mapping[str, str]:
    found: dict[str, str] = json.loads(files(__package__).joinpath("comments.json").read_bytes())
    return found


# Requests


def _or(model: type[Strict], name: str, *short: Any) -> Any:
    """A model, or the value of its field `name` alone, of one of the types `short`."""

    def long(value: Any) -> Any:
        return {name: value} if type(value) in short else value

    return Annotated[model, BeforeValidator(long, json_schema_input_type=Union[model, *short])]


@cache
def schema_of(message: Descriptor, base: type[Strict] = Strict) -> Any:
    """The pydantic model that checks the JSON of a message of a request; `base` has further fields."""
    if message.name in ("Tensor", "Latents"):
        return _or(ArrayFields if message.name == "Tensor" else LatentFields, "data", list, float, int)
    if message.name == "TokenIds":
        return TokenIds
    own: Any = {field.name: _field(field) for field in message.fields}
    model = create_model(message.name, __base__=base, __module__=__name__, **own)
    return _or(model, "base_seed", int) if message.name == "NoiseSeed" else model


def _field(field: Any) -> tuple[Any, Any]:
    message = field.containing_type.name
    settings = _SETTINGS.get(message, GenerationRequest)
    setting = fields_of(settings).get(field.name) or COUNTS.get(f"{message}.{field.name}")
    if setting and field.message_type is None and (setting.range or setting.choices):
        own = f"[{setting.default}] " if settings is Scoring else ""  # no server has others
        return kind_of(setting), Field(getattr(settings, field.name, None), description=own + setting.doc)
    kind: Any = _kind(field, schema_of)
    if _is_repeated(field):
        kind = Annotated[list[kind], at_most(MOST_IDS)]
    about = setting.doc if setting and field.message_type is None else comment_of(field)
    for name, number in choices_of(field.enum_type).items() if field.enum_type else ():
        about = about.replace(field.enum_type.values_by_number[number].name, name)
    return kind | None, Field(None, description=about)


def _kind(field: FieldDescriptor, of_message: Callable[[Descriptor], Any]) -> Any:
    """The type of one value of the field."""
    if field.message_type is not None:
        return of_message(field.message_type)
    if field.enum_type is not None:
        return Literal[tuple(choices_of(field.enum_type))]
    return _SCALARS[field.cpp_type]


@cache
def _is_repeated(field: Any) -> bool:
    return hasattr(getattr(GetMessageClass(field.containing_type)(), field.name), "extend")


def message_of(message: Descriptor, fields: Strict, path: str = "") -> Any:
    """The message that checked JSON stands for. ApiError 400 names a fault that the schema cannot find."""
    values, chosen = dict[str, Any](), dict[str, str]()
    for name, value in fields:
        field, where = message.fields_by_name.get(name), f"{path}{name}"
        if field is None or value is None:
            continue
        if field.containing_oneof and (other := chosen.setdefault(field.containing_oneof.name, name)) != name:
            raise invalid(where, f"expected one of {other} and {name}, got both")
        if _is_repeated(field):
            values[name] = [_wire_value(field, each, f"{where}[{index}]") for index, each in enumerate(value)]
        else:
            values[name] = _wire_value(field, value, where)
    return GetMessageClass(message)(**values)


def _wire_value(field: Any, value: Any, where: str) -> Any:
    if field.enum_type is not None:
        return choices_of(field.enum_type)[value]
    if field.message_type is None:
        return value
    if isinstance(value, LatentFields):
        return types_pb2.Latents(values=_tensor(value, where), space=value.space)
    if isinstance(value, ArrayFields):
        return _tensor(value, where)
    if isinstance(value, list):
        return types_pb2.TokenIds(ids=value)
    return message_of(field.message_type, value, f"{where}.")


def _tensor(array: ArrayFields, where: str) -> types_pb2.Tensor | None:
    """The tensor; None for an empty list. Whether its shape fits its data is checked by the service."""
    data, shape, dtype = array.data, array.shape, array.dtype or "float32"
    if isinstance(data, str):
        if shape is None:
            raise invalid(f"{where}.shape", "this field is required beside base64")
        try:
            return types_pb2.Tensor(dtype=_DTYPES[dtype], shape=shape, data=base64.b64decode(data, validate=True))
        except ValueError as error:
            raise invalid(f"{where}.data", f"is no base64: {error}") from None
    if dtype != "float32":
        raise invalid(f"{where}.dtype", f"got {dtype!r}, expected float32: lists are")
    values = np.array(data, dtype=object)
    if not {int, float}.issuperset(map(type, values.ravel())):  # of lists of unequal lengths, lists are elements
        raise invalid(f"{where}.data", "expected base64, or numbers in nested lists of equal lengths")
    if shape not in (None, list(values.shape)):
        raise invalid(f"{where}.shape", f"got {shape}, the lists' is {list(values.shape)}")
    try:
        with np.errstate(over="ignore"):  # the service refuses what is not finite
            return None if data == [] else to_message(values.astype(np.float32))
    except OverflowError as error:
        raise invalid(f"{where}.data", str(error)) from None


# Answers


@cache
def answer_of(message: Descriptor) -> Any:
    """The type of the JSON of a message of an answer."""
    if message.name in ("Tensor", "Latents"):
        return Array if message.name == "Tensor" else LatentArray
    if message.name == "TokenIds":
        return list[int]
    kinds = {field.name: _answer_field(field) for field in message.fields}
    return TypedDict(f"{message.name.removesuffix('Response')}Answer", kinds)  # type: ignore[operator]


def _answer_field(field: FieldDescriptor) -> Any:
    kind: Any = _kind(field, answer_of)
    repeated = _is_repeated(field)
    kind = Annotated[list[kind] if repeated else kind, Field(description=comment_of(field))]
    return NotRequired[kind] if field.has_presence or (field.enum_type and not repeated) else kind


def plain(message: Any, as_lists: bool) -> Any:
    """A message as JSON's types, without unset fields. `as_lists`: arrays as nested lists, otherwise as base64."""
    name = message.DESCRIPTOR.name
    if name == "TokenIds":
        return list(message.ids)
    if name == "Latents":
        return {**plain(message.values, as_lists), "space": message.space}
    if name == "Tensor":
        data = array_from_tensor(message).tolist() if as_lists else base64.b64encode(message.data).decode()
        return {"shape": list(message.shape), "dtype": _DTYPE_NAMES.get(message.dtype, "float32"), "data": data}
    return dict(_plain_fields(message, as_lists))


def _plain_fields(message: Any, as_lists: bool) -> Iterator[tuple[str, Any]]:
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if _is_repeated(field):
            yield field.name, [_plain_value(field, each, as_lists) for each in value]
        elif message.HasField(field.name) if field.has_presence else field.enum_type is None or value:
            yield field.name, _plain_value(field, value, as_lists)


def _plain_value(field: FieldDescriptor, value: Any, as_lists: bool) -> Any:
    if field.message_type is not None:
        return plain(value, as_lists)
    if field.enum_type is not None:
        return names_of(field.enum_type).get(value, str(value))
    return shortest(value) if field.cpp_type == FieldDescriptor.CPPTYPE_FLOAT else value
