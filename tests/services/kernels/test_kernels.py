"""Triton's kernels beside their references in torch, interpreted on the CPU; scripts/check-kernels compiles them."""

from collections.abc import Iterator
from copy import deepcopy
from functools import partial
from itertools import product
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from colaserve_services.model.backend import ops
from colaserve_services.model.backend.ops import BEGINS, KEEPS, PageShape, Rows, Storage
from colaserve_services.model.float8 import FLOAT8, GROUP, Scaled, quantized
from colaserve_services.model.float8 import widened as widened_float8
from colaserve_services.model.flow import SamplerSettings, solve
from colaserve_services.model.layers import Linear, LinearActivation

pytest.importorskip("triton")

from colaserve_services.model import kernels
from colaserve_services.model.kernels.adaln import residual_norm_reference
from colaserve_services.model.kernels.products import product_reference
from colaserve_services.model.kernels.qkv import wide_qkv_reference
from colaserve_services.model.kernels.registry import launches
from colaserve_services.model.kernels.update import update_reference

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
BOUND = {FLOAT32: 2e-6, BFLOAT16: 6e-3, FLOAT8: 0.13}  # the interpreter cuts 3 bits off, up to an eighth
NAN = float("nan")

# heads, head_dim, rope_dim, positions of a page, positions of a row: golden's, the bundled's and the released's kinds
PRIORS = [(2, 16, 12, 4, 4), (3, 32, 24, 16, 16), (1, 128, 96, 16, 16), (2, 20, 0, 4, 2)]
VAES = [(2, 12, 12, 4, 1), (1, 128, 128, 16, 4), (3, 16, 16, 4, 4)]


