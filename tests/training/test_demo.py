"""The recipe repeats itself to the byte, the bundled checkpoint is what it says; tokenizers are trained; the demo's
facts, phrasings and question sets."""

import json
import random
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from colaserve_client.reading import read_json_lines, read_lines
from colaserve_eval.demo import demo_folder, reads_as_true
from colaserve_training import demo
from colaserve_training.corpus import Corpus, countries, fill, normalised, tables, tokenizer_text
from colaserve_training.tokenizer import save_tokenizer, train_tokenizer
from tests.training.conftest import WORDS

BUNDLED = Path(str(files("colaserve_services").joinpath("demo")))


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def shortened():
    recipe = demo.DemoRecipe(seed=3).scaled(vae_steps=3, prior_steps=3)
    return replace(recipe, prior=replace(recipe.prior, rows=8), polish=replace(recipe.polish, rows=8))


@pytest.mark.timeout(300)
def test_a_shortened_recipe_run_twice_with_two_threads_gives_the_same_bytes(tmp_path):
    torch.set_num_threads(2)
    for name in "ab":
        demo.make_demo(tmp_path / name, tmp_path / f"{name}-run", shortened(), quiet=True)
    one, two = content(tmp_path / "a"), content(tmp_path / "b")
    assert one == two
    assert one.keys() == content(BUNDLED).keys() - {"MODEL_CARD.md", "true_sentences.tsv"}


def test_the_bundle_is_small_has_its_card_and_answers_its_questions():
    found = content(BUNDLED)
    assert sum(map(len, found.values())) <= 10_000_000
    assert "MODEL_CARD.md" in found
    generator = demo.load_generator(BUNDLED)
    prompts = ["Question: What is the capital of France? Answer:", "User: What is 3 + 4?\nAssistant:"]
    assert generator.texts(prompts) == [" Paris", " 7"]
    samples = {
        "capital_held_out_phrasings": 197,
        "continent_trained_phrasings": 61,
        "completions": 45,
        "paragraphs": 40,
    }
    for name, every in samples.items():
        assert demo.score_sets(generator, [name], every)["tasks"][name]["accuracy"] >= 80


DEMO = files("colaserve_services").joinpath("demo")


@settings(max_examples=50, deadline=None)
@given(text=st.text(max_size=60))
def test_any_text_comes_back_as_it_was(words, text):
    assert words.decode(words.encode(text).ids) == text


def test_special_tokens_have_their_ids_and_the_same_text_gives_the_same_bytes(words, tmp_path):
    one, two = (save_tokenizer(train_tokenizer(WORDS, 290), tmp_path / name) for name in "ab")
    assert one.read_bytes() == two.read_bytes()
    assert [words.token_to_id(token) for token in ("<|endoftext|>", "<|im_end|>", "<|pad|>")] == [0, 1, 2]


def test_the_bundled_tokenizer_has_the_configuration_that_the_trainer_writes(tmp_path):
    save_tokenizer(Tokenizer.from_file(str(DEMO / "tokenizer.json")), tmp_path)
    written = (tmp_path / "tokenizer_config.json").read_text()
    assert written == (DEMO / "tokenizer_config.json").read_text()
    config = json.loads(written)
    assert (config["eos_token"], config["pad_token"]) == ("<|endoftext|>", "<|pad|>")


def test_every_word_of_an_answer_is_one_token_but_for_three_capitals():
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    fields = ("name", "capital", "continent", "currency", "language")
    answers = [country[field] for country in countries() for field in fields]
    cut = {text for text in answers if len(tokenizer.encode(" " + text).ids) > len(text.split())}
    assert cut == {"St. John's", "St. George's", "Washington, D.C."}


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
