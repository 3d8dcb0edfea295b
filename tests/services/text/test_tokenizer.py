from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models

from colaserve_services.errors import CheckpointError, InvalidRequest
from colaserve_services.text import SpecialIds, Tokenizer
from tests.services.text.small_tokenizers import byte_fallback, metaspace

GOLDEN = Path(__file__).parents[2] / "data/golden/tiny_b4/tokenizer.json"


PLAIN = Tokenizer.open(GOLDEN, 512)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.open(GOLDEN, 512)


def saved(tmp_path: Path, *special: str) -> Path:
    library = tokenizers.Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(list(special))
    library.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_truncation_and_padding_of_the_file_do_not_touch_a_text(tmp_path: Path):
    library = tokenizers.Tokenizer.from_file(str(GOLDEN))
    texts, fields = ["he looked at the sea", "he"], ["a", "b"]
    library.enable_truncation(2)
    library.enable_padding(length=5)
    library.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.open(tmp_path / "tokenizer.json", 512).encode_all(texts, fields) == PLAIN.encode_all(texts, fields)


def test_special_ids_are_looked_up_when_the_vocabulary_is_not_the_releases(tokenizer: Tokenizer):
    assert tokenizer.special == SpecialIds(pad=2, end_of_text=0, im_end=1)
    assert tokenizer.special.end == {0, 1}


def test_special_ids_of_the_release_hold_for_its_vocabulary_size():
    special = SpecialIds.find(lambda _: None, 100_278)
    assert special == SpecialIds(100_277, 100_257, 100_265)


def test_generation_config_overrides_special_ids():
    defaults = SimpleNamespace(pad_token_id=7, eos_token_id=8, im_end_token_id=None)
    assert Tokenizer.open(GOLDEN, 512, defaults).special == SpecialIds(7, 8, 1)


def test_several_ids_may_end_a_text():
    defaults = SimpleNamespace(pad_token_id=7, eos_token_id=(8, 9), im_end_token_id=None)
    assert Tokenizer.open(GOLDEN, 512, defaults).special.end == {8, 9, 1}
    with pytest.raises(CheckpointError, match=r"id 512 .* outside"):
        Tokenizer.open(GOLDEN, 512, SimpleNamespace(eos_token_id=(8, 512)))


@pytest.mark.parametrize(
    ("content", "message"),
    [("version https://git-lfs.github.com/spec/v1\noid", "git-lfs pointer"), ("<!DOCTYPE html><html>", "HTML page")],
)
def test_what_came_in_place_of_a_tokenizer_is_named(content: str, message: str, tmp_path: Path):
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(CheckpointError, match=message):
        Tokenizer.open(path)


def test_a_missing_pad_token_is_one_clear_line(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"has no '<\|pad\|>' token.*generation_config") as caught:
        Tokenizer.open(saved(tmp_path, "<|endoftext|>"))
    assert "\n" not in str(caught.value)


def test_missing_end_tokens_end_nothing(tmp_path: Path):
    assert Tokenizer.open(saved(tmp_path, "<|pad|>")).special.end == frozenset()


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xfe", b'{"model": 3}'])
def test_a_file_that_is_no_tokenizer_is_one_clear_line(tmp_path: Path, content: bytes):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json") as caught:
        Tokenizer.open(tmp_path / "tokenizer.json")
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_one_clear_line(tmp_path: Path):
    with pytest.raises(CheckpointError, match="no such file"):
        Tokenizer.open(tmp_path / "tokenizer.json")


def test_a_special_id_outside_the_vocabulary_is_refused():
    with pytest.raises(CheckpointError, match="outside of the model's vocabulary of 512"):
        Tokenizer.open(GOLDEN, 512, SimpleNamespace(pad_token_id=512))


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40))
def test_any_text_comes_back(text: str):
    tokenizer = Tokenizer.open(GOLDEN, 512)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_text_of_a_special_token_becomes_its_id(tokenizer: Tokenizer):
    ids = tokenizer.encode("a<|im_end|>")
    assert ids[-1] == 1
    assert tokenizer.decode(ids) == "a<|im_end|>"


def test_an_id_that_the_model_lacks_is_refused_with_the_field():
    with pytest.raises(InvalidRequest, match=r"prompt: token id \d+ at 0 .* expected 0 to 9"):
        Tokenizer.open(GOLDEN, 10).encode("zz", "prompt")


def test_a_text_ends_before_the_first_end_or_pad_id(tokenizer: Tokenizer):
    assert tokenizer.before_end([5, 6, 1, 7]) == [5, 6]
    assert tokenizer.before_end([2]) == []
    assert tokenizer.before_end([5]) == [5]


def test_the_text_of_half_a_character_is_a_replacement_character(tokenizer: Tokenizer):
    assert [tokenizer.token_text(id_) for id_ in tokenizer.encode("a")] == ["a"]
    assert "\N{REPLACEMENT CHARACTER}" in "".join(map(tokenizer.token_text, tokenizer.encode("😀")))


@pytest.mark.parametrize(
    ("library", "words", "texts"),
    [
        (metaspace(), ["▁the", "▁sea", "s", "▁the"], ["the", " sea", "s", " the"]),
        (byte_fallback(), ["▁the", "▁sea", "s", "<0x21>", "▁the"], ["the", " sea", "s", "!", " the"]),
        (byte_fallback(), ["▁sea", "<0xC3>", "<0xA9>", "s"], ["sea", "\ufffd", "\ufffd", "s"]),
    ],
)
def test_a_token_reads_as_it_does_in_its_text(library: tokenizers.Tokenizer, words: list[str], texts: list[str]):
    tokenizer = Tokenizer(library, library.get_vocab_size(), SpecialIds(library.token_to_id("<|pad|>")))
    ids = [library.token_to_id(word) for word in words]
    assert tokenizer.token_texts(ids) == texts
    if "\ufffd" not in texts:
        assert "".join(texts) == tokenizer.decode(ids)


def test_the_text_of_an_id_alone_is_what_it_decodes_to(tokenizer: Tokenizer):
    assert all(tokenizer.token_text(id_) == tokenizer.decode([id_]) for id_ in range(512))


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40))
def test_a_text_never_has_fewer_tokens_than_its_length_tells(text: str):
    assert PLAIN.fewest_tokens(text) <= len(PLAIN.encode(text))


def test_a_long_text_is_told_by_its_length_alone():
    assert PLAIN.fewest_tokens("a" * 1_000_000) > 10_000