@pytest.fixture(autouse=True)
def outputs_are_poisoned() -> Iterator[None]:
    """torch.empty gives NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class Case(NamedTuple):
    """A pass and the memory before it: pages in random order, NaN where no row may look."""

    storage: Storage
    rows: Rows  # the last is padding
    x: Tensor  # a joint projection
    norm: tuple[Tensor, Tensor]

    @property
    def real(self) -> Rows:
        """Without padding."""
        cut = {name: getattr(self.rows, name)[:-1] for name in ("table", "history", "own")}
        return self.rows._replace(**cut, rotary=self.rows.rotary[: -self.rows.n])

    def only(self, row: int) -> "Case":
        """A pass over one of the rows."""
        cut = {name: getattr(self.rows, name)[row : row + 1].clone() for name in ("table", "history", "own")}
        of = slice(row * self.rows.n, (row + 1) * self.rows.n)
        rows = self.rows._replace(**cut, rotary=self.rows.rotary[of].clone())
        return Case(self.storage, rows, self.x[of].clone(), self.norm)


def case(shape: tuple[int, int, int, int, int], dtype: torch.dtype, far: int = 0) -> Case:
    """Two rows of a new sequence, rows after 3 pages and after 1 and a half, one alone, one `far` on, and padding."""
    heads, head_dim, rope_dim, positions, n = shape
    generator = torch.Generator().manual_seed(sum(shape))
    randn = partial(torch.randn, generator=generator)
    half = positions // n // 2 * n
    kinds = [(0, 0), (n, 0), (3 * positions, 1), (positions + half, 2), (0, -1), (far, 3), (0, -1)]
    some = kinds[2 if n > 4 else 0 : 5] + kinds[5 if far else 6 :]  # longer rows are like the others
    lengths, sequences = zip(*some, strict=True)
    pages = max(lengths) // positions + 1
    order = torch.randperm(4 * pages + 3, generator=generator).int()
    tables, spare = order[: 4 * pages].view(4, pages).contiguous(), order[4 * pages]
    storage = Storage(PageShape(2, positions, heads, head_dim, dtype), len(order), torch.device("cpu"))
    storage.memory.fill_(NAN)
    for sequence, length in zip(sequences, lengths, strict=True):
        for i in range(length if sequence >= 0 else 0):
            page = int(tables[sequence, i // positions])
            storage.memory[:, 1, page, i % positions] = randn(2, heads, head_dim).to(dtype)
    history, table = torch.tensor(lengths).int(), torch.tensor(sequences).int()
    own = tables[table.clamp(min=0).long(), (history // positions).long()].where(table >= 0, spare)
    own[-1] = -1
    angles = 6 * torch.rand(len(lengths) * n, rope_dim // 2, generator=generator)
    rotary = torch.stack((angles.cos(), angles.sin()), dim=1)
    x = randn(len(lengths) * n, 3 * heads * head_dim).to(dtype)
    x[-n:] = NAN  # what padding holds reaches nothing
    rows = Rows(n, tables, table, history, own, rotary, max(lengths))
    return Case(storage, rows, x, (randn(head_dim), randn(head_dim)))


def difference(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def widened(x: Tensor | Scaled) -> Tensor:
    """What a product reads; the interpreter cuts numbers off at float8 where torch rounds them."""
    return widened_float8(x) if isinstance(x, Scaled) else x.float()


def same_pages(got: Storage, expected: Storage, dtype: torch.dtype) -> bool:
    """Close where written, and NaN where nothing was."""
    a, b = got.memory, expected.memory
    return torch.equal(a.isnan(), b.isnan()) and difference(a.nan_to_num(), b.nan_to_num()) < BOUND[dtype]


@pytest.mark.parametrize(("shape", "dtype"), [*product(PRIORS[::3], (FLOAT32,)), *product(PRIORS[:3], (BFLOAT16,))])
def test_a_layer_of_the_prior(shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> None:
    given = case(shape, dtype, far=(0 if shape[1] != 16 else 256 if dtype == FLOAT32 else 252))
    beside, n = deepcopy(given.storage), given.rows.n
    q = kernels.qkv(given.storage, 1, given.x, given.norm, given.norm, 1e-5, given.rows)
    expected = ops.qkv(beside, 1, given.x[:-n], given.norm, given.norm, 1e-5, given.real)
    assert difference(q[:-n], expected) < BOUND[dtype]
    assert same_pages(given.storage, beside, dtype)
    out = kernels.attention(given.storage, 1, q, given.rows)
    assert difference(out[:-n], ops.attention(given.storage, 1, q[:-n], given.real)) < BOUND[dtype]
    assert not out[-n:].any()
    if dtype == BFLOAT16:
        scaled, same = kernels.float8_attention(given.storage, 1, q, given.rows), quantized(out)
        assert torch.equal(scaled.scales, same.scales)
        assert difference(widened(scaled), widened(same)) < BOUND[FLOAT8]


@pytest.mark.parametrize(("shape", "dtype"), [*product(VAES, [FLOAT32]), (VAES[0], BFLOAT16)])
def test_a_layer_of_the_text_vae(shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> None:
    given = case(shape, dtype)
    beside, n = deepcopy(given.storage), given.rows.n
    width = given.x.shape[1] // 3
    norms = tuple((torch.randn(width), torch.randn(width)) for _ in range(2))
    for kind in ((norms, None), (((None, None),) * 2, 0.5), (None, 0.5))[: 3 if n == 1 else 1]:
        q = kernels.wide_qkv(given.storage, 1, given.x, kind[0], 1e-6, given.rows, kind[1])
        expected = wide_qkv_reference(beside, 1, given.x[:-n], kind[0], 1e-6, given.real, kind[1])
        assert difference(q[:-n], expected) < BOUND[dtype]
        assert same_pages(given.storage, beside, dtype)
    out = kernels.attention(given.storage, 1, q, given.rows)
    assert difference(out[:-n], ops.attention(given.storage, 1, q[:-n], given.real)) < BOUND[dtype]


def test_keys_and_values_as_they_are() -> None:
    given = case(PRIORS[0], BFLOAT16)
    beside, n = deepcopy(given.storage), given.rows.n
    _, k, v = (part.unflatten(1, given.storage.memory.shape[-2:]) for part in given.x.chunk(3, dim=1))
    kernels.write(given.storage, 1, k.contiguous(), v.contiguous(), given.rows)
    ops.write(beside, 1, k[:-n], v[:-n], given.real)
    assert torch.equal(given.storage.memory.nan_to_num(), beside.memory.nan_to_num())


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_a_row_is_the_same_to_the_bit_whatever_shares_the_pass(dtype: torch.dtype) -> None:
    """And whatever the grid is made for; its kernels are as many."""
    given = case(PRIORS[0], dtype, far=260)
    n, before = given.rows.n, launches.copy()
    q = kernels.qkv(given.storage, 1, given.x, given.norm, given.norm, 1e-5, given.rows)
    together = kernels.attention(given.storage, 1, q, given.rows)
    several, before = launches - before, launches.copy()
    for row in (2, 5):
        one = given.only(row)
        rows = one.rows._replace(most=one.rows.most + 300)
        q = kernels.qkv(one.storage, 1, one.x, one.norm, one.norm, 1e-5, rows)
        assert torch.equal(kernels.attention(one.storage, 1, q, rows), together[row * n : (row + 1) * n])
    assert launches - before == several + several


def test_what_is_no_number_is_not_hidden() -> None:
    """A NaN among the keys or values that a row sees reaches its output, and no other row's or head's."""
    given = case(PRIORS[0], FLOAT32)
    n, (heads, head_dim) = given.rows.n, given.storage.memory.shape[-2:]
    q = kernels.qkv(given.storage, 1, given.x, given.norm, given.norm, 1e-5, given.rows)
    for side in (0, 1):
        memory = given.storage.memory[side, 1, given.rows.own[2], 0, 1]
        held = memory.clone()
        memory.fill_(NAN)
        found = kernels.attention(given.storage, 1, q, given.rows).view(-1, n, heads, head_dim).isnan()
        memory.copy_(held)
        assert found[2, :, 1].all()
        assert found.sum() == found[2, :, 1].sum()


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, FLOAT8])
@pytest.mark.parametrize("dim", [48, 192])
def test_residuals_and_norms(dim: int, dtype: torch.dtype) -> None:
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(dim))
    table, x, y = draw(5, 6, dim), 3 + draw(7, dim), draw(7, dim).to(FLOAT32 if dtype == FLOAT32 else BFLOAT16)
    index = torch.tensor([0, 3, 3, 1, 3, 4, 0]).int()  # pinned positions among others: row 0 is time 0's
    for residual, gate in ((None, None), (y, table[:, 2])):
        results = []
        for module in (kernels, ops):
            mine = x.clone()
            rest = table[:, 1], table[:, 0], index, 1e-5, dtype
            results.append((module.adaln(mine, residual, gate, *rest), mine))
        (got, mine), (expected, beside) = results
        assert type(got) is type(expected)
        assert difference(widened(got), widened(expected)) < BOUND[dtype]
        assert difference(mine, beside) < BOUND[FLOAT32]
    for of, affine in product(("x", "y"), ((draw(dim), draw(dim)), (None, None))):
        mine, beside = x.clone(), x.clone()
        got = kernels.residual_norm(mine, y, *affine, 1e-6, dtype, of)
        expected = residual_norm_reference(beside, y, *affine, 1e-6, dtype, of)
        assert difference(widened(got), widened(expected)) < BOUND[dtype]
        assert difference(mine, beside) < BOUND[FLOAT32]


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize(("solver", "shape"), [("euler", (4, 16)), ("ab2", (16, 8)), ("heun", (3, 5))])
def test_update(solver: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Every evaluation of a solver with repeats: guided or not, pinned, steered, with what came before or without."""
    evaluations = solve(SamplerSettings(steps=3, solver=solver, resamples=2))
    draw, E = partial(torch.randn, generator=torch.Generator().manual_seed(len(evaluations))), len(evaluations) + 1
    entries, numbers = torch.zeros(E, 8, dtype=torch.int32), torch.zeros(E, 8)
    for e, evaluation in enumerate(evaluations):
        flags = KEEPS * evaluation.update.keeps + BEGINS * (e % 3 == 0)
        drawn = e % 2 if evaluation.update.noise else -1
        entries[e] = torch.tensor((e, e + 20 if e % 2 else -1, 2 * e, flags, drawn, e % 2, e % 3, 0))
        numbers[e, :6] = torch.tensor((evaluation.t / 1000, *evaluation.update[:4], 7.0))
    entries[-1] = -1
    velocity, steering = draw(40 * shape[0], shape[1]).to(dtype), draw(3, shape[1] + 2)
    latents, noise = draw(40, *shape), draw(2, *shape)
    steering[1, -2] = -torch.inf  # a sigmoid of 1
    pinned = torch.rand(E, shape[0], generator=torch.Generator().manual_seed(0)) < 0.3
    results = []
    for function in (kernels.update, update_reference):
        state = [torch.ones(30, *shape), 2 * torch.ones(30, *shape)]
        results.append((function(velocity, latents, *state, entries, numbers, pinned, noise, steering), *state))
    for got, expected in zip(*results, strict=True):
        assert torch.equal(got.isnan(), expected.isnan()), "what is no entry's stays as it is"
        assert difference(got.nan_to_num(), expected.nan_to_num()) < BOUND[FLOAT32]


