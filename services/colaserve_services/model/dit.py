"""The prior: a block-causal Diffusion Transformer over latents (arXiv:2605.06548; adaLN-Zero as in arXiv:2212.09748).

Parameter names are those of cola_dit/model.safetensors. Times t are 0..1000, 0 is clean.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from colaserve_services.model.config import DiTConfig
from colaserve_services.model.layers import (
    Attend,
    LayerNorm,
    Linear,
    rotary_angles,
    rotary_frequencies,
    to_device,
)

TIME_CHANNELS = 256
TIME_SCALE = 1000.0  # T: time runs from T (noise) to 0 (latents)


@dataclass(frozen=True)
class Modulation:
    """adaLN of the time: shift, 1 + scale and gate of both branches of a layer, each (..., D)."""

    attn_shift: Tensor
    attn_scale: Tensor
    attn_gate: Tensor
    mlp_shift: Tensor
    mlp_scale: Tensor
    mlp_gate: Tensor


class TimeEmbedding(nn.Module):
    """t -> e: sinusoid of 256 channels, then an MLP."""

    def __init__(self, dim: int, emb_dim: int):
        super().__init__()
        self.proj_in = Linear(TIME_CHANNELS, dim)
        self.proj_hid = Linear(dim, dim)
        self.proj_out = Linear(dim, emb_dim)

    def forward(self, t: Tensor) -> Tensor:  # (...) -> (..., emb_dim)
        half = TIME_CHANNELS // 2
        exponents = torch.arange(half, dtype=torch.float32, device=t.device) / half
        angles = t.float()[..., None] * torch.exp(-math.log(10000.0) * exponents)
        e = torch.cat((angles.sin(), angles.cos()), dim=-1)
        return self.proj_out(F.silu(self.proj_hid(F.silu(self.proj_in(e)))))


def _modulator(emb_dim: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.SiLU(), Linear(emb_dim, outputs))


class _StoredRotary(nn.Module):
    """The file holds the frequencies in every layer, as `rope.rope.freqs`."""

    def __init__(self, rope_dim: int):
        super().__init__()
        self.rope = nn.ParameterDict(
            {"freqs": nn.Parameter(rotary_frequencies(rope_dim, 10000.0), requires_grad=False)}
        )


class DiTAttention(nn.Module):
    """Joint projection, per-head LayerNorm of queries and keys, rotary on the first rope_dim channels."""

    def __init__(self, config: DiTConfig, layer: int):
        super().__init__()
        inner = config.heads * config.head_dim
        self.config, self.layer = config, layer
        self.proj_qkv = Linear(config.txt_dim, 3 * inner, bias=config.qk_bias)
        self.norm_q = LayerNorm(config.head_dim, config.norm_eps)
        self.norm_k = LayerNorm(config.head_dim, config.norm_eps)
        self.proj_out = Linear(inner, config.txt_dim, bias=config.qk_bias)
        self.rope = _StoredRotary(config.rope_dim)

    def forward(self, x: Tensor, rotary: Tensor, attend: Attend) -> Tensor:
        """x: (..., D); rotary: unit complex numbers (..., 1, rope_dim / 2)."""
        qkv = self.proj_qkv(x).unflatten(-1, (3, self.config.heads, self.config.head_dim))
        q, k, v = qkv.unbind(-3)
        q, k = (rotate_pairs(norm(t), rotary) for norm, t in ((self.norm_q, q), (self.norm_k, k)))
        return self.proj_out(attend(self.layer, q, k, v).flatten(-2))


def rotate_pairs(x: Tensor, rotary: Tensor) -> Tensor:
    """Rotate the pairs (2i, 2i + 1) of the leading channels by the complex numbers in `rotary`; float32."""
    rope_dim = 2 * rotary.shape[-1]
    if rope_dim == 0:
        return x
    pairs = torch.view_as_complex(x[..., :rope_dim].unflatten(-1, (-1, 2)))
    return torch.cat((torch.view_as_real(pairs * rotary).flatten(-2), x[..., rope_dim:]), dim=-1)


class DiTMLP(nn.Module):
    """Linear, GELU (tanh approximation), Linear."""

    def __init__(self, dim: int, expand_ratio: int):
        super().__init__()
        self.proj_in = Linear(dim, expand_ratio * dim, activation="gelu_tanh")
        self.proj_out = Linear(expand_ratio * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj_out(self.proj_in(x))


class DiTBlock(nn.Module):
    """Attention, then an MLP; time shifts, scales and gates both."""

    def __init__(self, config: DiTConfig, layer: int):
        super().__init__()
        dim, emb_dim = config.txt_dim, config.emb_dim
        self.eps = config.norm_eps
        self.msa = DiTAttention(config, layer)
        self.mlp = DiTMLP(dim, config.expand_ratio)
        self.ada = nn.ModuleDict(
            {
                "msa_in": _modulator(emb_dim, 2 * dim),
                "msa_out": _modulator(emb_dim, dim),
                "mlp_in": _modulator(emb_dim, 2 * dim),
                "mlp_out": _modulator(emb_dim, dim),
            }
        )

    def modulation(self, e: Tensor) -> Modulation:
        """From the time embedding, (..., emb_dim)."""
        attn_shift, attn_scale = self.ada["msa_in"](e).float().chunk(2, dim=-1)
        mlp_shift, mlp_scale = self.ada["mlp_in"](e).float().chunk(2, dim=-1)
        attn_gate, mlp_gate = self.ada["msa_out"](e).float(), self.ada["mlp_out"](e).float()
        return Modulation(attn_shift, 1 + attn_scale, attn_gate, mlp_shift, 1 + mlp_scale, mlp_gate)

    def forward(self, x: Tensor, m: Modulation, rotary: Tensor, attend: Attend) -> Tensor:  # x: (..., D)
        h = modulated_norm(x, m.attn_shift, m.attn_scale, self.eps)
        x = torch.addcmul(x, m.attn_gate, self.msa(h, rotary, attend))
        h = modulated_norm(x, m.mlp_shift, m.mlp_scale, self.eps)
        return torch.addcmul(x, m.mlp_gate, self.mlp(h))


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """LayerNorm without affine, times scale, plus shift."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=eps), scale)


