"""Make `data/facts.csv` from countryinfo, Babel and the reviewed corrections: `python -m ...training.build_facts`.

`data/states.csv` lists whom it is about: the members of the United Nations, the two observer states, Taiwan and
Kosovo. Territories are left out, since "X is a country" has to be true of every row.
Needs `countryinfo` and `Babel` (the [dev] extra); training and serving read the finished table only.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections import defaultdict
from importlib.resources import files
from typing import Any

from colaserve_training.facts import COLUMNS

REGIONS = {
    "Australia and New Zealand": "Australasia",
    "Eastern Asia": "East Asia",
    "Middle Africa": "Central Africa",
    "South-eastern Asia": "Southeast Asia",
    "Southern Asia": "South Asia",
    "Caribbean": "the Caribbean",
}


def build() -> str:
    """The whole table as CSV text."""
    corrections: dict[str, dict[str, str]] = defaultdict(dict)
    for row in _table("corrections"):
        corrections[row["iso"]][row["field"]] = row["value"]
    states = {row["iso"]: row["article"] for row in _table("states")}
    rows = sorted((_row(iso, states[iso], corrections[iso]) for iso in states), key=lambda row: row["name"])
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _table(name: str) -> list[dict[str, str]]:
    text = files(__package__).joinpath(f"data/{name}.csv").read_text(encoding="utf-8")
    return list(csv.DictReader(io.StringIO(text)))


def _row(iso: str, article: str, fixed: dict[str, str]) -> dict[str, str]:
    raw = _source().get(iso, {})
    value = {**_plain_fields(raw), **fixed}
    return {
        "iso": iso,
        "name": value["name"].removeprefix("The "),
        "article": article,
        "capital": value["capital"],
        "continent": value["continent"],
        "region": REGIONS.get(value["region"], value["region"]),
        "currency": _named(value["currency"], "currencies"),
        "language": _named(value["language"], "languages"),
        "demonym": value["demonym"],
        "aliases": value.get("aliases", ""),
    }


def _plain_fields(raw: dict[str, Any]) -> dict[str, str]:
    if not raw:
        return {}
    region = raw.get("intermediateregion") or raw["subregion"]
    first = {"currency": raw["currencies"][:1], "language": raw["languages"][:1]}
    fields = {name: raw[name] for name in ("name", "capital", "demonym") if isinstance(raw[name], str)}
    fields |= {name: codes[0] for name, codes in first.items() if codes}
    return fields | {"region": region, "continent": _continent(raw["region"], region)}


def _continent(region: str, part: str) -> str:
    if region != "Americas":
        return region
    return "South America" if part == "South America" else "North America"


def _named(code: str, kind: str) -> str:
    """CLDR's English name of a currency or language code; "=Text" stands for itself."""
    if code.startswith("="):
        return code[1:]
    from babel import Locale

    names: dict[str, str] = getattr(Locale("en"), kind)
    return names[code]


def _source() -> dict[str, dict[str, Any]]:
    if not _SOURCE:
        for path in sorted(files("countryinfo").joinpath("data").iterdir(), key=lambda path: path.name):
            if path.name.endswith(".json"):
                raw = json.loads(path.read_text(encoding="utf-8"))
                _SOURCE.setdefault(raw.get("ISO", {}).get("alpha2", ""), raw)
    return _SOURCE


_SOURCE: dict[str, dict[str, Any]] = {}

if __name__ == "__main__":
    sys.stdout.write(build())
