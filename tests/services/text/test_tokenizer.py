from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import decoders, models

from colaserve_services.errors import CheckpointError, InvalidRequest
from colaserve_services.text import SpecialIds, Tokenizer
from tests.services.text.small_tokenizers import byte_fallback, metaspace

GOLDEN = Path(__file__).parents[2] / "data/golden/tiny_b4/tokenizer.json"


PLAIN = Tokenizer.open(GOLDEN, 512)


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


def given_ids(pad=None, eos=None, im_end=None) -> SimpleNamespace:
    """Those of a generation_config.json."""
    return SimpleNamespace(pad_token_id=pad, eos_token_id=eos, im_end_token_id=im_end)


def test_special_ids_are_given_or_those_of_the_release_or_looked_up_and_end_a_text():
    assert PLAIN.special == SpecialIds(pad=2, end_of_text=0, im_end=1)
    assert PLAIN.special.end == {0, 1}
    assert SpecialIds.find(lambda _: None, 100_278) == SpecialIds(100_277, 100_257, 100_265)
    assert Tokenizer.open(GOLDEN, 512, given_ids(7, 8)).special == SpecialIds(7, 8, 1)
    assert Tokenizer.open(GOLDEN, 512, given_ids(7, (8, 9))).special.end == {8, 9, 1}
    assert PLAIN.encode("a<|im_end|>")[-1] == 1
    assert [PLAIN.before_end(ids) for ids in ([5, 6, 1, 7], [2], [5])] == [[5, 6], [], [5]]


@pytest.mark.parametrize("ids", [given_ids(pad=512), given_ids(eos=(8, 512)), given_ids(im_end=-1)])
def test_a_special_id_outside_the_vocabulary_is_refused(ids: SimpleNamespace):
    with pytest.raises(CheckpointError, match=r"id (512|-1) .* outside of the model's vocabulary of 512"):
        Tokenizer.open(GOLDEN, 512, ids)


def test_a_missing_pad_token_is_one_clear_line_and_missing_end_tokens_end_nothing(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"has no '<\|pad\|>' token.*generation_config") as caught:
        Tokenizer.open(saved(tmp_path, "<|endoftext|>"))
    assert "\n" not in str(caught.value)
    assert Tokenizer.open(saved(tmp_path, "<|pad|>")).special.end == frozenset()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "git-lfs pointer"),
        (b"<!DOCTYPE html><html>", "HTML page"),
        *[(content, "is no tokenizer") for content in (b"", b"{}", b"\xff\xfe", b'{"model": 3}')],
    ],
)
def test_what_is_no_tokenizer_is_one_clear_line(content: bytes | None, message: str, tmp_path: Path):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"tokenizer\.json.*{message}") as caught:
        Tokenizer.open(path)
    assert "\n" not in str(caught.value)


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40))
@example("a<|im_end|>")
def test_any_text_comes_back_and_never_has_fewer_tokens_than_its_length_implies(text: str):
    ids = PLAIN.encode(text)
    assert PLAIN.decode(ids) == text
    assert PLAIN.fewest_tokens(text) <= len(ids)
    assert PLAIN.fewest_tokens("a" * 1_000_000) > 10_000


def test_an_id_that_the_model_lacks_is_refused_with_the_field():
    with pytest.raises(InvalidRequest, match=r"prompt: token id \d+ at 0 .* expected 0 to 9"):
        Tokenizer.open(GOLDEN, 10).encode("zz", "prompt")


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


def test_the_text_of_an_id_alone_is_what_it_decodes_to():
    assert all(PLAIN.token_text(id_) == PLAIN.decode([id_]) for id_ in range(512))
    assert "\N{REPLACEMENT CHARACTER}" in "".join(map(PLAIN.token_text, PLAIN.encode("😀")))
