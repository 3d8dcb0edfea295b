"""Files to train on: what is unusable is one clear line, what is left out is counted."""

import json

import pytest

from colaserve_services.errors import UsageError
from colaserve_training.data import read_dataset
from colaserve_training.rows import ListSource, Row, micro_batches


def read(tmp_path, words, name, content, context=64):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_dataset([path], words, context, end_id=0)


def lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "a.txt: the file is empty"),
        ("a.txt", b" \n\n", "a.txt: the file is empty"),
        ("a.txt", b"fine\nbad \xe9 byte", "a.txt:2: byte 0xe9 is not UTF-8; convert it to UTF-8 first"),
        ("a.jsonl", '{"text": "x"}\n{"text": \n', r"a.jsonl:2: not JSON: Expecting value at column 10"),
        ("a.jsonl", '{"text": "x"}\n' + "[" * 100_000, "a.jsonl:2: JSON is nested more than 100 levels deep"),
        ("a.jsonl", '{"text": "\\ud800"}\n', "a.jsonl:1: half of a surrogate pair"),
        ("a.jsonl", "[1]\n", "a.jsonl:1: got list, expected an object"),
        ("a.jsonl", '{"prompt": "x"}\n', "a.jsonl:1: response: got nothing, expected a string"),
        ("a.jsonl", '{"text": 3}\n', "a.jsonl:1: text: got int, expected a string"),
        ("a.jsonl", lines({"text": " "}), "nothing to train on .*1 empty left out"),
        ("a.jsonl", lines({"prompt": "a" * 99, "response": "b"}), "nothing to train on .*1 pairs over 64 tokens"),
    ],
)
def test_unusable_data_is_one_line_that_names_the_place(tmp_path, words, name, content, message):
    with pytest.raises(UsageError, match=message) as raised:
        read(tmp_path, words, name, content)
    assert "\n" not in str(raised.value)


def test_a_missing_file_is_named(tmp_path, words):
    with pytest.raises(UsageError, match=r"none.txt: No such file"):
        read_dataset([tmp_path / "none.txt"], words, 64, 0)


def test_what_is_left_out_or_cut_is_counted_and_nothing_else_is_lost(tmp_path, words):
    records = [
        {"prompt": "the capital", "response": " is Paris"},
        {"prompt": "", "response": ""},
        {"prompt": "x" * 80, "response": "too long"},
        {"text": "y" * 150},
    ]
    data = read(tmp_path, words, "a.jsonl", lines(*records))
    assert (len(data.rows), data.empty, data.too_long, data.cut) == (4, 1, 1, 1)
    pair = data.rows[0]
    assert words.decode(list(pair.ids[: pair.prompt])) == "the capital"
    assert words.decode(list(pair.ids[pair.prompt : -1])) == " is Paris"
    assert pair.ids[-1] == 0
    assert words.decode([id_ for row in data.rows[1:] for id_ in row.ids]) == "y" * 150
    assert data.summary().startswith("data: 4 rows, ")
    assert "1 empty left out, 1 pairs over 64 tokens left out, 1 longer texts cut" in data.summary()


def test_paragraphs_of_a_text_file_are_rows(tmp_path, words):
    data = read(tmp_path, words, "a.txt", "\ufeffone river\n\ntwo rivers\nrun\n")
    assert [words.decode(list(row.ids)) for row in data.rows] == ["one river", "two rivers\nrun"]
    assert {row.prompt for row in data.rows} == {0}


def test_newlines_alone_end_a_line_and_carriage_returns_before_them_belong_to_it(tmp_path, words):
    data = read(tmp_path, words, "a.txt", "one\r\n\r\ntwo\r\nlines\r\n\r\n\r\nthree")
    assert [words.decode(list(row.ids[:-1])) for row in data.rows] == ["one", "two\nlines", "three"]
    data = read(tmp_path, words, "a.jsonl", '{"text": "a\u2028b\u0085c"}\r\n{"text": "d"}\r\n')
    assert [words.decode(list(row.ids[:-1])) for row in data.rows] == ["a\u2028b\u0085c", "d"]


def test_every_row_comes_once_an_epoch_in_an_order_that_the_seed_decides():
    items = [Row((k,)) for k in range(10)]
    source, other = ListSource(items, 1), ListSource(items, 2)
    epochs = [[row.ids[0] for step in range(start, start + 5) for row in source.rows(step, 2)] for start in (0, 5)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 2
    assert epochs[0] != epochs[1]
    assert source.rows(3, 2) == source.rows(3, 2)
    assert [row for step in range(5) for row in other.rows(step, 2)] != [items[k] for k in epochs[0]]


def test_micro_batches_hold_rows_of_like_length_and_lose_none():
    rows = [Row(tuple(range(k))) for k in (5, 2, 9, 1, 7, 3)]
    groups = micro_batches(rows, 3)
    assert [[len(row.ids) for row in group] for group in groups] == [[1, 2], [3, 5], [7, 9]]
