"""The functions of `backend.ops` in Triton, for GPUs, and those that a pass needs beside them; takes Triton to import.

Each launches as many kernels whatever the rows hold, and reads no tensor on the host: CUDA graphs can capture it.
"""

from colaserve_services.model.backend.ops import Storage
from colaserve_services.model.kernels.adaln import adaln, residual_norm
from colaserve_services.model.kernels.attention import attention, float8_attention, key_cost, takes
from colaserve_services.model.kernels.fp8 import quantize
from colaserve_services.model.kernels.products import activated, product
from colaserve_services.model.kernels.qkv import qkv, wide_qkv, write
from colaserve_services.model.kernels.update import update

__all__ = [
    "Storage",
    "activated",
    "adaln",
    "attention",
    "float8_attention",
    "key_cost",
    "product",
    "qkv",
    "quantize",
    "residual_norm",
    "takes",
    "update",
    "wide_qkv",
    "write",
]
