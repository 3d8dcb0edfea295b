"""The backend for GPUs on a CPU: its logic as it is, with the kernels' references in torch in their place."""

from types import SimpleNamespace

import pytest
import torch

from colaserve_services.model.backend import ops
from colaserve_services.model.backend.pick import Picked, bucketed

CPU = torch.device("cpu")


def references() -> SimpleNamespace:
    """With the names of model/kernels."""
    pytest.importorskip("triton")
    from colaserve_services.model.kernels.adaln import residual_norm_reference
    from colaserve_services.model.kernels.qkv import wide_qkv_reference
    from colaserve_services.model.kernels.update import update_reference

    names = ("Storage", "takes", "key_cost", "adaln", "qkv", "write", "attention", "float8_attention")
    return SimpleNamespace(
        **{name: getattr(ops, name) for name in names},
        update=update_reference,
        wide_qkv=wide_qkv_reference,
        residual_norm=residual_norm_reference,
        activated=lambda linear, x: linear(x),
    )


def on_cpu() -> Picked:
    return bucketed(references(), CPU)
