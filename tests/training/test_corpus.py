"""The demo's facts, phrasings and question sets."""

import random
from importlib.resources import files

import pytest

from colaserve_training import build_facts, corpus
from colaserve_training.facts import countries
from colaserve_training.questions import question_sets

DRAWN = 4000


@pytest.fixture(scope="module")
def examples():
    drawn, rng = corpus.Corpus(), random.Random("test")
    return [drawn.draw(rng) for _ in range(DRAWN)]


def test_the_table_is_what_its_sources_and_the_corrections_give():
    pytest.importorskip("countryinfo")
    pytest.importorskip("babel")
    path = files("colaserve_training").joinpath("data/facts.csv")
    assert build_facts.build() == path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("iso", "field", "value"),
    [
        ("FR", "capital", "Paris"), ("BI", "capital", "Gitega"), ("KZ", "capital", "Astana"),
        ("SZ", "name", "Eswatini"), ("MK", "name", "North Macedonia"), ("HR", "currency", "Euro"),
        ("BG", "currency", "Euro"), ("SV", "currency", "US Dollar"), ("ZM", "currency", "Zambian Kwacha"),
        ("JM", "continent", "North America"), ("BR", "continent", "South America"), ("TR", "continent", "Asia"),
        ("RS", "language", "Serbian"), ("MY", "language", "Malay"), ("US", "capital", "Washington, D.C."),
        ("XK", "capital", "Pristina"), ("BS", "full_name", "the Bahamas"), ("BS", "title", "The Bahamas"),
    ],
)  # fmt: skip
def test_facts_that_sources_get_wrong_or_old_are_right(iso, field, value):
    (country,) = [country for country in countries() if country.iso == iso]
    assert getattr(country, field) == value


def test_every_country_has_every_fact_and_its_own_name():
    table = countries()
    assert len(table) == 197
    assert len({country.full_name for country in table}) == len({country.iso for country in table}) == 197
    for country in table:
        assert all((country.capital, country.region, country.currency, country.language, country.demonym)), country
        assert not any("(" in text for text in (country.currency, country.language, country.capital)), country
    continents = {country.continent for country in table}
    assert continents == {"Africa", "Asia", "Europe", "North America", "Oceania", "South America"}


def test_there_are_ten_held_out_phrasings_of_the_capital_and_some_of_every_kind():
    held_out = corpus.phrasings(held_out=True)
    assert len(held_out["capital"]) >= 10
    assert held_out.keys() == corpus.phrasings().keys()
    assert all(held_out.values())


def test_no_held_out_phrasing_is_trained_or_tokenized(examples):
    table = countries()
    seen = {corpus.normalised(text.split("\nA")[0]) for text in corpus.tokenizer_text(0, examples=DRAWN)}
    seen |= {corpus.normalised(example.prompt) for example in examples}
    for kind, templates in corpus.phrasings(held_out=True).items():
        for template in templates:
            trained = [corpus.normalised(other) for other in corpus.phrasings()[kind]]
            assert corpus.normalised(template) not in trained
            for country in table[::40]:
                if kind != "addition":
                    asked = corpus.normalised(corpus.fill_question(template, country))
                    assert not any(text.startswith((f"question {asked} answer", f"user {asked}")) for text in seen)


def test_a_disturbed_phrasing_never_becomes_a_held_out_one(monkeypatch):
    held_out = corpus.phrasings(held_out=True)["capital"][0]
    answers = iter([held_out, held_out.lower(), "What is the capital of {the}?"])
    monkeypatch.setattr(corpus, "disturb", lambda *_: next(answers))
    assert corpus.Corpus()._phrasing("capital", random.Random(0)) == "What is the capital of {the}?"


def test_held_out_facts_are_in_no_training_text(examples):
    names = {country.iso: country for country in countries()}
    for kind, codes in corpus.unseen_facts().items():
        assert len(codes) == 20
        for country in (names[code] for code in codes):
            for example in examples:
                text = example.prompt + example.response
                if kind == "demonym":
                    about = country.full_name in text and "demonym" in text.lower()
                    assert not (about and example.response.endswith(f" {country.demonym}")), text
                elif example.kind == "reverse":
                    assert example.response != f" {country.name}"


def test_sums_above_the_trained_ones_are_not_trained(examples):
    answers = [int(example.response) for example in examples if example.kind == "addition"]
    assert set(answers) == set(range(25))


def test_questions_keep_their_entity_and_their_intent(examples):
    for example in examples:
        if example.kind == "capital":
            assert "apital" in example.prompt
            named = (name for country in countries() for name in (country.name, *country.aliases))
            assert any(name.removeprefix("the ").lower() in example.prompt.lower() for name in named)


def test_examples_are_a_function_of_the_seed():
    one, two = (corpus.some(["capital", "paragraph"], 20, 5) for _ in range(2))
    assert one == two
    assert one != corpus.some(["capital", "paragraph"], 20, 6)


def test_question_sets_ask_what_they_say():
    sets = question_sets()
    assert len(sets["capital_held_out_phrasings"]) == 197 * len(corpus.phrasings(held_out=True)["capital"])
    assert {item["ground_truth"] for item in sets["capital_trained_phrasings"]} == {c.capital for c in countries()}
    assert len(sets["addition_trained_phrasings"]) == 169
    assert len(sets["paragraphs"]) == len(sets["completions"]) == 197
    assert all(item["ground_truth"] in item["choices"] for item in sets["continent_trained_phrasings"])
    unseen = corpus.unseen_facts()["reverse"]
    capitals = {c.capital for c in countries() if c.iso in unseen}
    asked = {item["ground_truth"] for item in sets["reverse_trained_phrasings"]}
    assert not asked & {c.name for c in countries() if c.capital in capitals}
