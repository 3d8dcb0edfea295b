"""The functions of `ops`, compiled (cpu_kernels.c): built at installation where a C compiler is, chosen by the CPU."""

import ctypes
import os
from ctypes import c_float, c_int, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from colaserve_services.model.backend.ops import Norm, PageShape, Rows

LIBRARY = Path(__file__).with_name("_cpu_kernels.so")
KINDS = ("plain", "AVX2", "AVX-512", "AVX512-BF16", "AMX-BF16")  # as cpu_kernels.c numbers them
_KEY_COST = 1.6  # of an operation of attention, in those of a product
_TILED_KEY_COST = 6.5  # where both are computed by tiles: attention waits for memory
_CHANNELS = 16  # a head's are padded to a multiple
_MOST_DIM, _MOST_POSITIONS = 256, 64

# What the environment allows oneDNN and torch to use holds here too.
_ONEDNN = {
    "SSE41": 0, "AVX": 0, "AVX2": 1, "AVX2_VNNI": 1, "AVX2_VNNI_2": 1, "AVX512_CORE": 2, "AVX512_CORE_VNNI": 2,
    "AVX512_CORE_BF16": 3, "AVX512_CORE_FP16": 3, "AVX10_1_512": 3,
}  # fmt: skip
_ATEN = {"default": 0, "avx2": 1}


class _Adaln(ctypes.Structure):
    _fields_ = [
        ("x", c_void_p), ("y", c_void_p), ("gate", c_void_p), ("scale", c_void_p), ("shift", c_void_p),
        ("gate_row", c_int64), ("scale_row", c_int64), ("shift_row", c_int64), ("index", c_void_p), ("out", c_void_p),
        ("dim", c_int64), ("eps", c_float), ("type", c_int32),
    ]  # fmt: skip


class _Pages(ctypes.Structure):
    _fields_ = [
        ("tables", c_void_p), ("table", c_void_p), ("history", c_void_p), ("own", c_void_p), ("pages", c_int64),
        ("n", c_int64), ("heads", c_int64), ("head_dim", c_int64), ("positions", c_int64), ("memory", c_void_p),
        ("type", c_int32),
    ]  # fmt: skip


class _Qkv(ctypes.Structure):
    _fields_ = [
        ("at", _Pages), ("q", c_void_p), ("k", c_void_p), ("v", c_void_p), ("row", c_int64), ("norm", c_void_p * 4),
        ("eps", c_float), ("rotary", c_void_p), ("rope_dim", c_int64), ("rotated", c_void_p),
    ]  # fmt: skip


class _Attention(ctypes.Structure):
    _fields_ = [("at", _Pages), ("q", c_void_p), ("out", c_void_p)]


class _Quantize(ctypes.Structure):
    _fields_ = [("x", c_void_p), ("out", c_void_p), ("scale", c_void_p), ("dim", c_int64), ("type", c_int32)]


class _Rescale(ctypes.Structure):
    _fields_ = [
        ("x", c_void_p), ("scale", c_void_p), ("bias", c_void_p), ("dim", c_int64), ("gelu", c_int32),
        ("type", c_int32),
    ]  # fmt: skip


_STRUCTURES = {"adaln": _Adaln, "qkv": _Qkv, "attention": _Attention, "quantize": _Quantize, "rescale": _Rescale}


@cache
def missing() -> str | None:
    """Why they cannot run here, or None."""
    if not LIBRARY.exists():
        return "not built; that takes a C compiler when colaserve is installed"
    try:
        _library()
    except OSError as e:
        return f"cannot be loaded: {e}"
    return None


def takes(shape: PageShape) -> bool:
    """Whether they can compute with such pages."""
    small = shape.head_dim <= _MOST_DIM and shape.positions <= _MOST_POSITIONS and shape.positions % 2 == 0
    return missing() is None and shape.dtype in (torch.float32, torch.bfloat16) and small


