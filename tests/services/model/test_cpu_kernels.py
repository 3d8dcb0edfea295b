"""The compiled functions of a pass beside the same in float64, over all that they may be asked for."""

import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from colaserve_services.model.backend import cpu_kernels
from colaserve_services.model.backend.ops import PageShape, Rows
from colaserve_services.model.layers import Linear

# Where there is a compiler they may not be missing.
why = cpu_kernels.missing()
pytestmark = pytest.mark.skipif(why is not None and not shutil.which("cc"), reason=f"compiled functions: {why}")

# heads, head_dim, rope_dim, positions of a page, positions of a row: golden (DiT, VAE), bundled, medium, released
SHAPES = [
    (4, 16, 12, 4, 4), (4, 12, 12, 4, 1), (4, 12, 12, 4, 4), (3, 32, 24, 16, 16), (4, 16, 16, 16, 16),
    (6, 32, 32, 4, 4), (4, 32, 32, 4, 1), (2, 64, 48, 16, 16), (2, 128, 96, 16, 16), (2, 96, 96, 16, 4),
    (1, 128, 128, 16, 16), (2, 80, 0, 8, 4), (1, 256, 256, 64, 32), (2, 20, 20, 2, 2),
]  # fmt: skip
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
BOUND = {FLOAT32: 1e-6, BFLOAT16: 6e-3}


