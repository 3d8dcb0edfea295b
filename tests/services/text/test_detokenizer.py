import itertools
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models

from colaserve_services.text import StopStrings, Tokenizer, join
from tests.services.text.small_tokenizers import byte_fallback

GOLDEN = Path(__file__).parents[2] / "data/golden"
PLAIN = Tokenizer.open(GOLDEN / "tiny_b4/tokenizer.json")


def with_added(*tokens: str) -> Tokenizer:
    library = tokenizers.Tokenizer.from_file(str(GOLDEN / "tiny_b4/tokenizer.json"))
    library.add_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in tokens])
    return Tokenizer(library, library.get_vocab_size(), PLAIN.special)


EXTENDED = with_added("<|two words|>", "é", "Ġ", "naïve 😀", "\0")


any_id = st.integers(0, EXTENDED.vocab_size + 3) | st.integers(PLAIN.vocab_size, EXTENDED.vocab_size - 1)


@given(st.lists(any_id, max_size=40))
def test_pieces_joined_are_what_the_library_decodes_for_any_ids(ids: list[int]):
    assert join(EXTENDED.detokenizer(), ids) == EXTENDED.decode(ids)


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=30))
def test_a_character_never_comes_in_halves(text: str):
    detokenizer = PLAIN.detokenizer()
    pieces = [detokenizer.push(id_) for id_ in PLAIN.encode(text)]
    assert "".join(pieces).rstrip("\N{REPLACEMENT CHARACTER}") == text.rstrip("\N{REPLACEMENT CHARACTER}")
    assert "".join(pieces) + detokenizer.flush() == text


def test_incomplete_bytes_wait_and_become_a_replacement_character_at_the_end():
    ids = EXTENDED.encode("a😀")
    detokenizer = EXTENDED.detokenizer()
    pieces = [detokenizer.push(id_) for id_ in ids[:-1]]
    assert "".join(pieces) == "a"
    assert detokenizer.flush() == "\N{REPLACEMENT CHARACTER}"


def test_bytes_that_never_make_a_character_are_not_held_for_ever():
    [first, *_] = PLAIN.encode("日")
    detokenizer = PLAIN.detokenizer()
    pieces = [detokenizer.push(first) for _ in range(1000)]
    assert set("".join(pieces)) == {"\N{REPLACEMENT CHARACTER}"}
    assert len("".join(pieces) + detokenizer.flush()) == 1000


WORDS = ["▁He", "llo", "▁wor", "ld", "##ly", ".", "an</w>", "d</w>", " x"]
WORDS += ["<0xE2>", "<0x82>", "<0xAC>", "<0x41>", "<0xFF>"]
OTHER_DECODERS = [
    decoders.Metaspace(),
    decoders.WordPiece(),
    decoders.BPEDecoder(suffix="</w>"),
    decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]),
    byte_fallback().decoder,
    decoders.Sequence([decoders.Replace("l", "L"), decoders.ByteLevel()]),
]


def of_words(decoder: decoders.Decoder) -> Tokenizer:
    library = tokenizers.Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="."))
    library.decoder = decoder
    return Tokenizer(library, len(WORDS), PLAIN.special)


@pytest.mark.parametrize("decoder", OTHER_DECODERS, ids=lambda decoder: type(decoder).__name__)
def test_a_tokenizer_that_is_not_byte_level_decodes_the_same_in_pieces_also_after_other_ids(decoder: decoders.Decoder):
    tokenizer = of_words(decoder)
    whole_ids = st.integers(0, len(WORDS) - 1).filter(lambda id_: not WORDS[id_].startswith("<0x"))

    @given(st.lists(whole_ids, max_size=6), st.lists(st.integers(0, len(WORDS) - 1), max_size=12))
    def check(before: list[int], ids: list[int]):
        assert tokenizer.decode(before) + join(tokenizer.detokenizer(before), ids) == tokenizer.decode(before + ids)

    check()


def test_what_is_not_byte_level_streams_too():
    detokenizer = of_words(decoders.Metaspace()).detokenizer()
    assert [detokenizer.push(id_) for id_ in (0, 1, 2, 3)] == ["He", "llo", " wor", "ld"]


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


@pytest.mark.parametrize(("then", "out", "start"), [("c", "", 1), ("d", "a", 2)])
def test_an_earlier_occurrence_is_waited_for_until_a_later_character_settles_which_it_is(then, out, start):
    finder = StopStrings(["b", "abc"])
    assert finder.push("xab") == "x"
    assert (finder.hit.start, finder.ended) == (2, False)
    assert finder.push(then) == out
    assert (finder.hit.start, finder.hit.end, finder.ended) == (start, start + (3 if start == 1 else 1), True)
    assert finder.push("more") == finder.flush() == ""
