"""The tokenizer trainer."""

import json
from importlib.resources import files

from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from colaserve_training.corpus import countries
from colaserve_training.tokenizer import save_tokenizer, train_tokenizer
from tests.training.conftest import WORDS

DEMO = files("colaserve_services").joinpath("demo")


def test_special_tokens_have_their_ids(words):
    assert [words.token_to_id(token) for token in ("<|endoftext|>", "<|im_end|>", "<|pad|>")] == [0, 1, 2]


@settings(max_examples=50, deadline=None)
@given(text=st.text(max_size=60))
def test_any_text_comes_back_as_it_was(words, text):
    assert words.decode(words.encode(text).ids) == text


def test_the_same_text_gives_the_same_bytes(tmp_path):
    one, two = (save_tokenizer(train_tokenizer(WORDS, 290), tmp_path / name) for name in "ab")
    assert one.read_bytes() == two.read_bytes()


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
