"""Files to train on, and what `--data` names: what is unusable is one clear line, what is left out is counted."""

import json
from collections import Counter

import pytest

from colaserve_services.errors import UsageError
from colaserve_training.data import Reader
from colaserve_training.rows import ListSource, MixedSource, Row, micro_batches


@pytest.fixture
def reader(words):
    def make(held_out=0.0, say=lambda line: None):
        return Reader(words, 64, 0, 0, False, held_out, say)

    return make


@pytest.fixture
def read(reader, tmp_path):
    """The rows of a file in the first epoch, as a set, and what was said."""

    def make(name, content):
        path, said = tmp_path / name, []
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        source = reader(say=said.append).read([str(path)]).source
        return source.items, said

    return make


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(f"river {k}" for k in range(60)))
    return str(path)


def lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "a.txt: the file is empty"),
        ("a.txt", b" \n\n", "a.txt: the file is empty"),
        ("a.txt", b"fine\nbad \xe9 byte", "a.txt:2: byte 0xe9 is not UTF-8; convert it to UTF-8 first"),
        ("a.jsonl", '{"text": "x"}\n{"text": \n', r"a.jsonl:2: not JSON: Expecting value at column 10"),
        ("a.jsonl", "[1]\n", "a.jsonl:1: got list, expected an object"),
        ("a.jsonl", '{"prompt": "x"}\n', "a.jsonl:1: response: got nothing, expected a string"),
        ("a.jsonl", '{"text": 3}\n', "a.jsonl:1: text: got int, expected a string"),
        ("a.jsonl", lines({"text": " "}), "nothing to train on .*1 empty left out"),
        ("a.jsonl", lines({"prompt": "a" * 99, "response": "b"}), "nothing to train on .*1 pairs over 64 tokens"),
    ],
)
def test_unusable_data_is_one_line_that_names_file_and_line(read, name, content, message):
    with pytest.raises(UsageError, match=f"^[^\n]*{message}[^\n]*$"):
        read(name, content)


def test_what_is_left_out_or_cut_is_counted_and_nothing_else_is_lost(read, words):
    records = [
        {"prompt": "the capital", "response": " is Paris"},
        {"prompt": "", "response": ""},
        {"prompt": "x" * 80, "response": "too long"},
        {"text": "y" * 150},
    ]
    (pair, *rest), said = read("a.jsonl", lines(*records))
    assert words.decode(list(pair.ids[: pair.prompt])) == "the capital"
    assert words.decode(list(pair.ids[pair.prompt : -1])) == " is Paris"
    assert pair.ids[-1] == 0
    assert words.decode([id_ for row in rest for id_ in row.ids]) == "y" * 150
    assert said[0].startswith("data: 4 rows, ")
    assert "1 empty left out, 1 pairs over 64 tokens left out, 1 longer texts cut" in said[0]


@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        ("a.txt", "\ufeffone river\n\ntwo rivers\nrun\n", ["one river", "two rivers\nrun"]),
        ("a.txt", "one\r\n\r\ntwo\r\nlines\r\n\r\n\r\nthree", ["one", "two\nlines", "three"]),
        ("a.jsonl", '{"text": "a\u2028b\u0085c"}\r\n{"text": "d"}\r\n', ["a\u2028b\u0085c", "d"]),
    ],
)
def test_paragraphs_of_text_and_lines_of_json_are_rows(read, words, name, content, texts):
    """Only newlines end a line, with or without a carriage return before them."""
    rows, _ = read(name, content)
    assert [words.decode(list(row.ids[:-1])) for row in rows] == texts
    assert {row.prompt for row in rows} == {0}


def test_held_out_rows_are_never_trained(reader, text):
    said = []
    data = reader(0.1, said.append).read([text])
    trained = {row for step in range(20) for row in data.source.rows(step, 8)}
    assert (len(data.held_out), len(trained)) == (6, 54)
    assert trained.isdisjoint(data.held_out)
    assert "60 rows" in said[0]
    assert "6 rows held out" in said[1]
    assert reader(0.01).read([text]).held_out == reader(0.0).read(["demo"]).held_out == ()
    with pytest.raises(UsageError, match="none=x: No such file"):
        reader().read(["none=x"])


def test_files_are_mixed_with_the_demos_corpus(reader, text):
    data = reader(0.1).read([f"{text}=3", "demo=1"])
    own = set(reader(0.1).read([text]).source.rows(0, 54))
    rows = [row for step in range(10) for row in data.source.rows(step, 100)]
    assert sum(row in own for row in rows) == 750
    assert len(data.held_out) == 6 + 64


def test_the_digest_is_that_of_rows_weights_and_what_is_held_out(reader, text, tmp_path):
    other = tmp_path / "other=2"  # a name with an equals sign is a name
    other.write_text("a river")
    variants = [[text], [str(other)], [f"{text}=1", f"{other}=1"], [f"{text}=1", f"{other}=2"], []]
    digests = [reader().read(data).digest for data in variants] + [reader(0.2).read([text]).digest]
    assert len(set(digests)) == len(digests)
    assert reader().read([text]).digest == digests[0]


def numbered(first, count):
    return ListSource([Row((first + k,)) for k in range(count)], 0)


def ids(rows):
    return [row.ids[0] for row in rows]


@pytest.mark.parametrize("weights", [[1, 4, 1e-3], [0.1, 0.2, 0.7]])
def test_weights_are_shares_of_the_rows_after_any_number_and_each_set_is_repeated_by_itself(weights):
    sizes = (3, 50, 7)
    mixed = MixedSource([numbered(100 * k, size) for k, size in enumerate(sizes)], weights)
    seen = []
    for step in range(250):
        rows = mixed.rows(step, 8)
        assert len(rows) == 8
        seen += ids(rows)
        for k, weight in enumerate(weights):
            assert abs(sum(id_ // 100 == k for id_ in seen) - len(seen) * weight / sum(weights)) < 3
    repeats = Counter(seen)
    for k, size in enumerate(sizes):
        times = [repeats[100 * k + item] for item in range(size)]
        assert max(times) - min(times) <= 1
    assert mixed.rows(8, 8) == mixed.rows(8, 8)


def test_every_row_comes_once_an_epoch_in_an_order_that_the_seed_decides():
    items = [Row((k,)) for k in range(10)]
    source, other = ListSource(items, 1), ListSource(items, 2)
    epochs = [[id_ for step in range(start, start + 5) for id_ in ids(source.rows(step, 2))] for start in (0, 5)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 2
    assert epochs[0] != epochs[1]
    assert source.rows(3, 2) == source.rows(3, 2)
    assert [id_ for step in range(5) for id_ in ids(other.rows(step, 2))] != epochs[0]


def test_micro_batches_hold_rows_of_like_length_and_lose_none():
    groups = micro_batches([Row(tuple(range(k))) for k in (5, 2, 9, 1, 7, 3)], 3)
    assert [[len(row.ids) for row in group] for group in groups] == [[1, 2], [3, 5], [7, 9]]
