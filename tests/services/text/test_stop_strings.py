import itertools

from hypothesis import given
from hypothesis import strategies as st

from colaserve_services.text import StopStrings

letters = st.text(alphabet="ab", max_size=24)
stops_of_letters = st.lists(st.text(alphabet="ab", min_size=1, max_size=6), max_size=4)


def pieces(text: str, cuts: list[int]) -> list[str]:
    borders = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    return [text[start:end] for start, end in itertools.pairwise(borders)]


def cut(text: str, stops: list[str]) -> str:
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


@given(letters, stops_of_letters, st.lists(st.integers(0, 100), max_size=5))
def test_what_comes_through_ends_before_the_earliest_occurrence_however_the_text_is_cut(text, stops, cuts):
    finder = StopStrings(stops)
    out = "".join(finder.push(piece) for piece in pieces(text, cuts)) + finder.flush()
    assert out == cut(text, stops)
    assert (finder.hit is not None) == any(stop in text for stop in stops)


@given(letters, stops_of_letters)
def test_nothing_is_let_through_that_may_begin_a_stop_string_and_nothing_else_is_held(text, stops):
    finder = StopStrings(stops)
    out = finder.push(text)
    if finder.hit is None:
        held = text[len(out) :]
        assert out + held == text
        longest = max((n for stop in stops for n in range(len(stop)) if text.endswith(stop[:n])), default=0)
        assert len(held) == longest


def test_an_earlier_occurrence_that_may_still_complete_is_waited_for():
    finder = StopStrings(["b", "abc"])
    assert finder.push("xab") == "x"
    assert (finder.hit.start, finder.ended) == (2, False)
    assert finder.push("c") == ""
    assert (finder.hit.start, finder.hit.end, finder.ended) == (1, 4, True)


def test_a_later_character_can_settle_for_the_later_occurrence():
    finder = StopStrings(["b", "abc"])
    assert finder.push("xab") + finder.push("d") == "xa"
    assert (finder.hit.start, finder.ended) == (2, True)
    assert finder.push("more") == finder.flush() == ""