@cache
def kind() -> int:
    """Of KINDS: the best that the CPU has and the environment allows."""
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "")).upper()
    capability = os.environ.get("ATEN_CPU_CAPABILITY", "").lower()
    most = len(KINDS) - 1
    chosen: int = _library().colaserve_kernels_kind(min(_ONEDNN.get(limit, most), _ATEN.get(capability, most)))
    return chosen


def by_tiles(dtype: torch.dtype) -> bool:
    """Whether products of this dtype are computed by tiles of AMX."""
    return missing() is None and dtype == torch.bfloat16 and KINDS[kind()] == "AMX-BF16"


def key_cost(dtype: torch.dtype) -> float:
    """Of an operation of attention, in those of a product."""
    return _TILED_KEY_COST if by_tiles(dtype) else _KEY_COST


@cache
def _library() -> ctypes.CDLL:
    # It takes OpenMP from what torch has loaded: one team of threads for both.
    library = ctypes.CDLL(str(LIBRARY))
    library.colaserve_kernels_kind.argtypes = [c_int]
    library.colaserve_kernels_memory.argtypes, library.colaserve_kernels_memory.restype = [c_void_p, c_int64], None
    for function, structure in _STRUCTURES.items():
        called = getattr(library, f"colaserve_{function}")
        called.argtypes, called.restype = [c_int, ctypes.POINTER(structure), c_int64], None
    return library


class Storage:
    """Keys and values of all layers by page; made once, never moved. cpu_kernels.c says how a page is laid out."""

    def __init__(self, shape: PageShape, pages: int, device: torch.device):
        assert takes(shape), "asked before"
        self.positions, self.heads, self.head_dim = shape.positions, shape.heads, shape.head_dim
        size = (shape.layers, pages, shape.heads, 2, shape.positions * _padded(shape.head_dim))
        self.memory = torch.empty(size, dtype=shape.dtype, device=device)
        _library().colaserve_kernels_memory(self.memory.data_ptr(), self.memory.nbytes)
        self._laid_out: tuple[Rows, _Pages] | None = None  # of the last call: all layers of a pass have the same rows

    @staticmethod
    def page_bytes(shape: PageShape) -> int:
        """Of one page, in all layers."""
        return 2 * shape.layers * shape.positions * shape.heads * _padded(shape.head_dim) * shape.dtype.itemsize

    def _at(self, layer: int, rows: Rows) -> _Pages:
        if self._laid_out is None or self._laid_out[0] is not rows:
            arrays = (rows.tables, rows.table, rows.history, rows.own)
            assert all(x.dtype == torch.int32 and x.is_contiguous() for x in arrays), "they are read as they lie"
            pages = _Pages(
                *(x.data_ptr() for x in arrays), rows.tables.shape[1], rows.n, self.heads, self.head_dim,
                self.positions, None, _type(self.memory.dtype),
            )  # fmt: skip
            self._laid_out = rows, pages
        pages = self._laid_out[1]
        pages.memory = self.memory.data_ptr() + layer * self.memory.stride(0) * self.memory.itemsize
        return pages


