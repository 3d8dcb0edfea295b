"""The compiled attention beside the same in float64, over all it may be asked for."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from colaserve_services.model import cpu_attention
from colaserve_services.model.cpu_features import lacks_bfloat16, packs

CPU = torch.device("cpu")
needs_it = pytest.mark.skipif(
    cpu_attention.missing() is not None, reason=f"compiled attention: {cpu_attention.missing()}"
)


def by_hand(q: Tensor, k: Tensor, v: Tensor, begin: int, ends: Tensor) -> Tensor:
    """In float64, shapes as cpu_attention.attend has them."""
    scores = torch.einsum("snhd,shld->shnl", q.double(), k.double()) * q.shape[-1] ** -0.5
    keys = torch.arange(k.shape[2])
    seen = (keys >= begin) & (keys < ends[..., None])
    weights = scores.masked_fill(~seen[:, None], float("-inf")).softmax(-1)
    return torch.einsum("shnl,shld->snhd", weights, v.double())


def drawn(sequences: int, n: int, heads: int, keys: int, head_dim: int, scale: float = 1.0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(keys + n)
    q = torch.randn(sequences, n, heads, head_dim, generator=generator) * scale
    k, v = (torch.randn(sequences, heads, keys, head_dim, generator=generator).bfloat16() for _ in range(2))
    return q, k, v, torch.randint(1, keys + 1, (sequences, n), generator=generator, dtype=torch.int32)


def attended(q: Tensor, k: Tensor, v: Tensor, begin: int, ends: Tensor) -> Tensor:
    out = torch.full(q.shape, float("nan"), dtype=torch.bfloat16)
    cpu_attention.attend(q, k, v, begin, ends, out)
    return out


def difference(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


@needs_it
@pytest.mark.parametrize("head_dim", cpu_attention.HEAD_DIMS)
@pytest.mark.parametrize("n", [1, 4, 16, 17, 40])
@pytest.mark.parametrize("keys", [1, 2, 15, 16, 33, 127, 128, 129, 300, 1030])
def test_it_is_attention(head_dim: int, n: int, keys: int) -> None:
    q, k, v, ends = drawn(2, n, 3, keys, head_dim)
    assert difference(attended(q, k, v, 0, ends), by_hand(q, k, v, 0, ends)) < 5e-3


@needs_it
def test_keys_before_the_first_do_not_count_and_strides_may_be_any() -> None:
    q, k, v, ends = drawn(2, 16, 3, 400, 64)
    begin, ends = 37, ends.clamp_min(38)
    by_row = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v)]
    inside = torch.full((2, 5, 600, 64), float("nan"), dtype=torch.bfloat16)
    inside[:, 1:4, 100:500] = k
    expected = by_hand(q, k, v, begin, ends)
    for keys, values in ((k, v), by_row, (inside[:, 1:4, 100:500], by_row[1])):
        assert difference(attended(q, keys, values, begin, ends), expected) < 5e-3


@needs_it
@pytest.mark.parametrize("scale", [1e-3, 30.0, 1e3])
def test_scores_of_any_size_neither_overflow_nor_vanish(scale: float) -> None:
    """Channels of +-1: large scores differ by more than rounding moves them, and all weight is on the largest."""
    q, k, v, ends = drawn(2, 16, 2, 500, 64)
    q, k = q.sign() * scale, k.sign()
    got, expected = attended(q, k, v, 0, ends), by_hand(q, k, v, 0, ends)
    assert got.isfinite().all()
    assert difference(got, expected) < 2e-2


@needs_it
def test_what_is_no_number_is_not_hidden() -> None:
    """A NaN among the keys or values that a query sees reaches its output, and no other head's or sequence's."""
    q, k, v, ends = drawn(2, 16, 2, 300, 64)
    ends[:] = torch.arange(16) * 16 + 8
    for place in (k, v):
        place[1, 0, 100] = float("nan")
        found = attended(q, k, v, 0, ends).isnan().any(-1)
        assert found[1, ends[1] > 100, 0].all()
        assert not found[0].any()
        assert not found[1, :, 1].any()
        place[1, 0, 100] = 1.0


@needs_it
def test_the_number_of_threads_does_not_change_a_bit() -> None:
    q, k, v, ends = drawn(3, 40, 3, 700, 64)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(attended(q, k, v, 0, ends))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])


@needs_it
def test_it_takes_what_it_can_compute_and_leaves_the_rest() -> None:
    assert cpu_attention.takes(CPU, torch.bfloat16, 64)
    assert not cpu_attention.takes(CPU, torch.bfloat16, 48)
    assert not cpu_attention.takes(CPU, torch.float32, 64)
    assert not cpu_attention.takes(torch.device("cuda"), torch.bfloat16, 64)


@pytest.mark.skipif(not packs(torch.bfloat16), reason=f"no AVX512-BF16: {lacks_bfloat16()}")
@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")
def test_an_installation_with_a_compiler_has_it() -> None:
    """Elsewhere in these tests it may be missing; here it may not."""
    assert cpu_attention.missing() is None


def test_without_the_library_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for content, message in ((None, "compiler"), (b"no library", "cannot be loaded")):
        library = tmp_path / f"{message.replace(' ', '_')}.so"
        if content is not None:
            library.write_bytes(content)
        monkeypatch.setattr(cpu_attention, "LIBRARY", library)
        cpu_attention.missing.cache_clear()
        cpu_attention._library.cache_clear()
        assert message in str(cpu_attention.missing())
        assert not cpu_attention.takes(CPU, torch.bfloat16, 64)
    monkeypatch.undo()
    cpu_attention.missing.cache_clear()
    cpu_attention._library.cache_clear()


@needs_it
def test_it_brings_no_openmp_of_its_own() -> None:
    """A second one would keep a second team of threads beside torch's."""
    code = """
from colaserve_services.model import cpu_attention

def mapped():
    return {line.split()[-1] for line in open("/proc/self/maps") if ".so" in line}

before = mapped()
cpu_attention._library()
print(*(mapped() - before))
"""
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert [Path(name) for name in loaded] == [cpu_attention.LIBRARY]