def difference(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape
    return float((got.double() - expected).norm() / expected.norm())


class Pool:
    """Sequences of one block row each, their histories written; pages in random order, the rest of memory NaN."""

    def __init__(self, shape: tuple[int, int, int, int, int], histories: list[int], dtype: torch.dtype):
        self.heads, self.head_dim, self.rope_dim, self.positions, self.n = shape
        self.generator, self.dtype = torch.Generator().manual_seed(sum(shape) + len(histories)), dtype
        self.randn = partial(torch.randn, generator=self.generator)
        count, pages = len(histories), max(histories) // self.positions + 1
        order = torch.randperm(count * pages + 3, generator=self.generator).int()
        tables = order[: count * pages].view(count, pages).contiguous()
        page = PageShape(2, self.positions, self.heads, self.head_dim, dtype)
        self.storage = cpu_kernels.Storage(page, len(order), torch.device("cpu"))
        self.storage.memory.fill_(float("nan"))
        history = torch.tensor(histories, dtype=torch.int32)
        own = tables[torch.arange(count), (history // self.positions).long()].contiguous()
        angles = 6 * torch.rand(count * self.n, self.rope_dim // 2, generator=self.generator)
        rotary = torch.stack((angles.cos(), angles.sin()), dim=1)
        table = torch.arange(count, dtype=torch.int32).where(history > 0, -1)
        self.rows = Rows(self.n, tables, table, history, own, rotary, max(histories))
        self.past = [self.randn(2, h, self.heads, self.head_dim).to(dtype) for h in histories]
        for i, past in enumerate(self.past):
            for begin in range(0, histories[i], self.n):
                page = tables[i, begin // self.positions].reshape(1)
                one = self.rows._replace(table=table[i : i + 1], history=torch.tensor([begin]).int(), own=page)
                cpu_kernels.write(self.storage, 1, *past[:, begin : begin + self.n], one)

    def qkv(self) -> Tensor:
        """A joint projection for all rows."""
        return self.randn(len(self.rows.rotary), 3 * self.heads * self.head_dim).to(self.dtype)

    def only(self, row: int) -> Rows:
        """A pass over one of the rows."""
        some = slice(row, row + 1)
        table, history, own = (t[some].contiguous() for t in (self.rows.table, self.rows.history, self.rows.own))
        rotary = self.rows.rotary[row * self.n : (row + 1) * self.n]
        return self.rows._replace(table=table, history=history, own=own, rotary=rotary)

    def attended(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """In float64: each row over its past and itself. (R, heads, head_dim) to (R, heads * head_dim)."""
        out = []
        for i, (past, mine) in enumerate(zip(self.past, q.double().split(self.n), strict=True)):
            own = slice(i * self.n, (i + 1) * self.n)
            keys, values = (torch.cat((p, t[own])).double() for p, t in zip(past, (k.to(self.dtype), v), strict=True))
            scores = torch.einsum("qhd,khd->hqk", mine, keys) * self.head_dim**-0.5
            out.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), values))
        return torch.cat(out).flatten(1)


def histories(shape: tuple[int, int, int, int, int]) -> list[int]:
    """Of 0 to 3 pages, whole or not, and one beyond the keys between two updates of the softmax."""
    positions, n = shape[3:]
    return [0, positions, 3 * positions, n, 2 * positions + positions // n // 2 * n, 288 // positions * positions]


def normed(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return torch.nn.functional.layer_norm(x.double(), weight.shape, weight.double(), bias.double(), eps)


def turned(x: Tensor, rotary: Tensor) -> Tensor:
    """The leading channels of x: (R, heads, d), rotated in float64."""
    cos, sin = rotary.double().unsqueeze(2).unbind(1)
    x, dim = x.clone(), 2 * cos.shape[-1]
    one, two = x[..., :dim:2], x[..., 1:dim:2]
    one[:], two[:] = one * cos - two * sin, two * cos + one * sin
    return x


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_layer_of_the_prior(shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> None:
    pool = Pool(shape, histories(shape), dtype)
    heads, d = shape[:2]
    x, norms = pool.qkv(), [(pool.randn(d), pool.randn(d)) for _ in range(2)]
    q = cpu_kernels.qkv(pool.storage, 1, x, *norms, 1e-5, pool.rows)
    out = cpu_kernels.attention(pool.storage, 1, q, pool.rows)
    given = x.view(len(x), 3, heads, d).unbind(1)
    q, k = (turned(normed(t, *norm, 1e-5), pool.rows.rotary) for t, norm in zip(given[:2], norms, strict=True))
    assert out.dtype == dtype
    assert difference(out, pool.attended(q, k, given[2])) < BOUND[dtype]


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_layer_of_the_text_vae(shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> None:
    """It norms and rotates itself."""
    pool = Pool(shape, histories(shape), dtype)
    q, k, v = (pool.randn(len(pool.rows.rotary), *shape[:2]) for _ in range(3))
    cpu_kernels.write(pool.storage, 1, k, v.to(dtype), pool.rows)
    out = cpu_kernels.attention(pool.storage, 1, q.to(dtype), pool.rows)
    assert difference(out, pool.attended(q.to(dtype), k, v.to(dtype))) < BOUND[dtype]


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize("shape", [SHAPES[5], SHAPES[6], SHAPES[7]])
def test_a_row_is_the_same_to_the_bit_whatever_shares_the_pass(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype
) -> None:
    pool = Pool(shape, histories(shape), dtype)
    norm = (pool.randn(shape[1]), pool.randn(shape[1]))
    x, threads = pool.qkv(), torch.get_num_threads()

    def of(x: Tensor, rows: Rows) -> Tensor:
        q = cpu_kernels.qkv(pool.storage, 1, x, norm, norm, 1e-5, rows)
        return cpu_kernels.attention(pool.storage, 1, q, rows)

    together = of(x, pool.rows)
    alone = [of(some, pool.only(i)) for i, some in enumerate(x.split(pool.n))]
    assert torch.equal(together, torch.cat(alone))
    try:
        torch.set_num_threads(3 - min(threads, 2))
        assert torch.equal(together, of(x, pool.rows))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize("scale", [1e-3, 30.0, 1e3])
def test_scores_of_any_size_neither_overflow_nor_vanish(scale: float, dtype: torch.dtype) -> None:
    """Channels of +-1: large scores differ by more than rounding moves them, and all weight is on the largest."""
    pool = Pool((2, 64, 0, 16, 16), [0, 32, 512], dtype)
    for past in pool.past:
        past.sign_()
    pool.storage.memory.sign_()
    q, k, v = (pool.randn(48, 2, 64).sign() for _ in range(3))
    cpu_kernels.write(pool.storage, 1, k, v, pool.rows)
    out = cpu_kernels.attention(pool.storage, 1, q * scale, pool.rows)
    assert difference(out, pool.attended(q * scale, k, v.to(dtype))) < 2e-2


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_what_is_no_number_is_not_hidden(dtype: torch.dtype) -> None:
    """A NaN among the keys or values that a row sees reaches its output, and no other row's or head's."""
    pool = Pool((2, 64, 0, 16, 16), [64, 64], dtype)
    for side in (0, 1):
        q, k, v = (pool.randn(32, 2, 64) for _ in range(3))
        (k, v)[side][20, 1] = float("nan")
        cpu_kernels.write(pool.storage, 1, k, v, pool.rows)
        found = cpu_kernels.attention(pool.storage, 1, q, pool.rows).view(32, 2, 64).isnan()
        assert found[16:, 1].all()
        assert not found[:16].any()
        assert not found[:, 0].any()


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize("dim", [48, 50, 64, 192, 2048])
def test_gate_norm_and_modulation(dim: int, dtype: torch.dtype) -> None:
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(dim))
    table, x, y = draw(5, 6, dim), 3 + draw(37, dim), draw(37, dim).to(dtype)
    index = torch.arange(37, dtype=torch.int32) % 5
    shift, scale, gate = (t[index.long()] for t in table.double().unbind(1)[:3])
    for residual in (None, y):
        expected = x.double() if residual is None else x.double() + gate * residual.double()
        got = x.clone()
        columns = (table[:, 1], table[:, 0])
        out = cpu_kernels.adaln(got, residual, None if residual is None else table[:, 2], *columns, index, 1e-5, dtype)
        assert out.dtype == dtype
        assert difference(got, expected) < 1e-7
        ones, zeros = torch.ones(dim), torch.zeros(dim)
        assert difference(out, normed(expected, ones, zeros, 1e-5) * scale + shift) < BOUND[dtype]
        one = index[3:4], 1e-5, dtype
        alone = cpu_kernels.adaln(got[3:4].clone(), None, None, *columns, *one)
        assert torch.equal(alone, out[3:4])


@pytest.mark.parametrize("isa", ["SSE41", "AVX512_CORE_BF16"])
def test_all_of_it_holds_on_older_cpus(isa: str, tmp_path: Path) -> None:
    """The environment stands in for them; of more than the CPU has nothing comes. CI runs all tests of what computes as
    with AVX2 and with AVX-512 alone."""
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}
    here = cpu_kernels.KINDS[cpu_kernels.kind()]
    expected = {"SSE41": "plain", "AVX512_CORE_BF16": "AVX512-BF16"}[isa]
    if cpu_kernels.KINDS.index(expected) >= cpu_kernels.KINDS.index(here):
        pytest.skip(f"this CPU is {here} itself, or has less")
    some = "modulation or layer and (shape2 or shape4 or shape7 or shape12)"  # of each way through the code
    options = ["-q", "-x", "-p", "no:cacheprovider", "--basetemp", str(tmp_path / "inner"), "-k", some]
    code = """
import pytest, sys
from colaserve_services.model.backend import cpu_kernels
print(cpu_kernels.KINDS[cpu_kernels.kind()])
sys.exit(pytest.main(sys.argv[1:]))"""
    command = [sys.executable, "-c", code, *options, __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout.partition("\n")[0]) == (0, expected), done.stdout


def test_they_take_what_they_can_compute_and_leave_the_rest() -> None:
    assert cpu_kernels.takes(PageShape(1, 16, 1, 64, BFLOAT16))
    assert not cpu_kernels.takes(PageShape(1, 16, 1, 64, torch.float16))
    assert not cpu_kernels.takes(PageShape(1, 16, 1, 257, FLOAT32))
    assert not cpu_kernels.takes(PageShape(1, 15, 1, 64, FLOAT32))


def test_they_bring_no_openmp_of_their_own() -> None:
    """A second one would keep a second team of threads beside torch's."""
    code = """
from colaserve_services.model.backend import cpu_kernels

def mapped():
    return {line.split()[-1] for line in open("/proc/self/maps") if ".so" in line}

before = mapped()
assert cpu_kernels.missing() is None
print(*(mapped() - before))
"""
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert [Path(name) for name in loaded] == [cpu_kernels.LIBRARY]


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize("gelu", [False, True])
def test_scales_bias_and_gelu_behind_a_product(dtype: torch.dtype, gelu: bool) -> None:
    generator = torch.Generator().manual_seed(7)
    for rows, width in ((1, 1), (3, 20), (33, 100), (130, 512)):
        x = (4 * torch.randn(rows, width, generator=generator)).to(dtype)
        scale, bias = (torch.randn(size, generator=generator) for size in (rows, width))
        for some in ((None, None), (scale, None), (scale, bias)):
            by, plus = (torch.zeros(()) if t is None else t.double() for t in some)
            exact = x.double() * (1 if some[0] is None else by[:, None]) + plus
            exact = torch.nn.functional.gelu(exact, approximate="tanh") if gelu else exact
            assert difference(cpu_kernels.rescale(x.clone(), *some, gelu=gelu), exact) < BOUND[dtype]
    ends = torch.tensor([[-3e38, -100.0, -0.0, 100.0, 3e38]]).to(dtype)
    found = cpu_kernels.rescale(ends.clone(), gelu=gelu)
    assert torch.allclose(found, ends.clamp(min=0) if gelu else ends, rtol=0, atol=1e-30)
    assert cpu_kernels.rescale(torch.tensor([[torch.nan]], dtype=dtype), gelu=gelu).isnan().all()


@pytest.mark.parametrize("rows", [127, 128])
def test_a_packed_products_gelu_is_the_same_where_it_comes_behind(rows: int) -> None:
    linear = Linear(64, 256, activation="gelu_tanh").bfloat16()
    x = torch.randn(2, rows, 64, generator=torch.Generator().manual_seed(rows)).bfloat16()
    product = x.double() @ linear.weight.detach().double().T + linear.bias.detach().double()
    linear.pack()
    with torch.inference_mode():
        assert difference(linear(x), torch.nn.functional.gelu(product, approximate="tanh")) < BOUND[BFLOAT16]
