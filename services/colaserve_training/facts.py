"""The facts behind the demo's corpus: a reviewed table of countries, read without any dependency.

The table (`data/facts.csv`) is made by `build_facts.py` from `countryinfo` and `Babel`, corrected by hand
(`data/corrections.csv`, one reason a row). One answer is kept a field: a country with several languages or
capitals has the one that the table names, and docs/training.md says by which rule.
"""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

COLUMNS = ("iso", "name", "article", "capital", "continent", "region", "currency", "language", "demonym", "aliases")


@dataclass(frozen=True)
class Country:
    """One row of the table; every text as it is written in an answer."""

    iso: str  # ISO 3166 alpha-2 (XK for Kosovo)
    name: str  # without its article
    article: str  # "the" or ""
    capital: str
    continent: str  # Africa, Asia, Europe, North America, Oceania or South America
    region: str  # UN M49 sub-region, in everyday English
    currency: str  # CLDR's English name
    language: str  # the main one
    demonym: str
    aliases: tuple[str, ...]  # other names, with their article where they have one

    @property
    def full_name(self) -> str:
        """The name inside a sentence: "the Bahamas", "France"."""
        return f"{self.article} {self.name}".strip()

    @property
    def title(self) -> str:
        """The name at the beginning of a sentence: "The Bahamas", "France"."""
        return self.full_name[:1].upper() + self.full_name[1:]


@cache
def countries() -> tuple[Country, ...]:
    """All countries, in the order of their names."""
    text = files(__package__).joinpath("data/facts.csv").read_text(encoding="utf-8")
    rows = csv.DictReader(io.StringIO(text))
    return tuple(_country(row) for row in rows)


def _country(row: dict[str, str]) -> Country:
    aliases = tuple(filter(None, row.pop("aliases").split(";")))
    return Country(**row, aliases=aliases)
