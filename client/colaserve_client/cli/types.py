"""Kinds of values that options take, where click's own are too lenient."""

import math
from typing import Any

import click

from colaserve_client.reading import read_json


class Number(click.FloatRange):
    """A finite number within its range; Python reads NaN and infinity as numbers too."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The number."""
        if not math.isfinite(number := click.FLOAT.convert(value, param, ctx)):
            self.fail(f"{value} is no finite number.", param, ctx)
        return super().convert(number, param, ctx)


class Text(click.types.StringParamType):
    """A text that can be sent: bytes of the command line or of a variable that are no UTF-8 are refused."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The text."""
        text = super().convert(value, param, ctx)
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            self.fail(f"{text!r} is not UTF-8.", param, ctx)
        return text


class Trimmed(Text):
    """A text without the blanks around it: an address, a name or a key."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The text."""
        return super().convert(value, param, ctx).strip()


class TrimmedPath(click.Path):
    """A path without the blanks around it, which a variable or a mounted secret may bring along."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path."""
        return super().convert(value.strip() if isinstance(value, str) else value, param, ctx)


class JsonFile(Text):
    """A file with a JSON object."""

    name = "file"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The object."""
        return read_json(super().convert(value, param, ctx))


class Listed(Text):
    """Values of a kind with commas between them: "1,2" is two."""

    name = "list"

    def __init__(self, kind: "click.ParamType[Any]"):
        self._kind = kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The values."""
        text = super().convert(value, param, ctx)
        return [self._kind.convert(item.strip(), param, ctx) for item in text.split(",")]
