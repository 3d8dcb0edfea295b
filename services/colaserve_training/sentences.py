"""The sentences that the demo writes about a country. One table, read by the corpus and by the checker.

`{The}`/`{the}` is the country with its article, the other names are fields of `Country`. A sentence of `LEAD` opens
a paragraph; one of `FOLLOW` speaks of the country that opened it; one of `ALONE` names its country itself.
"""

from __future__ import annotations

from colaserve_training.facts import Country

LEAD = "{The} is a country in {continent}."
FOLLOW = {
    "region": "It lies in {region}.",
    "capital": "Its capital is {capital}.",
    "currency": "Its currency is the {currency}.",
    "language": "Its main language is {language}.",
    "demonym": "Its demonym is {demonym}.",
}
ALONE = {
    "capital": ("The capital of {the} is {capital}.", "The capital city of {the} is {capital}."),
    "reverse": ("{capital} is the capital of {the}.", "{capital} is the capital city of {the}."),
    "continent": ("{The} is in {continent}.", "{The} is on the continent of {continent}."),
    "region": ("{The} lies in {region}.",),
    "currency": ("The currency of {the} is the {currency}.", "{The} uses the {currency}."),
    "language": ("The main language of {the} is {language}.", "People in {the} speak {language}."),
    "demonym": ("The demonym of {the} is {demonym}.",),
}


def fill(template: str, country: Country) -> str:
    """The sentence, with one full stop even after "Washington, D.C."."""
    text = template.format(
        The=country.title,
        the=country.full_name,
        capital=country.capital,
        continent=country.continent,
        region=country.region,
        currency=country.currency,
        language=country.language,
        demonym=country.demonym,
    )
    return text[:-1] if text.endswith("..") else text
