"""The checker reads what the corpus writes, and nothing false passes."""

import random
import subprocess
import sys

import pytest

from colaserve_training import corpus
from colaserve_training.facts import countries
from colaserve_training.paragraphs import Verdict, read_paragraph
from colaserve_training.sentences import ALONE, FOLLOW, LEAD, fill

TRUE, FALSE, UNREADABLE = Verdict.TRUE, Verdict.FALSE, Verdict.UNREADABLE


def verdicts(text):
    return [sentence.verdict for sentence in read_paragraph(text).sentences]


def test_every_sentence_that_can_be_written_is_read_and_true():
    for country in countries():
        text = " ".join(fill(template, country) for template in (LEAD, *FOLLOW.values()))
        assert verdicts(text) == [TRUE] * 6, text
        for template in (template for templates in ALONE.values() for template in templates):
            assert verdicts(fill(template, country)) == [TRUE]


def test_every_sentence_about_another_country_is_false():
    rng, table = random.Random(0), countries()
    for country in table:
        other = rng.choice([c for c in table if c.capital != country.capital])
        text = fill(LEAD, country) + " " + fill(FOLLOW["capital"], other)
        assert verdicts(text) == [TRUE, FALSE], text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("France is a country in Asia.", [FALSE]),
        ("France is a country in Europe. Its capital is Paris", [TRUE, UNREADABLE]),
        ("France is a country in Europe. Its capital is Pariss.", [TRUE, UNREADABLE]),
        ("France is a country in Europe. It is nice. Its capital is Paris.", [TRUE, UNREADABLE, TRUE]),
        ("Its capital is Paris.", [UNREADABLE]),
        ("Narnia is a country in Europe. Its capital is Paris.", [UNREADABLE, UNREADABLE]),
        ("Grenada is a country in North America. Its capital is St. George's.", [TRUE, TRUE]),
        ("Washington, D.C. is the capital of the United States. The sun is hot.", [TRUE, UNREADABLE]),
        ("The United States is a country in North America. Its capital is Washington, D.C. Its currency is the Euro.",
         [TRUE, TRUE, FALSE]),
        ("Dominica is a country in North America. The capital of Cuba is Havana. Its capital is Roseau.", [TRUE] * 3),
        ("", []),
    ],
)  # fmt: skip
def test_what_is_false_cut_or_unreadable_does_not_pass(text, expected):
    assert verdicts(text) == expected
    assert read_paragraph(text).all_true is (bool(expected) and set(expected) == {TRUE})


def test_the_corpus_writes_only_true_paragraphs():
    rng = random.Random(1)
    for _ in range(500):
        assert read_paragraph(corpus.paragraph(rng)).all_true


def test_the_checker_needs_no_torch():
    code = "import sys; import colaserve_training.paragraphs; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
