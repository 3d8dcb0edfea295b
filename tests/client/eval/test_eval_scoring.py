"""Every published scoring rule, by small cases written for it."""

import pytest

from colaserve_eval.scoring import (
    SHORT_TEXT,
    answer_letter,
    answer_segment,
    begins_with,
    choice_letter,
    cut_answer,
    normalise,
    same_choice,
    same_first_word,
    same_text,
    similarity,
)

COLOURS = ["red", "dark blue", "green", "light blue"]
NUMBERS = ["one", "two", "three", "four"]
LONG = "x" * SHORT_TEXT

TEXTS = [  # function, text, what it gives
    # an answer ends at the first newline after a word
    (cut_answer, " Paris\n\nQuestion: and", " Paris"),
    (cut_answer, "\n \n Paris\nmore", "\n \n Paris"),
    (cut_answer, " ...\n--\nyes\nno", " ...\n--\nyes"),
    (cut_answer, " no newline at all", " no newline at all"),
    (cut_answer, "\n\n", "\n\n"),
    (cut_answer, "", ""),
    # lower case, no punctuation, words joined by one space
    (normalise, "  The U.S.A.,  \t today! ", "the usa today"),
    (normalise, "Straße_1 – naïve", "straße_1 naïve"),
    (normalise, "- ! -", ""),
    (normalise, "a\nb", "a b"),
    # the segment is the text after the last line that says answer
    (answer_segment, "so the answer is blue", "blue"),
    (answer_segment, "Final Answer: (B)", "(B)"),
    (answer_segment, "answer\uff1a green", "green"),
    (answer_segment, "answer = 4", "4"),
    (answer_segment, "answer\nanswer red\nanswer", "red"),
    (answer_segment, "answer: red\nanswer: green", "green"),
    (answer_segment, "answers are red", "answers are red"),
    (answer_segment, "an answer islands", "islands"),
    (answer_segment, "just red", "just red"),
]
PAIRS = [  # rule, answer, truth, whether it is right
    (same_text, " the Denver  Broncos.", "The Denver Broncos", True),
    (same_text, "Denver Broncos", "The Denver Broncos", False),
    (same_first_word, " Shower, then home", "shower", True),
    (same_first_word, "shower", "shower room", True),
    (same_first_word, " the shower", "shower", False),
    (same_first_word, "showers", "shower", False),
    (same_first_word, "", "shower", False),
    (same_first_word, "...", "!", False),
    (begins_with, " Port-au-Prince. Its currency", "Port-au-Prince", True),
    (begins_with, "San Josephine", "San Jos", False),
    (begins_with, "San", "San José", False),
    (begins_with, "anything", "", False),
]
LETTERS = [  # text, choices, the letter that it names
    # a letter is read where it stands for a choice
    ("B", NUMBERS, "B"),
    (" (c). ", NUMBERS, "C"),
    ("[D]", NUMBERS, "D"),
    ("E", NUMBERS, None),
    ("I choose option B.", NUMBERS, "B"),
    ("Option A, no, option C!", NUMBERS, "C"),
    ("the answer is (D) obviously, as everyone here will know", NUMBERS, "D"),
    ("the answer is Dresden and not much else, as all will know", NUMBERS, None),
    ("choice=b", NUMBERS, "B"),
    ("maybe (A) or [B] here", NUMBERS, "B"),
    (f"maybe (A) or [B] here {LONG}", NUMBERS, None),
    ("option E, that is (A)", NUMBERS, "A"),
    ("B because", NUMBERS, None),
    ("the option A-team, as all of us here will surely know", NUMBERS, None),
    # or a choice by its text
    (" Dark  BLUE!", COLOURS, "B"),
    ("The correct answer is: dark blue", COLOURS, "B"),
    ("final answer green", COLOURS, "C"),
    ("it looks dark blue to me", COLOURS, "B"),
    ("it looks dark blue, or green to me", COLOURS, None),
    ("blue", COLOURS, None),
    ("dark bluee", COLOURS, "B"),
    ("light bue", COLOURS, "D"),
    ("bark bluu", COLOURS, None),
    ("", COLOURS, None),
    # a lead-in is removed before choices within choices confuse
    ("The correct answer is: dark blue.", ["blue", "dark blue"], "B"),
    ("it is dark blue", ["blue", "dark blue"], None),
    # a choice that normalises to nothing is in no text; the first of equal ones is taken
    ("some text", ["+", "text"], "B"),
    ("red", ["Red", "red."], "A"),
]


@pytest.mark.parametrize(("function", "text", "expected"), TEXTS)
def test_texts_are_cut_and_normalised(function, text, expected):
    assert function(text) == expected


def test_similarity_is_difflibs_ratio_of_normalised_texts_and_one_for_two_empty_ones():
    assert [similarity(*pair) for pair in (("AbCd!", "bcde"), ("?", "..."), ("?", "a"))] == [0.75, 1.0, 0.0]


@pytest.mark.parametrize(("rule", "answer", "truth", "right"), PAIRS)
def test_texts_are_compared(rule, answer, truth, right):
    assert rule(answer, truth) is right


@pytest.mark.parametrize(("text", "choices", "letter"), LETTERS)
def test_a_choice_is_named_by_its_letter_or_its_text(text, choices, letter):
    assert choice_letter(text, choices) == letter


def test_the_segment_comes_before_the_whole_answer_which_helps_out():
    assert answer_letter("red? no, the answer is green", COLOURS) == "C"
    assert answer_letter("green is what I answer today", COLOURS) == "C"


@pytest.mark.parametrize(
    ("answer", "truth", "right"),
    [
        ("(B)", "dark blue", True),
        ("dark blue", "B", True),
        ("green", "dark blue", False),
        ("no idea.", "No idea", True),
        ("something", "else", False),
    ],
)
def test_choices_are_compared_by_letter_and_else_by_text(answer, truth, right):
    assert same_choice(answer, truth, COLOURS) is right
