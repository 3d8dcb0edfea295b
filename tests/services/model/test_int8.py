"""Products of int8: near the product in float64, a row's result its own, and a whole checkpoint served with them."""

import pytest
import torch
from torch.nn import functional as F

from colaserve_services.errors import UsageError
from colaserve_services.launch.stages import pick_dtype
from colaserve_services.model import int8
from colaserve_services.model.checkpoint import Checkpoint
from colaserve_services.model.int8 import Int8Weight
from colaserve_services.model.layers import Linear
from colaserve_services.model.loading import load
from tests.conftest import GOLDEN

CPU = torch.device("cpu")
needs_it = pytest.mark.skipif(int8.missing() is not None, reason=f"no products of int8: {int8.missing()}")


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@needs_it
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gelu", [False, True])
def test_a_product_is_near_the_one_in_float64(dtype: torch.dtype, gelu: bool) -> None:
    for rows, inputs, outputs in ((1, 40, 24), (33, 256, 100), (64, 512, 512)):
        weight, bias, x = drawn(outputs, inputs), drawn(outputs), drawn(rows, inputs).to(dtype)
        exact = x.double() @ weight.T.double() + bias
        exact = F.gelu(exact, approximate="tanh") if gelu else exact
        found = Int8Weight(weight).product(x, bias, gelu, dtype)
        assert found.dtype == dtype
        assert (found - exact).norm() <= 0.03 * exact.norm()


@needs_it
def test_the_largest_numbers_do_not_overflow() -> None:
    """255 times 127 twice is more than 16 bits hold, in which AVX2 adds."""
    weight = torch.ones(16, 256)
    found = Int8Weight(weight).product(torch.full((2, 256), 3.0), None, False, torch.float32)
    assert torch.allclose(found, torch.full((2, 16), 768.0))


@needs_it
def test_a_rows_result_does_not_depend_on_the_others() -> None:
    weight, x = Int8Weight(drawn(96, 128)), drawn(48, 128)
    together = weight.product(x, None, True, torch.float32)
    x[16:] *= 1000
    for rows in (slice(16), slice(1)):
        assert torch.equal(weight.product(x[rows], None, True, torch.float32), together[rows])
    assert torch.equal(weight.product(x, None, True, torch.float32)[:16], together[:16])


@needs_it
def test_a_number_that_is_not_finite_spoils_its_row_alone() -> None:
    x = drawn(3, 64)
    x[1, 5], x[2, 7] = torch.nan, torch.inf
    found = Int8Weight(drawn(32, 64)).product(x, None, False, torch.float32)
    assert found[0].isfinite().all()
    assert found[1:].isnan().all()


@needs_it
def test_only_the_matrices_of_the_layers_are_quantised() -> None:
    for stage in ("prior", "decoder"):
        model = load(Checkpoint.open(GOLDEN / "tiny_b4"), stage, CPU, torch.int8)
        quantised = {name for name, each in model.named_modules() if isinstance(each, Linear) and each.is_quantized}
        assert quantised
        assert all(name.startswith("blocks.") and ".ada." not in name for name in quantised)


def test_where_it_cannot_be_had_it_is_refused() -> None:
    with pytest.raises(UsageError, match="int8 cannot be had here: it is for CPUs"):
        pick_dtype("int8", torch.device("cuda"))
    with pytest.raises(UsageError, match="float8 cannot be had here: it is for GPUs"):
        pick_dtype("float8", CPU)
