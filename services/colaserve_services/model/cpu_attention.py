"""The compiled attention for CPUs with AVX512-BF16 (cpu_attention.c): built at installation where a C compiler is."""

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from colaserve_services.model.cpu_features import lacks_bfloat16

LIBRARY = Path(__file__).with_name("_cpu_attention.so")
HEAD_DIMS = (32, 64, 96, 128)


@cache
def missing() -> str | None:
    """Why it cannot run here, or None."""
    if not LIBRARY.exists():
        return "not built; that takes a C compiler when colaserve is installed"
    try:
        library = _library()
    except OSError as e:
        return f"cannot be loaded: {e}"
    if not library.colaserve_attention_supported():
        return "this CPU has no AVX512-BF16"
    return lacks_bfloat16()


@cache
def _library() -> ctypes.CDLL:
    # It takes OpenMP from what torch has loaded: one team of threads for both.
    library = ctypes.CDLL(str(LIBRARY))
    library.colaserve_attention.argtypes = [ctypes.c_void_p] * 5 + [ctypes.c_int32] + [ctypes.c_int64] * 10
    library.colaserve_attention.restype = None
    return library


def takes(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether it can compute attention over such keys and values."""
    return device.type == "cpu" and dtype == torch.bfloat16 and head_dim in HEAD_DIMS and missing() is None


def attend(q: Tensor, k: Tensor, v: Tensor, begin: int, ends: Tensor, out: Tensor) -> None:
    """softmax(q k^T / sqrt(head_dim)) v into `out`; each query sees the keys from `begin` to its end.

    q: float32 (sequences, n, heads, head_dim); out: bfloat16, likewise; k, v: bfloat16 (sequences, heads, positions,
    head_dim), of any strides but the last; ends: int32 (sequences, n), each above `begin`.
    """
    sequences, n, heads, head_dim = q.shape
    assert all(x.is_contiguous() for x in (q, ends, out)), "they are read as they lie"
    assert (q.dtype, ends.dtype, out.dtype) == (torch.float32, torch.int32, torch.bfloat16)
    for x in (k, v):
        assert (x.dtype, x.shape, x.stride(3)) == (out.dtype, (sequences, heads, k.shape[2], head_dim), 1)
    arrays = (x.data_ptr() for x in (q, k, v, out, ends))
    sizes = (sequences, n, heads, head_dim, *k.stride()[:3], *v.stride()[:3])
    _library().colaserve_attention(*arrays, begin, *sizes)
