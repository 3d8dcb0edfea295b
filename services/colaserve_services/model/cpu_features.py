"""What this process may use of its CPU: what the hardware has, without what the environment rules out."""

import os
import platform
from functools import cache

import torch

# ONEDNN_MAX_CPU_ISA lets oneDNN use no more than its value; these have no bfloat16.
_WITHOUT_BFLOAT16 = {"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI"}
_WITHOUT_VNNI = {"SSE41", "AVX", "AVX2", "AVX512_CORE"}


def _limit() -> str:
    return os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "")).upper()


@cache
def lacks_bfloat16() -> str | None:
    """Why this CPU does not compute products of bfloat16 in hardware, or None."""
    if (limit := _limit()) in _WITHOUT_BFLOAT16:
        return f"ONEDNN_MAX_CPU_ISA={limit} excludes bfloat16"
    if platform.machine() == "x86_64" and not torch.cpu._is_avx512_bf16_supported():
        return "this CPU has no AVX512-BF16"
    capability = torch.backends.cpu.get_cpu_capability()
    if platform.machine() == "x86_64" and not capability.startswith("AVX512"):
        return f"ATEN_CPU_CAPABILITY limits torch to {capability}"
    if not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return f"torch finds no bfloat16 on this CPU ({platform.machine()})"
    return None


def packs(dtype: torch.dtype) -> bool:
    """Whether weights in oneDNN's blocked layout make products faster: its reorder is tuned for x86."""
    if platform.machine() != "x86_64" or not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and lacks_bfloat16() is None)


def narrow_dtype() -> torch.dtype:
    """What is computed beside products of int8: bfloat16 where the hardware has it, else float32."""
    return torch.float32 if lacks_bfloat16() else torch.bfloat16


@cache
def has_vnni() -> bool:
    """Whether sums of products of int8 are in 32 bits throughout; elsewhere two products are added in 16."""
    return _limit() not in _WITHOUT_VNNI and torch.cpu._is_vnni_supported()
