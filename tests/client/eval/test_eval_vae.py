"""`eval vae`: how much survives the round trip, every token counting the same."""

import json

import pytest

from colaserve_eval.demo import held_out_texts
from colaserve_eval.measures import BATCH_CHARACTERS, BATCH_TEXTS, batched


def test_accuracy_and_bits_are_means_over_tokens_of_all_texts(colaserve_eval, tmp_path):
    file = tmp_path / "texts.txt"
    file.write_text("abcd\n\nxx\né\n")
    result = colaserve_eval("vae", file, "--json", "--output", tmp_path / "out")
    assert result.code == 0, result.err
    figures = {
        "texts": 3,
        "exact_texts": 2,
        "tokens": 7,
        "token_accuracy": round(100 * 5 / 7, 4),
        "bits_per_token": round((5 * 0.5 + 2 * 2.0) / 7, 6),
        "bits_per_byte": round((5 * 0.5 + 2 * 2.0) / 8, 6),
    }
    assert result.json == figures
    assert json.loads((tmp_path / "out" / "vae.json").read_text()) == figures


def test_texts_of_a_jsonl_file_may_hold_newlines(client, colaserve_eval, tmp_path):
    file = tmp_path / "texts.jsonl"
    file.write_text('{"text": "a\\nb"}\n{"text": "c"}\n')
    lines = [line.split() for line in colaserve_eval("vae", file).out.splitlines()]
    assert ["tokens", "4"] in lines


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": ""}', "a.jsonl:1: text: expected a string that is not empty, got ''"),
        ("a.jsonl", b'{"prompt": "p"}', "a.jsonl:1: text: expected"),
        ("a.txt", b"\n \n", "holds no text"),
    ],
)
def test_bad_texts_are_refused(client, colaserve_eval, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    result = colaserve_eval("vae", tmp_path / name)
    assert result.code == 1
    assert message in result.err
    assert client.asked == []


def test_batches_keep_the_order_and_both_bounds():
    texts = ["a" * (BATCH_CHARACTERS + 1), *["b" * 10] * (BATCH_TEXTS + 1), "c" * BATCH_CHARACTERS]
    found = list(batched(texts))
    assert [text for batch in found for text in batch] == texts
    assert [len(batch) for batch in found] == [1, BATCH_TEXTS, 1, 1]


def test_the_demos_held_out_questions_serve_as_held_out_text(colaserve_eval):
    result = colaserve_eval("vae", "--demo", "--limit", 50, "--json")
    assert result.json["texts"] == 50
    assert all(" Answer: " in text for text in held_out_texts())
    for wrong in ([], ["--demo", __file__]):
        assert "give a file of texts, or --demo alone" in colaserve_eval("vae", *wrong).err
