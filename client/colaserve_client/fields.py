"""What is known of a field of a request, said once, as an annotation of `Sampler`, `Sampling`, `NoiseSeed` or
`GenerationRequest` (settings.py). Bounds checks, command-line options, the fields of a batch and of HTTP requests, the
servers' defaults and the reference pages are derived from it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache
from inspect import cleandoc
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from colaserve_client.arrays import FloatArray

T = TypeVar("T", bound=type)
_KINDS = (bool, int, float, FloatArray)  # of values, beside str and dataclasses of such fields
LARGE = 2**31  # bounds from here on say what a number's type holds, and are left out of the help


@dataclass(frozen=True)
class Range:
    """From `least` to `most`, both included but where `above` says that the least is not."""

    least: float
    most: float
    above: bool = False

    def __str__(self) -> str:
        return f"above {self.least} and at most {self.most}" if self.above else f"{self.least} to {self.most}"

    def __contains__(self, value: float) -> bool:
        return self.least <= value <= self.most and not (self.above and value == self.least)

    def fault(self, value: float) -> str:
        """What is wrong with a value outside; NaN is outside. Empty for one that fits."""
        if value in self:
            return ""
        expected = f"{self.least} or more" if value < self.least and self.most >= LARGE else self
        return f"got {f'{value:g}' if isinstance(value, float) else value}, expected {expected}"


@dataclass(frozen=True)
class Field:
    """One field of a request."""

    doc: str  # one sentence
    range: Range | None = None
    default: Any = None  # what unset means where neither --defaults nor the checkpoint says; None: the sentence says it
    choices: Mapping[str, int] | None = None  # its texts, and the values of the wire's enum
    flat: str = ""  # its name beside fields of other messages: on the command line, in a batch, over HTTP
    option: str = ""  # its command-line option; empty: --flat-name
    wire: str = ""  # its name in the message; empty: the same name
    name: str = ""  # filled in by `fields_of`
    kind: Any = str  # filled in by `fields_of`
    multiple: bool = False  # filled in by `fields_of`: a list of such values

    @property
    def bounds(self) -> str:
        """The range as help shows it; empty where it says nothing."""
        if self.choices is not None:
            return ", ".join(self.choices)
        return str(self.range) if self.range is not None and self.range.most < LARGE else ""

    @property
    def help(self) -> str:
        """The sentence, with the range."""
        return f"{self.doc.removesuffix('.')} ({self.bounds})." if self.bounds else self.doc

    def fault(self, value: Any) -> str:
        """What is wrong with a value; empty for one that fits."""
        if self.choices is not None:
            return "" if value in self.choices else f"got {value!r}, expected one of {', '.join(self.choices)}"
        return self.range.fault(value) if self.range is not None else ""


@cache
def choices_of(enum: Any) -> Mapping[str, int]:
    """The values of an enum's descriptor, named as Python code names them: SOLVER_EULER of Solver is "euler"."""
    prefix = enum.values_by_number[0].name.removesuffix("UNSPECIFIED")
    return {
        value.name.removeprefix(prefix).lower(): number for number, value in enum.values_by_number.items() if number
    }


def names_of(enum: Any) -> Mapping[int, str]:
    """The same by their numbers."""
    return {number: name for name, number in choices_of(enum).items()}


def _fields_of(kind: type) -> Mapping[str, Field]:
    """The annotated fields of a dataclass by their names, each with its name and type."""
    hints, found = get_type_hints(kind, include_extras=True), {}
    for spec in fields(kind):
        for note in getattr(hints[spec.name], "__metadata__", ()):
            if isinstance(note, Field):
                value, *_ = get_args(hints[spec.name])  # such as int | None
                types = (each for each in (value, *get_args(value)) if each in _KINDS or is_dataclass(each))
                found[spec.name] = replace(
                    note,
                    name=spec.name,
                    flat=note.flat or spec.name,
                    kind=next(types, str),
                    multiple=get_origin(value) is Sequence,
                )
    return found


fields_of: Callable[[type], Mapping[str, Field]] = cache(_fields_of)


def flat_fields(*kinds: type) -> dict[str, Field]:
    """The fields of several dataclasses by their flat names."""
    return {field.flat: field for kind in kinds for field in fields_of(kind).values()}


def documented(kind: T) -> T:
    """Class decorator: add the table of fields to the docstring, behind what it says of other fields."""
    text = cleandoc(kind.__doc__ or "")
    lines = [f"    {name}: {_default(field)}{field.help}" for name, field in fields_of(kind).items()]
    kind.__doc__ = "\n".join([text, *([] if "Attributes:" in text else ["", "Attributes:"]), *lines])
    return kind


def _default(field: Field) -> str:
    return "" if field.default is None else f"[{field.default:g}] " if field.kind is float else f"[{field.default}] "