def _padded(head_dim: int) -> int:
    return -(-head_dim // _CHANNELS) * _CHANNELS


def _type(dtype: torch.dtype) -> int:
    return (torch.float32, torch.bfloat16).index(dtype)


def adaln(
    x: Tensor, y: Tensor | None, gate: Tensor | None, scale: Tensor, shift: Tensor, index: Tensor, eps: float,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """x += gate y, in place; then LayerNorm without affine, times scale, plus shift: (R, D) in `dtype`.

    x (R, D) float32; y (R, D) in `dtype`; gate, scale and shift are rows (K, D) of a table, `index` (R,) int32 the row
    for each position.
    """
    R, D = x.shape
    gate = scale if gate is None else gate
    assert gate.stride(1) == scale.stride(1) == shift.stride(1) == 1, "rows of a table"
    assert x.is_contiguous(), "all is read as it lies"
    assert index.is_contiguous()
    assert (gate.dtype, scale.dtype, shift.dtype, x.dtype, index.dtype) == (*[torch.float32] * 4, torch.int32)
    assert y is None or (y.dtype, y.shape, y.is_contiguous()) == (dtype, x.shape, True)
    out = torch.empty(R, D, dtype=dtype)
    call = _Adaln(
        x.data_ptr(), None if y is None else y.data_ptr(), gate.data_ptr(), scale.data_ptr(), shift.data_ptr(),
        gate.stride(0), scale.stride(0), shift.stride(0), index.data_ptr(), out.data_ptr(), D, eps, _type(dtype),
    )  # fmt: skip
    _library().colaserve_adaln(kind(), call, R)
    return out


def qkv(storage: Storage, layer: int, x: Tensor, q_norm: Norm, k_norm: Norm, eps: float, rows: Rows) -> Tensor:
    """LayerNorm and rotary of queries and keys; keys and values into the pages; the queries, for `attention`.

    x: (R, 3 heads head_dim). The leading channels of each head turn in pairs (2i, 2i + 1), in float32.
    """
    heads, d = storage.heads, storage.head_dim
    assert x.is_contiguous(), "all is read as it lies"
    assert rows.rotary.is_contiguous()
    assert (x.dtype, rows.rotary.dtype) == (storage.memory.dtype, torch.float32)
    assert x.shape == (x.shape[0], 3 * heads * d)
    q = torch.empty(x.shape[0], heads, d)
    part, begin = heads * d * x.itemsize, x.data_ptr()
    norms = (c_void_p * 4)(*(t.data_ptr() for t in (*q_norm, *k_norm)))
    call = _Qkv(
        storage._at(layer, rows), begin, begin + part, begin + 2 * part, 3 * heads * d, norms, eps,
        rows.rotary.data_ptr(), 2 * rows.rotary.shape[-1], q.data_ptr(),
    )  # fmt: skip
    _library().colaserve_qkv(kind(), call, rows.table.shape[0])
    return q


def write(storage: Storage, layer: int, k: Tensor, v: Tensor, rows: Rows) -> None:
    """Keys after norm and rotary, and values, (R, heads, head_dim), into the rows' own pages."""
    k, v = (t.to(storage.memory.dtype).contiguous() for t in (k, v))
    call = _Qkv(storage._at(layer, rows), None, k.data_ptr(), v.data_ptr(), storage.heads * storage.head_dim)
    _library().colaserve_qkv(kind(), call, rows.table.shape[0])


def attention(storage: Storage, layer: int, q: Tensor, rows: Rows) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v over what each row sees: (R, heads * head_dim) in the storage's dtype."""
    q = q.float().contiguous()
    out = torch.empty(q.shape[0], storage.heads * storage.head_dim, dtype=storage.memory.dtype)
    call = _Attention(storage._at(layer, rows), q.data_ptr(), out.data_ptr())
    _library().colaserve_attention(kind(), call, rows.table.shape[0])
    return out


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (R, K), float32 or bfloat16, to bytes round(x / scale) + 128, and each row's scale, float32 (R,): its
    largest absolute value over 127, NaN if a number of it is not finite."""
    assert x.is_contiguous(), "it is read as it lies"
    out, scale = torch.empty(x.shape, dtype=torch.uint8), torch.empty(len(x))
    call = _Quantize(x.data_ptr(), out.data_ptr(), scale.data_ptr(), x.shape[1], _type(x.dtype))
    _library().colaserve_quantize(kind(), call, len(x))
    return out, scale


def rescale(x: Tensor, scale: Tensor | None = None, bias: Tensor | None = None, gelu: bool = False) -> Tensor:
    """x (..., N), float32 or bfloat16, times each row's scale, plus bias (N,), both float32, then GELU (with tanh) if
    wanted; in place."""
    assert all(t is None or (t.is_contiguous() and t.dtype == torch.float32) for t in (scale, bias)), "as they lie"
    assert x.is_contiguous(), "it is read as it lies"
    pointers = (t if t is None else t.data_ptr() for t in (x, scale, bias))
    call = _Rescale(*pointers, x.shape[-1], gelu, _type(x.dtype))
    _library().colaserve_rescale(kind(), call, x.shape[:-1].numel())
    return x
