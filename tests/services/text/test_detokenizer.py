from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models

from colaserve_services.text import Tokenizer
from colaserve_services.text.detokenizer import byte_of_character, join

GOLDEN = Path(__file__).parents[2] / "data/golden"


def with_added(*tokens: str) -> Tokenizer:
    library = tokenizers.Tokenizer.from_file(str(GOLDEN / "tiny_b4/tokenizer.json"))
    library.add_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in tokens])
    return Tokenizer(library, library.get_vocab_size(), PLAIN.special)


PLAIN = Tokenizer.open(GOLDEN / "tiny_b4/tokenizer.json")
EXTENDED = with_added("<|two words|>", "é", "Ġ", "naïve 😀", "\0")


any_id = st.integers(0, EXTENDED.vocab_size + 3) | st.integers(PLAIN.vocab_size, EXTENDED.vocab_size - 1)


@given(st.lists(any_id, max_size=40))
def test_pieces_joined_are_what_the_library_decodes_for_any_ids(ids: list[int]):
    assert join(EXTENDED.detokenizer(), ids) == EXTENDED.decode(ids)


@given(st.binary(max_size=24))
def test_any_bytes_read_as_the_library_reads_them(data: bytes):
    character = {byte: char for char, byte in byte_of_character().items()}
    vocabulary = {char: byte for byte, char in character.items()}
    library = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    library.decoder = decoders.ByteLevel()
    tokenizer = Tokenizer(library, 256, PLAIN.special)
    assert join(tokenizer.detokenizer(), data) == tokenizer.decode(list(data)) == data.decode("utf-8", "replace")


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=30))
def test_a_character_never_comes_in_halves(text: str):
    detokenizer = PLAIN.detokenizer()
    pieces = [detokenizer.push(id_) for id_ in PLAIN.encode(text)]
    assert "".join(pieces) == text
    assert detokenizer.flush() == ""


def test_incomplete_bytes_wait_and_become_a_replacement_character_at_the_end():
    ids = EXTENDED.encode("a😀")
    detokenizer = EXTENDED.detokenizer()
    pieces = [detokenizer.push(id_) for id_ in ids[:-1]]
    assert "".join(pieces) == "a"
    assert detokenizer.flush() == "\N{REPLACEMENT CHARACTER}"


WORDS = ["▁He", "llo", "▁wor", "ld", "##ly", ".", "an</w>", "d</w>", " x"]
WORDS += ["<0xE2>", "<0x82>", "<0xAC>", "<0x41>", "<0xFF>"]
OTHER_DECODERS = [
    decoders.Metaspace(),
    decoders.WordPiece(),
    decoders.BPEDecoder(suffix="</w>"),
    decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]),
    decoders.Sequence([decoders.Replace("l", "L"), decoders.ByteLevel()]),
]


@pytest.mark.parametrize("decoder", OTHER_DECODERS, ids=lambda decoder: type(decoder).__name__)
def test_a_tokenizer_that_is_not_byte_level_decodes_the_same_in_pieces(decoder: decoders.Decoder):
    library = tokenizers.Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="."))
    library.decoder = decoder
    tokenizer = Tokenizer(library, len(WORDS), PLAIN.special)

    @given(st.lists(st.integers(0, len(WORDS) - 1), max_size=12))
    def check(ids: list[int]):
        assert join(tokenizer.detokenizer(), ids) == tokenizer.decode(ids)

    check()


@pytest.mark.parametrize("decoder", OTHER_DECODERS, ids=lambda decoder: type(decoder).__name__)
def test_a_text_goes_on_where_the_ids_before_it_end(decoder: decoders.Decoder):
    library = tokenizers.Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="."))
    library.decoder = decoder
    tokenizer = Tokenizer(library, len(WORDS), PLAIN.special)
    whole_ids = st.integers(0, len(WORDS) - 1).filter(lambda id_: not WORDS[id_].startswith("<0x"))

    @given(st.lists(whole_ids, min_size=1, max_size=6), st.lists(st.integers(0, len(WORDS) - 1), max_size=8))
    def check(before: list[int], ids: list[int]):
        assert tokenizer.decode(before) + join(tokenizer.detokenizer(before), ids) == tokenizer.decode(before + ids)

    check()


def test_the_slower_path_streams_too():
    library = tokenizers.Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="."))
    library.decoder = decoders.Metaspace()
    detokenizer = Tokenizer(library, len(WORDS), PLAIN.special).detokenizer()
    assert [detokenizer.push(id_) for id_ in (0, 1, 2, 3)] == ["He", "llo", " wor", "ld"]
