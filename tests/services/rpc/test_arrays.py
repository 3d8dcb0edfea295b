import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of

from colaserve.v1 import types_pb2
from colaserve_services.errors import InvalidRequest, ModelMismatch
from colaserve_services.rpc import arrays

FLOATS = arrays_of.arrays(
    np.float32,
    arrays_of.array_shapes(min_dims=0, max_dims=3, min_side=0),
    elements={"min_value": -10_000, "max_value": 10_000},
)


@given(FLOATS)
@example(np.array([-10_000, 10_000], np.float32))
def test_float32_goes_through_unchanged(array):
    message = arrays.to_message(array)
    back = arrays.from_message(types_pb2.Tensor.FromString(message.SerializeToString()), "x", array.shape)
    np.testing.assert_array_equal(back, array)
    back[...] = 0  # writable


@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "BFLOAT16"), (torch.float16, "FLOAT16")])
def test_half_precision_is_widened_exactly(dtype, name):
    values = torch.randn(5, 3).to(dtype)
    data = values.view(torch.uint16).numpy().astype("<u2").tobytes()
    message = types_pb2.Tensor(dtype=f"DATA_TYPE_{name}", shape=[5, 3], data=data)
    np.testing.assert_array_equal(arrays.from_message(message, "x", (5, 3)), values.float())


def test_latents_of_any_layout_go_through_and_those_of_another_space_or_count_do_not():
    values = np.arange(-8, 0, dtype=np.float64).reshape(4, 2).T
    message = arrays.latents_to_message(values, "abc")
    for space in ("abc", ""):
        message.space = space
        np.testing.assert_array_equal(arrays.latents_from_message(message, "x", 4, "abc"), values)
    assert arrays.latents_from_message(types_pb2.Latents(), "z", 3, "a").shape == (0, 3)
    for wrong, kind, said in (
        (types_pb2.Latents(space="other"), ModelMismatch, r"z\.space: got latents of space 'other'"),
        (message, InvalidRequest, r"z\.values\.shape: got \[2, 4\], expected \[4, 4\]"),
        (types_pb2.Latents(), InvalidRequest, r"z\.values\.dtype"),
    ):
        with pytest.raises(kind, match=said):
            arrays.latents_from_message(wrong, "z", 4, "a", positions=4)


def good():
    return arrays.to_message(np.zeros((2, 3), np.float32))


def spoiled(**changes):
    message = good()
    for name, value in changes.items():
        if name == "shape":
            del message.shape[:]
            message.shape.extend(value)
        else:
            setattr(message, name, value)
    return message


NAN = np.array([[0, 1, 2], [3, float("nan"), 5]], np.float32).tobytes()


@pytest.mark.parametrize(
    ("message", "field", "said"),
    [
        (spoiled(dtype=0), "x.dtype", "DATA_TYPE_FLOAT32"),
        (spoiled(dtype=77), "x.dtype", "got 77"),
        (spoiled(shape=[3, 2]), "x.shape", "got [3, 2], expected [any, 3]"),
        (spoiled(shape=[6]), "x.shape", "expected [any, 3]"),
        (spoiled(shape=[2, 3, 1]), "x.shape", "expected [any, 3]"),
        (spoiled(shape=[3, 3]), "x.data", "got 24 bytes"),
        (spoiled(shape=[4294967295, 3]), "x.data", "needs 51539607540"),
        (spoiled(data=b"123"), "x.data", "got 3 bytes"),
        (spoiled(data=b""), "x.data", "got 0 bytes"),
        (spoiled(dtype=2), "x.data", "needs 12"),
        (spoiled(data=NAN), "x.data", "got nan at [1, 1]"),
        (spoiled(data=b"\x00\x00\x80\x7f" * 6), "x.data", "got inf"),
        (arrays.to_message(np.array([[0, 1, 2], [3, 4, 1e20]])), "x.data", "got 1e+20 at [1, 2], expected finite"),
        (arrays.to_message(np.full((1, 3), -10_001)), "x.data", "got -10001 at [0, 0], expected"),
    ],
)
def test_a_tensor_that_does_not_hold_together_is_refused_by_field(message, field, said):
    with pytest.raises(InvalidRequest) as caught:
        arrays.from_message(message, "x", (None, 3))
    assert caught.value.field == field
    assert said in str(caught.value)


@given(
    dtype=st.integers(0, 2**31 - 1), shape=st.lists(st.integers(0, 2**32 - 1), max_size=4), data=st.binary(max_size=64)
)
def test_any_message_gives_an_array_or_a_named_error(dtype, shape, data):
    message = types_pb2.Tensor(dtype=dtype, shape=shape, data=data)
    try:
        array = arrays.from_message(message, "x", (None, 3))
    except InvalidRequest as error:
        named, array = error.field, None
    else:
        named = "x."
    assert named.startswith("x.")
    assert array is None or (array.shape == tuple(shape) and np.isfinite(array).all())