class _Projection(nn.Module):
    """A Linear that the file calls `proj`."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.proj = Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class DiT(nn.Module):
    """Velocity of the flow, v(z_t, t; history)."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.config = config
        dim = config.txt_dim
        self.txt_in = _Projection(config.txt_in_channels, dim)
        self.emb_in = TimeEmbedding(dim, config.emb_dim)
        self.blocks = nn.ModuleList(DiTBlock(config, i) for i in range(config.num_layers))
        self.txt_out_norm = LayerNorm(dim, config.norm_eps)
        self.txt_out_ada = nn.ModuleDict({"out_in": _modulator(config.emb_dim, 2 * dim)})
        self.txt_out = _Projection(dim, config.txt_out_channels)

    @property
    def dtype(self) -> torch.dtype:
        """Of the matrix products."""
        return self.txt_in.proj.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.txt_in.proj.weight.device

    @property
    def kv_elements(self) -> int:
        """Of a latent's keys and values in all layers."""
        return 2 * len(self.blocks) * self.config.heads * self.config.head_dim

    def rotary(self, positions: Tensor) -> Tensor:
        """Unit complex numbers of absolute latent positions: (...) -> (..., 1, rope_dim / 2)."""
        frequencies = to_device(rotary_frequencies(self.config.rope_dim, 10000.0), positions.device)
        return torch.complex(*rotary_angles(positions, frequencies)).unsqueeze(-2)

    def output_modulation(self, e: Tensor) -> tuple[Tensor, Tensor]:
        """shift and 1 + scale of the last norm from the time embedding, its own weight and bias included."""
        shift, scale = self.txt_out_ada["out_in"](e).float().chunk(2, dim=-1)
        norm = self.txt_out_norm
        return shift + norm.bias * (1 + scale), norm.weight * (1 + scale)

    def velocity(self, h: Tensor) -> Tensor:
        """Rows after the last norm, (..., D), to velocities, (..., d), float32."""
        return self.txt_out(h).float()

    def forward(self, z: Tensor, t: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """The network as written: rows z (..., d), t in 0..1000 and positions (...); gives velocities (..., d).

        Training and tests call it; sampling reads the modulation from a table instead (see `modulation.py`). Rows share
        times, so each modulation is computed once a time here too.
        """
        times, index = torch.unique(t, return_inverse=True)
        e, rotary = self.emb_in(times), self.rotary(positions)
        x = self.txt_in(z).float()
        for block in self.blocks:
            m: Modulation = block.modulation(e)  # type: ignore[operator]
            spread = {name: _rows(value, index) for name, value in vars(m).items()}
            x = block(x, Modulation(**spread), rotary, attend)
        shift, scale = (_rows(value, index) for value in self.output_modulation(e))
        return self.velocity(modulated_norm(x, shift, scale, self.config.norm_eps))


def _rows(table: Tensor, index: Tensor) -> Tensor:
    """The rows of (K, D) that `index` (...) names: (..., D)."""
    return table.index_select(0, index.flatten()).view(*index.shape, -1)
