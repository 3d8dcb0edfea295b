"""Latents: a value that keeps its space through slicing, joining, files and messages."""

import copy
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from colaserve.v1 import types_pb2
from colaserve_client import InvalidRequest, Latents, ModelMismatch, load_latents, save_latents
from colaserve_client.arrays import array_from_tensor

SPACE = "0123456789abcdef"
finite = st.floats(-1e4, 1e4, width=32)
arrays = npst.arrays(np.float32, st.tuples(st.integers(0, 9), st.integers(1, 4)), elements=finite)


def tensor(dtype: int, shape: list[int], data: bytes) -> types_pb2.Tensor:
    return types_pb2.Tensor(dtype=dtype, shape=shape, data=data)


@given(arrays, st.integers(1, 5))
def test_blocks_joined_are_the_whole(values: np.ndarray, size: int) -> None:
    latents = Latents(values, SPACE)
    blocks = list(latents.blocks(size))
    assert all(len(block) == size for block in blocks[:-1])
    assert not blocks or Latents.concat(blocks) == latents


@given(arrays)
def test_a_message_brings_back_the_same_and_takes_no_more_than_servers_do(values: np.ndarray) -> None:
    latents = Latents(values, SPACE)
    again = Latents.from_proto(types_pb2.Latents.FromString(latents.to_proto().SerializeToString()))
    assert again == latents
    assert hash(again) == hash(latents)
    assert Latents([[-1e4, 1e4]]).to_proto()
    with pytest.raises(InvalidRequest, match=r"latents.values: got 1e\+20 at \[1, 0\], expected -10000 to 10000"):
        Latents([[0, 1], [1e20, 3]]).to_proto()


def test_a_file_brings_back_the_same(tmp_path: Path) -> None:
    latents = Latents(np.random.default_rng(0).normal(size=(5, 3)), SPACE)
    latents.save(tmp_path / "one.safetensors")
    assert Latents.load(tmp_path / "one.safetensors") == latents
    several = {"a": latents[:2], "b": latents[2:3]}
    save_latents(tmp_path / "two.safetensors", several)
    assert load_latents(tmp_path / "two.safetensors") == several
    with pytest.raises(InvalidRequest, match=r"expected one sequence .* got 2"):
        Latents.load(tmp_path / "two.safetensors")
    (tmp_path / "text").write_text("hello, I am a text")
    with pytest.raises(InvalidRequest, match="no safetensors file"):
        load_latents(tmp_path / "text")


def test_slices_keep_their_space_and_everything_is_read_only() -> None:
    source = np.arange(8, dtype=np.float32).reshape(4, 2)
    latents = Latents(source, SPACE)
    source[0, 0] = 9
    assert (latents.shape, latents.values[0, 0], latents[-1:].space) == ((4, 2), 0, SPACE)
    assert latents[1].values.tolist() == latents[np.int64(1)].values.tolist() == [[2, 3]]
    assert [len(each) for each in latents] == [1, 1, 1, 1]
    with pytest.raises(IndexError):
        latents[4]
    latents.numpy()[0, 0] = 9
    for copied in (latents, pickle.loads(pickle.dumps(latents)), copy.deepcopy(latents)):
        assert copied == latents
        with pytest.raises(ValueError, match="read-only"):
            copied.values[0, 0] = 1


def test_latents_of_different_spaces_do_not_join() -> None:
    here, there, anywhere = (Latents(np.zeros((1, 2)), space) for space in (SPACE, "f" * 16, ""))
    for together in (lambda: Latents.concat([here, there]), lambda: here + there, lambda: here.slerp(there, 0.5)):
        with pytest.raises(ModelMismatch, match=f"{SPACE}, {'f' * 16}"):
            together()
    assert Latents.concat([anywhere, here]).space == (anywhere + here).space == SPACE
    with pytest.raises(ModelMismatch, match="channels"):
        Latents.concat([here, Latents(np.zeros((1, 3)), SPACE)])
    with pytest.raises(InvalidRequest, match="got none"):
        Latents.concat([])