@pytest.mark.parametrize(
    ("rows", "inputs", "hidden", "activation"),
    [(3, 48, 144, "swiglu"), (33, 528, 48, "gelu"), (130, 64, 272, "gelu_tanh")],
)
def test_products_of_float8(rows: int, inputs: int, hidden: int, activation: LinearActivation) -> None:
    """One with an activation, whose rows have a scale for each group, and the one behind it."""
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(rows))
    x = draw(rows, inputs).to(BFLOAT16)
    one = Linear(inputs, (1 + (activation == "swiglu")) * hidden, activation=activation)
    other = Linear(hidden, 32, bias=False)
    weights = [quantized(linear.weight.detach()) for linear in (one, other)]
    for linear in (one, other):
        linear.quantize(FLOAT8, BFLOAT16)
    with torch.inference_mode():
        x[1] *= 10
        x[2, 5] = NAN
        some, given = torch.arange(rows) != 2, kernels.quantize(x)
        assert difference(widened(given)[some], x[some]) < BOUND[FLOAT8]
        found, expected = one(given), product_reference(*given, *weights[0], one.bias, activation, FLOAT8)
        assert found.scales.shape == expected.scales.shape == (rows, -(-hidden // GROUP))
        last, of_that = other(found), product_reference(*found, *weights[1], None, "none", BFLOAT16)
        for got, wanted, bound in ((found, expected, BOUND[FLOAT8]), (last, of_that, BOUND[BFLOAT16])):
            got, wanted = widened(got), widened(wanted)
            assert torch.equal(got.isnan(), wanted.isnan())
            assert difference(got[some], wanted[some]) < bound
            assert difference(got[1:2], wanted[1:2]) < bound
        assert torch.equal(other(one(x)).nan_to_num(), last.nan_to_num())


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize("activation", ["swiglu", "gelu", "silu"])
def test_products_with_what_cublas_does_not_compute(activation: LinearActivation, dtype: torch.dtype) -> None:
    linear = Linear(36, 24, activation=activation).to(dtype)
    x = torch.randn(19, 36, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.inference_mode():
        expected = product_reference(x, None, linear.weight, None, linear.bias, activation, dtype)
        assert difference(kernels.activated(linear, x), expected) < BOUND[dtype]


def test_they_are_ops_that_graphs_and_shapes_can_be_made_of() -> None:
    given, D, ops_ = case(VAES[0], FLOAT32), 12, torch.ops.colaserve
    at = given.rows.tables, given.rows.table, given.rows.history, given.rows.own
    memory, norms, k = given.storage.memory.nan_to_num(), (*given.norm, *given.norm), torch.randn(len(given.x), 2, D)
    x, table, index = torch.randn(3, D), torch.randn(2, 3, D), torch.tensor([0, 1, 1]).int()
    wide = torch.randn(16, 16)
    z, entries = torch.zeros(2, 4, D), torch.zeros(1, 8, dtype=torch.int32)
    rest = torch.zeros(1, 8), torch.zeros(1, 4, dtype=torch.bool), z[:1].clone(), torch.zeros(1, D + 2)
    calls = [
        (ops_.qkv, (memory, 1, given.x.nan_to_num(), *norms, 1e-5, True, None, *at[2:], given.rows.rotary)),
        (ops_.write, (memory, 1, k, k, *at[2:])),
        (ops_.attention, (memory, 1, k, *at, given.rows.n, given.rows.most, True)),
        (ops_.adaln, (x, x.clone(), *table.unbind(1), index, 1e-5, BFLOAT16)),
        (ops_.residual_norm, (x, x.clone(), None, None, 1e-5, FLOAT8, "x")),
        (ops_.float8_quantize, (x,)),
        (ops_.product, (*quantized(wide), *quantized(wide), None, "swiglu", FLOAT8)),
        (ops_.update, (z[0].clone(), z[:1].clone(), z, z.clone(), entries, *rest)),
    ]
    for op, arguments in calls:
        checks = ["test_faketensor", "test_schema"]
        if op is ops_.product:
            checks.remove("test_schema")  # which cannot multiply float8
        assert torch.library.opcheck(op, arguments, test_utils=checks) == dict.fromkeys(checks, "SUCCESS")
