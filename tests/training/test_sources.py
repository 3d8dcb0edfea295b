"""What `--data` names: shares of several data sets, rows held out, and rows that a resumed run finds again."""

from collections import Counter

import pytest

from colaserve_services.errors import UsageError
from colaserve_training.rows import ListSource, MixedSource, Row
from colaserve_training.sources import Reader


def source(first, count):
    return ListSource([Row((first + k,)) for k in range(count)], 0)


def ids(rows):
    return [row.ids[0] for row in rows]


def test_weights_are_shares_of_the_rows_and_each_set_goes_round_by_itself():
    mixed = MixedSource([source(0, 3), source(100, 50)], [1, 4], seed=0)
    seen = [id_ for step in range(250) for id_ in ids(mixed.rows(step, 8))]  # two periods
    counts = Counter(id_ < 100 for id_ in seen)
    assert counts == {True: 400, False: 1600}
    repeats = Counter(seen)
    assert {repeats[id_] for id_ in range(100, 150)} == {32}
    assert max(repeats[id_] for id_ in range(3)) - min(repeats[id_] for id_ in range(3)) <= 1


def test_a_step_has_the_same_rows_whatever_came_before():
    one, two = (MixedSource([source(0, 3), source(100, 50)], [1, 2.5], seed=4) for _ in range(2))
    steps = [one.rows(step, 6) for step in range(9)]
    assert two.rows(8, 6) == steps[8]
    assert all(len(rows) == 6 for rows in steps)


def test_a_weight_too_small_to_count_is_refused():
    with pytest.raises(UsageError, match="at least one row in 1,000 of each"):
        MixedSource([source(0, 3), source(9, 3)], [1, 10_000], seed=0)


@pytest.fixture
def reader(words):
    def make(held_out=0.1, seed=0, tell=lambda line: None):
        return Reader(words, 64, 0, seed, False, held_out, tell)

    return make


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(f"river {k}" for k in range(60)))
    return str(path)


def test_held_out_rows_are_never_trained(reader, text):
    said = []
    data = reader(tell=said.append).read([text])
    trained = {row for step in range(20) for row in data.source.rows(step, 8)}
    assert len(data.held_out) == 6
    assert len(trained) == 54
    assert trained.isdisjoint(data.held_out)
    assert "60 rows" in said[0]
    assert "6 rows held out" in said[0]


def test_small_data_and_a_share_of_nothing_hold_nothing_out(reader, text):
    assert reader(0.01).read([text]).held_out == ()
    assert reader(0).read(["demo"]).held_out == ()


def test_sets_are_mixed_with_the_demos_corpus(reader, text):
    data = reader().read([f"{text}=3", "demo=1"])
    own = set(reader().read([text]).source.rows(0, 54))
    rows = [row for step in range(10) for row in data.source.rows(step, 100)]
    assert sum(row in own for row in rows) == 750
    assert len(data.held_out) == 6 + 64


def test_the_digest_is_that_of_rows_weights_and_what_is_held_out(reader, text, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("a river")
    variants = [[text], [str(other)], [f"{text}=1", f"{other}=1"], [f"{text}=1", f"{other}=2"], []]
    digests = [reader().read(data).digest for data in variants] + [reader(0.2).read([text]).digest]
    assert len(set(digests)) == len(digests)
    assert reader().read([text]).digest == digests[0]


def test_a_name_with_an_equals_sign_is_a_name(reader, tmp_path):
    path = tmp_path / "lr=2"
    path.write_text("a river")
    reader().read([str(path)])
    with pytest.raises(UsageError, match="none=x: "):
        reader().read(["none=x"])
