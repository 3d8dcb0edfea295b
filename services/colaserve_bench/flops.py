"""What is counted as work. All else (norms, modulation, GELU, solver, copies) counts as no work but takes time.

Products: 2 x rows x weights of the four matrices of each layer (proj_qkv, proj_out, mlp.proj_in, mlp.proj_out), rows
being the latent positions of a pass, both branches and commits included. The input and output projections
(16 channels) and the modulation Linears (not run while sampling) are not counted.
Attention: 4 x queries x keys x heads x head_dim a layer (both of its products), with the keys that a query's block may
see. KV bytes: each key and value read once a pass and layer by the queries of its session.
"""

from __future__ import annotations

from dataclasses import dataclass

from colaserve_services.model.config import DiTConfig

LAYER_MATRICES = ("msa.proj_qkv", "msa.proj_out", "mlp.proj_in", "mlp.proj_out")


def product_flops(config: DiTConfig, rows: int) -> int:
    """Of one pass over so many rows."""
    return 2 * rows * config.num_layers * config.layer_weights


@dataclass(frozen=True)
class Attended:
    """What attention does in one pass, over all layers."""

    flops: float
    kv_bytes: float

    def __add__(self, other: Attended) -> Attended:
        return Attended(self.flops + other.flops, self.kv_bytes + other.kv_bytes)

    def times(self, factor: float) -> Attended:
        return Attended(self.flops * factor, self.kv_bytes * factor)


def attended(config: DiTConfig, queries: int, keys: int, itemsize: int) -> Attended:
    """`queries` rows over `keys` positions of a session."""
    inner = config.num_layers * config.heads * config.head_dim
    return Attended(4.0 * queries * keys * inner, 2.0 * keys * inner * itemsize)


def attention_of_block(config: DiTConfig, past: int, evaluations: int, guided: int, itemsize: int) -> Attended:
    """All that attention does for one block of one session after `past` positions, the commit of the last one included.

    `guided` of the `evaluations` also run the unconditional branch.
    """
    B = config.block_size
    total = attended(config, B, past + B, itemsize).times(evaluations)
    total += attended(config, B, B, itemsize).times(guided)
    return total + attended(config, B, past, 0)  # the commit shares its pass, and so its reading, with the first step
