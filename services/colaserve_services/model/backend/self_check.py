"""Whether kernels compute here what plain torch does: a pass over one random layer, before they are chosen."""

from array import array
from types import ModuleType

import torch
from torch import Tensor

from colaserve_services.model.backend import Denoise, Row, Sizes, Update, cuda, reference
from colaserve_services.model.backend.streams import Stream
from colaserve_services.model.config import DiTConfig
from colaserve_services.model.dit import DiT
from colaserve_services.model.layers import Linear

_BLOCKS = 18  # of context: more keys than one program of the attention reads
_MOST = {torch.float32: 1e-4}  # relative difference; of other dtypes
_MOST_ELSE = 3e-2
_SMALL = DiTConfig(
    num_layers=1, heads=2, head_dim=64, txt_dim=128, emb_dim=32, block_size=16, rope_dim=48, txt_in_channels=16,
    txt_out_channels=16, expand_ratio=2,
)  # fmt: skip


@torch.inference_mode()
def disagreement(kernels: ModuleType, stream: Stream, dtype: torch.dtype) -> str | None:
    """How far the velocities of `cuda.Prior` are from the reference's, when that is too far."""
    model = _network(stream.device, dtype)
    B, d = _SMALL.block_size, _SMALL.txt_in_channels
    sizes = Sizes(1 << 30, 1, B, B * (_BLOCKS + 1))
    z = torch.randn(_BLOCKS + 1, B, d, generator=torch.Generator().manual_seed(0))
    found: list[Tensor] = []
    for backend in (cuda.Prior(model, sizes, kernels, stream), reference.Prior(model, sizes)):
        pages = array("i", backend.pages.reserve(_BLOCKS + 1) or ())
        rows = [Row(pages, i, z[i]) for i in range(_BLOCKS)]
        rows.append(Row(pages, _BLOCKS, z[-1], 700.0, Denoise(0, Update(1.0, -0.1), 3.0)))
        found.append(backend.run(backend.plan(rows)).results()[-1].velocity.cpu())
    got, expected = found
    apart = ((got - expected).norm() / expected.norm()).item()
    most = _MOST.get(dtype, _MOST_ELSE)
    return None if apart <= most else f"velocities are {apart:.1e} from the reference's, expected at most {most:.0e}"


def _network(device: torch.device, dtype: torch.dtype) -> DiT:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = DiT(_SMALL).requires_grad_(False).to(device)
    for module in model.modules():
        if isinstance(module, Linear):
            module.to(dtype)
            module.pack()
    return model