@given(arrays, st.floats(0.5, 4, width=32))
def test_arithmetic_is_that_of_the_numbers_and_keeps_the_space(values: np.ndarray, number: float) -> None:
    latents = Latents(values, SPACE)
    for made, expected in (
        (latents + latents, values + values),
        (latents - number, values - np.float32(number)),
        (number - latents, np.float32(number) - values),
        (latents * number, values * np.float32(number)),
        (np.float64(number) * latents, values * np.float32(number)),
        (latents / number, values / np.float32(number)),
        (values + latents, values + values),
        (-latents, -values),
        (sum([latents, latents]), values + values),
    ):
        assert isinstance(made, Latents)
        assert made.space == SPACE
        np.testing.assert_array_equal(made.values, expected)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("calculate", "complaint"),
    [
        (lambda latents: latents / 0, "finite"),
        (lambda latents: latents * 1e300, "finite"),
        (lambda latents: latents + np.ones((2, 2)), r"\(3, 2\) and \(2, 2\)"),
        (lambda latents: latents * np.ones((4, 3, 2)), r"shape \(4, 3, 2\)"),
        (lambda latents: latents * "two", "expected numbers"),
        (lambda latents: latents + None, "expected numbers"),
        (lambda latents: latents.slerp([[1.0, 2.0]], 0.5), r"got shape \(1, 2\), expected \(3, 2\)"),
    ],
)
def test_what_gives_no_latents_is_refused(calculate: Callable[[Latents], object], complaint: str) -> None:
    with pytest.raises(InvalidRequest, match=complaint):
        calculate(Latents(np.ones((3, 2)), SPACE))


def test_normalized_positions_have_length_one() -> None:
    made = Latents([[3, 4], [0, 0], [0, -2]], SPACE).normalized()
    np.testing.assert_allclose(made.values, [[0.6, 0.8], [0, 0], [0, -1]], rtol=1e-6)
    assert made.space == SPACE


@given(st.floats(0, 1))
def test_slerp_turns_at_a_constant_speed(weight: float) -> None:
    made = Latents([[1, 0], [0, 2]], SPACE).slerp(Latents([[0, 1], [0, 2]]), weight)
    angle = weight * np.pi / 2
    np.testing.assert_allclose(made.values, [[np.cos(angle), np.sin(angle)], [0, 2]], atol=1e-5)
    assert made.space == SPACE


def test_numbers_are_seen_in_the_repr_and_in_notebooks() -> None:
    small, large = Latents([[0.5, -1.25]], SPACE), Latents(np.ones((500, 20)))
    assert repr(small) == f"Latents([[ 0.5 , -1.25]], n=1, d=2, space='{SPACE}')"
    assert "..." in repr(large)
    assert len(repr(large)) < 400
    assert all(shown in small._repr_html_() for shown in ("<td>0.5</td>", "<td>-1.25</td>", SPACE))
    assert large._repr_html_().count("<tr>") == 16


def test_operands_broadcast_as_in_numpy_and_other_spaces_or_numbers_are_not_equal() -> None:
    ones = Latents(np.ones((3, 2)), SPACE)
    assert (ones + np.array([[1, 2]])).values.tolist() == [[2, 3]] * 3
    assert (1 / (ones * 4)).values.tolist() == [[0.25, 0.25]] * 3
    latents = Latents(np.zeros((1, 2)), SPACE)
    assert latents != Latents(np.zeros((1, 2)))
    assert latents != Latents(np.ones((1, 2)), SPACE)
    assert latents != "latents"
    assert hash(Latents([[0.0]])) == hash(Latents([[-0.0]]))


@pytest.mark.parametrize(
    ("values", "complaint"),
    [([1.0, 2.0], "shape"), ([[float("nan")]], "NaN"), ("words", "numbers"), ([[1.0], [1.0, 2.0]], "numbers")],
)
def test_what_is_no_array_of_latents_is_refused(values: object, complaint: str) -> None:
    with pytest.raises(InvalidRequest, match=complaint) as caught:
        Latents(values)  # type: ignore[arg-type]
    assert caught.value.field == "latents"


VALUES = np.array([[1.5, -2.0], [0.25, 1024.0]], np.float32)


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        (tensor(types_pb2.DATA_TYPE_FLOAT32, [2, 2], VALUES.tobytes()), ""),
        (tensor(types_pb2.DATA_TYPE_FLOAT16, [2, 2], VALUES.astype("<f2").tobytes()), ""),
        (tensor(types_pb2.DATA_TYPE_BFLOAT16, [2, 2], (VALUES.view("<u4") >> 16).astype("<u2").tobytes()), ""),
        (tensor(types_pb2.DATA_TYPE_UNSPECIFIED, [1], b"1234"), "dtype 0"),
        (tensor(types_pb2.DATA_TYPE_FLOAT32, [2], b"1234"), "needs 8 bytes, got 4"),
        (tensor(types_pb2.DATA_TYPE_BFLOAT16, [1], b"1234"), "needs 2 bytes, got 4"),
    ],
)
def test_a_tensor_of_any_type_is_read_unless_its_parts_do_not_fit(message: types_pb2.Tensor, complaint: str) -> None:
    with pytest.raises(InvalidRequest, match=complaint) if complaint else nullcontext():
        np.testing.assert_array_equal(array_from_tensor(message), VALUES)
