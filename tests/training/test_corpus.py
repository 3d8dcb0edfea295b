"""The demo's facts, phrasings and question sets."""

import random

import pytest

from colaserve_client.reading import read_json_lines, read_lines
from colaserve_eval.demo import demo_folder, reads_as_true
from colaserve_training.corpus import Corpus, countries, fill, normalised, tables, tokenizer_text

BY_ISO = {country["iso"]: country for country in countries()}


def asked(name):
    return [question for _, question in read_json_lines(demo_folder() / "questions" / f"{name}.jsonl")]


@pytest.fixture(scope="module")
def examples():
    corpora, rng = (Corpus(), Corpus(words=0.9, nonsense=0.5)), random.Random("test")
    return [corpus.draw(rng) for corpus in corpora for _ in range(2000)]


@pytest.mark.parametrize(
    ("iso", "field", "value"),
    [
        ("BI", "capital", "Gitega"), ("KZ", "capital", "Astana"), ("SZ", "name", "Eswatini"),
        ("BG", "currency", "Euro"), ("ZM", "currency", "Zambian Kwacha"), ("JM", "continent", "North America"),
        ("TR", "continent", "Asia"), ("MY", "language", "Malay"), ("XK", "capital", "Pristina"),
        ("BS", "the", "the Bahamas"), ("BS", "The", "The Bahamas"), ("BS", "bare", "Bahamas"),
    ],
)  # fmt: skip
def test_facts_that_sources_get_wrong_or_old_are_right(iso, field, value):
    assert BY_ISO[iso][field] == value


def test_every_country_has_every_fact_and_its_own_name():
    assert len({country["the"] for country in countries()}) == len(BY_ISO) == 197
    for country in countries():
        facts = [country[field] for field in ("capital", "region", "currency", "language", "demonym")]
        assert all(facts), country
        assert not any("(" in text for text in facts), country
    continents = {country["continent"] for country in countries()}
    assert continents == {"Africa", "Asia", "Europe", "North America", "Oceania", "South America"}


def test_no_held_out_phrasing_is_trained_or_tokenized(examples):
    seen = {normalised(text.split("\nA")[0]) for text in tokenizer_text(0, examples=4000)}
    seen |= {normalised(example.prompt) for example in examples}
    assert len(tables()["held_out_phrasings"]["capital"]) >= 10
    for kind, trained in tables()["phrasings"].items():
        for template in tables()["held_out_phrasings"][kind]:
            assert normalised(template) not in map(normalised, trained)
            for country in countries()[::40] if kind != "addition" else ():
                question = normalised(template.format_map(country))
                assert not any(text.startswith((f"question {question} answer", f"user {question}")) for text in seen)


def test_facts_and_sums_that_are_held_out_are_in_no_training_text(examples):
    unseen = tables()["unseen"]
    assert {kind: len(codes) for kind, codes in unseen.items()} == {"demonym": 20, "reverse": 20}
    for example in examples:
        text = example.prompt + example.response
        for country in (BY_ISO[code] for code in unseen["demonym"] if "demonym" in text.lower()):
            assert not (country["the"] in text and text.endswith(f" {country['demonym']}")), text
        if example.kind == "reverse":
            assert example.response not in {f" {BY_ISO[code]['name']}" for code in unseen["reverse"]}
    assert {int(example.response) for example in examples if example.kind == "addition"} == set(range(25))


def test_questions_keep_their_country_and_their_intent_and_paragraphs_are_judged_true(examples):
    paragraphs = [example.response for example in examples if example.kind == "paragraph"]
    assert len(paragraphs) > 200
    assert all(map(reads_as_true, paragraphs))
    names = [name for country in countries() for name in (country["name"], *country["aliases"].split(";")) if name]
    for example in (example for example in examples if example.kind == "capital"):
        assert "apital" in example.prompt
        assert any(name.removeprefix("the ").lower() in example.prompt.lower() for name in names)


def test_examples_are_a_function_of_the_seed():
    one, again, other = ([Corpus().draw(rng) for _ in range(20)] for rng in map(random.Random, (5, 5, 6)))
    assert one == again != other


def test_the_true_sentences_and_question_sets_of_the_bundle_are_those_of_the_corpus():
    file = demo_folder() / "true_sentences.tsv"
    templates = (tables()["lead"], *tables()["follow"].values())
    assert [line for _, line in read_lines(file)] == ["\t".join(fill(t, c) for t in templates) for c in countries()]
    for kind in ("capital", "continent", "language", "currency", "region", "demonym", "reverse"):
        known = [country for country in countries() if country["iso"] not in tables()["unseen"].get(kind, ())]
        answers = {
            f"Question: {template.format_map(country)} Answer:": country["name" if kind == "reverse" else kind]
            for template in tables()["held_out_phrasings"][kind]
            for country in known
        }
        held_out, trained = (asked(f"{kind}_{name}_phrasings") for name in ("held_out", "trained"))
        assert {question["prompt"]: question["ground_truth"] for question in held_out} == answers
        assert {question["ground_truth"] for question in trained} == set(answers.values())
