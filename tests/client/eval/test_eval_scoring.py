"""Every published scoring rule, by small cases written for it."""

import pytest

from colaserve_eval import scoring

COLOURS = ["red", "dark blue", "green", "light blue"]
LONG = "x" * scoring.SHORT_TEXT


@pytest.mark.parametrize(
    ("generated", "answer"),
    [
        (" Paris\n\nQuestion: and", " Paris"),
        ("\n \n Paris\nmore", "\n \n Paris"),
        (" ...\n--\nyes\nno", " ...\n--\nyes"),
        (" no newline at all", " no newline at all"),
        ("\n\n", "\n\n"),
        ("", ""),
    ],
)
def test_an_answer_ends_at_the_first_newline_after_a_word(generated, answer):
    assert scoring.cut_answer(generated) == answer


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("  The U.S.A.,  \t today! ", "the usa today"),
        ("Straße_1 – naïve", "straße_1 naïve"),
        ("- ! -", ""),
        ("a\nb", "a b"),
    ],
)
def test_normalising_lowers_drops_punctuation_and_joins_words(text, normal):
    assert scoring.normalise(text) == normal


def test_similarity_is_difflibs_ratio_of_normalised_texts_and_one_for_two_empty_ones():
    assert scoring.similarity("AbCd!", "bcde") == 0.75
    assert scoring.similarity("?", "...") == 1.0
    assert scoring.similarity("?", "a") == 0.0


def test_texts_are_the_same_up_to_case_spaces_and_punctuation_only():
    assert scoring.same_text(" the Denver  Broncos.", "The Denver Broncos")
    assert not scoring.same_text("Denver Broncos", "The Denver Broncos")


@pytest.mark.parametrize(
    ("answer", "truth", "right"),
    [
        (" Shower, then home", "shower", True),
        ("shower", "shower room", True),
        (" the shower", "shower", False),
        ("showers", "shower", False),
        ("", "shower", False),
        ("...", "!", False),
    ],
)
def test_word_prediction_compares_the_first_normalised_words(answer, truth, right):
    assert scoring.same_first_word(answer, truth) is right


@pytest.mark.parametrize(
    ("answer", "truth", "right"),
    [
        (" Port-au-Prince. Its currency", "Port-au-Prince", True),
        ("San Josephine", "San Jos", False),
        ("San", "San José", False),
        ("anything", "", False),
    ],
)
def test_an_answer_may_go_on_where_only_its_beginning_is_asked_for(answer, truth, right):
    assert scoring.begins_with(answer, truth) is right


@pytest.mark.parametrize(
    ("answer", "segment"),
    [
        ("so the answer is blue", "blue"),
        ("Final Answer: (B)", "(B)"),
        ("answer\uff1a green", "green"),
        ("answer = 4", "4"),
        ("answer\nanswer red\nanswer", "red"),
        ("answer: red\nanswer: green", "green"),
        ("answers are red", "answers are red"),
        ("an answer islands", "islands"),
        ("just red", "just red"),
    ],
)
def test_the_answer_segment_is_the_text_after_the_last_line_that_says_answer(answer, segment):
    assert scoring.answer_segment(answer) == segment


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        (" (c). ", "C"),
        ("[D]", "D"),
        ("E", None),
        ("I choose option B.", "B"),
        ("Option A, no, option C!", "C"),
        ("the answer is (D) obviously, as everyone here will know", "D"),
        ("the answer is Dresden and not much else, as all will know", None),
        ("choice=b", "B"),
        ("maybe (A) or [B] here", "B"),
        (f"maybe (A) or [B] here {LONG}", None),
        ("option E, that is (A)", "A"),
        ("B because", None),
        ("the option A-team, as all of us here will surely know", None),
    ],
)
def test_a_letter_among_the_choices_is_read_where_it_stands_for_one(text, letter):
    assert scoring.choice_letter(text, ["one", "two", "three", "four"]) == letter


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        (" Dark  BLUE!", "B"),
        ("The correct answer is: dark blue", "B"),
        ("final answer green", "C"),
        ("it looks dark blue to me", "B"),
        ("it looks dark blue, or green to me", None),
        ("blue", None),
        ("dark bluee", "B"),
        ("light bue", "D"),
        ("bark bluu", None),
        ("", None),
    ],
)
def test_a_choice_is_recognised_by_its_text(text, letter):
    assert scoring.choice_letter(text, COLOURS) == letter


def test_a_lead_in_is_removed_before_choices_within_choices_confuse():
    assert scoring.choice_letter("The correct answer is: dark blue.", ["blue", "dark blue"]) == "B"
    assert scoring.choice_letter("it is dark blue", ["blue", "dark blue"]) is None


def test_a_choice_that_normalises_to_nothing_is_contained_in_no_text():
    assert scoring.choice_letter("some text", ["+", "text"]) == "B"


def test_the_first_of_equal_choices_is_taken():
    assert scoring.choice_letter("red", ["Red", "red."]) == "A"


def test_the_segment_comes_before_the_whole_answer_and_the_whole_answer_helps_out():
    assert scoring.answer_letter("red? no, the answer is green", COLOURS) == "C"
    assert scoring.answer_letter("green is what I answer today", COLOURS) == "C"


def test_choices_are_compared_by_letter_and_else_by_text():
    assert scoring.same_choice("(B)", "dark blue", COLOURS)
    assert scoring.same_choice("dark blue", "B", COLOURS)
    assert not scoring.same_choice("green", "dark blue", COLOURS)
    assert scoring.same_choice("no idea.", "No idea", COLOURS)
    assert not scoring.same_choice("something", "else", COLOURS)
