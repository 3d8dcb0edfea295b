"""Request messages from Python values. What a field cannot carry is an `InvalidRequest` that names it.

What only the server can judge, such as whether a prompt fits into its context, is left to it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any, TypeVar

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from colaserve.v1 import generation_pb2, types_pb2
from colaserve_client.arrays import tensor_from_array
from colaserve_client.errors import invalid
from colaserve_client.fields import fields_of, flat_fields
from colaserve_client.latents import Latents
from colaserve_client.settings import GenerationRequest, NoiseSeed, Prompt, Sampler, Sampling

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


def build(kind: type[M], path: str = "", **values: object) -> M:
    """A message of Python values; None leaves a field unset. Errors name the field, with `path` before it.

    Latents and tensors may be arrays, enums are their names in lower case, and settings their dataclasses.
    """
    message = kind()
    for name, value in values.items():
        if value is None:
            continue
        field, where = kind.DESCRIPTOR.fields_by_name[name], f"{path}{name}"
        repeated = hasattr(getattr(message, name), "extend")
        expected = None if repeated else _NUMBERS.get(field.cpp_type)
        wire = _wire_value(field, repeated, value, where)
        try:
            if expected and isinstance(value, bool | int | float) and isinstance(value, bool) != (expected == _TRUTH):
                raise TypeError("protobuf takes true for 1, and 1 for true: neither was meant")
            message.MergeFrom(kind(**{name: wire}))
        except (TypeError, ValueError) as error:
            problem = f"got {_shown(value)}, expected {expected}" if expected else f"cannot be {_shown(value)}: {error}"
            raise invalid(where, problem) from error
    return message


def _wire_value(field: Any, repeated: bool, value: Any, where: str) -> Any:
    """A value as protobuf takes it."""
    if field.message_type is not None:
        convert = _MESSAGES.get(field.message_type.name)
        if convert is None:  # it was built before
            return value
        if repeated:
            return [convert(each, f"{where}[{index}]") for index, each in enumerate(value)]
        return convert(value, where)
    if field.enum_type is not None:
        return _enum_value(field.enum_type, value, where)
    return strings(value, where) if repeated and field.cpp_type == FieldDescriptor.CPPTYPE_STRING else value


def enum_names(kind: Any) -> dict[int, str]:
    """The values of an enum, named as Python code names them: SOLVER_EULER of Solver is "euler"."""
    prefix = kind.values_by_number[0].name.removesuffix("UNSPECIFIED")
    return {
        number: value.name.removeprefix(prefix).lower() for number, value in kind.values_by_number.items() if number
    }


def _enum_value(kind: Any, name: object, where: str) -> int:
    numbers = {text: number for number, text in enum_names(kind).items()}
    if not (isinstance(name, str) and name in numbers):
        raise invalid(where, f"expected one of {', '.join(numbers)}, got {name!r}")
    return numbers[name]


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


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


def settings_message(kind: type[M], settings: object, path: str) -> M:
    """The message of a Sampler, a Sampling or a NoiseSeed."""
    message = build(kind, path, **{name: getattr(settings, name) for name in fields_of(type(settings))})
    _check_ranges(settings, path)
    return message


def _check_ranges(settings: object, path: str = "") -> None:
    """Of numbers: texts have been looked up by now."""
    for name, field in fields_of(type(settings)).items():
        value = getattr(settings, name)
        if value is not None and field.range is not None and (fault := field.range.fault(value)):
            raise invalid(f"{path}{name}", fault)


def _settings(kind: type[Message], settings: type, value: object, where: str) -> Message:
    return settings_message(kind, of_kind(value, settings, where), f"{where}.")


def _noise_seed(value: int | NoiseSeed, where: str) -> Message:
    """A number is a base_seed of sample 0."""
    seed = value if isinstance(value, NoiseSeed) else NoiseSeed(value)
    return settings_message(types_pb2.NoiseSeed, seed, f"{where}.")


def _token_ids(ids: Sequence[int], where: str) -> Message:
    try:
        return types_pb2.TokenIds(ids=ids)
    except (TypeError, ValueError) as error:
        raise invalid(where, f"expected token ids, got {_shown(ids)}: {error}") from error


_MESSAGES: Mapping[str, Callable[[Any, str], Message]] = {
    "Latents": lambda latents, where: Latents.of(latents, where).to_proto(),
    "Tensor": tensor_from_array,
    "TokenIds": _token_ids,
    "Sampler": partial(_settings, types_pb2.Sampler, Sampler),
    "Sampling": partial(_settings, types_pb2.Sampling, Sampling),
    "NoiseSeed": _noise_seed,
}
_FLAT: Mapping[str, type[Sampler] | type[Sampling]] = {"sampler": Sampler, "sampling": Sampling}


def merged(flat: Mapping[str, Any], **given: Sampler | Sampling | None) -> dict[str, Any]:
    """The sampler and the sampling, each with those of its fields that were given as keywords of their own.

    Raises `InvalidRequest` that names a field which is given in both ways.
    """
    kinds = {name: _FLAT[name] for name in given}
    if unknown := flat.keys() - flat_fields(*kinds.values()).keys():
        raise TypeError(f"unexpected keyword argument {min(unknown)!r}")
    return {name: _with_flat(name, kind, given[name], flat) for name, kind in kinds.items()}


def _with_flat(name: str, kind: type[Any], settings: Any, flat: Mapping[str, Any]) -> Any:
    chosen = {each: field.flat for each, field in fields_of(kind).items() if flat.get(field.flat) is not None}
    if not chosen:
        return settings
    settings = kind() if settings is None else of_kind(settings, kind, name)
    for each, keyword in chosen.items():
        if getattr(settings, each) is not None:
            raise invalid(keyword, f"given twice, as {keyword}= and in {name}=")
    return replace(settings, **{each: flat[keyword] for each, keyword in chosen.items()})


def generation(prompt: Prompt, settings: Mapping[str, Any]) -> GenerationRequest:
    """A generation of the keywords of `generate`."""
    own = {field.name: settings[field.name] for field in fields(GenerationRequest) if field.name in settings}
    flat = {name: value for name, value in settings.items() if name not in own}
    both = merged(flat, sampler=own.get("sampler"), sampling=own.get("sampling"))
    return GenerationRequest(prompt, **{**own, **both})


def generate(request: GenerationRequest) -> generation_pb2.GenerateRequest:
    """The message of a generation."""
    if request.prompt is None:
        raise invalid("prompt", "expected a text or token ids, got None")
    strings(request.stop, "stop")
    own = {field.name: getattr(request, field.name) for field in fields(request) if field.name != "prompt"}
    prompt = {"prompt" if isinstance(request.prompt, str) else "prompt_ids": request.prompt}
    message = build(generation_pb2.GenerateRequest, "", **prompt, **own)
    _check_ranges(request)
    return message
