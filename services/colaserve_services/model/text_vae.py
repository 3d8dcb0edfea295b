"""Text VAE (arXiv:2605.06548): token ids to latents and back, block-causal transformers on both sides.

Parameter names are those of cola_vae/model.safetensors. Rows may have any leading shape; `attend` mixes them.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from colaserve_services.model.config import TextVAEConfig
from colaserve_services.model.layers import (
    Attend,
    LayerNorm,
    Linear,
    block_causal_mask,
    masked_attention,
    rotary_angles,
    rotary_frequencies,
    to_device,
)

Rotary = tuple[Tensor, Tensor]  # cos, sin: (..., head_dim / 2)


class TextVAEBlock(nn.Module):
    """Attention, then a feed-forward. With post_norm, norm_attn is on the residual and norm_ffn on the branch."""

    def __init__(self, config: TextVAEConfig, layer: int):
        super().__init__()
        dim, eps, bias = config.dim, config.layer_norm_eps, config.bias
        self.config, self.layer = config, layer
        self.norm_attn = LayerNorm(dim, eps, elementwise_affine=config.layer_norm_affine)
        self.qkv_proj = Linear(dim, 3 * dim, bias=config.qk_bias)
        if config.qk_norm:
            self.q_norm = LayerNorm(dim, eps, elementwise_affine=config.qk_norm_affine)
            self.k_norm = LayerNorm(dim, eps, elementwise_affine=config.qk_norm_affine)
        self.attn_out_proj = Linear(dim, dim, bias=bias)
        self.norm_ffn = LayerNorm(dim, eps)
        self.ffn_proj = Linear(dim, config.ffn_dim, bias=bias, activation=config.act)
        self.ffn_out = Linear(config.ffn_dim // 2 if config.act == "swiglu" else config.ffn_dim, dim, bias=bias)

    def forward(self, x: Tensor, rotary: Rotary, attend: Attend) -> Tensor:  # x: (..., D)
        if self.config.post_norm:
            x = self.norm_attn(x) + self._attention(x, rotary, attend)
            return x + self.norm_ffn(self.ffn_out(self.ffn_proj(x)))
        x = x + self._attention(self.norm_attn(x), rotary, attend)
        return x + self.ffn_out(self.ffn_proj(self.norm_ffn(x)))

    def _attention(self, x: Tensor, rotary: Rotary, attend: Attend) -> Tensor:
        qkv = self.qkv_proj(x)
        if self.config.clip_qkv is not None:
            qkv = qkv.clamp(-self.config.clip_qkv, self.config.clip_qkv)
        q, k, v = qkv.chunk(3, dim=-1)
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.unflatten(-1, (self.config.num_heads, -1)) for t in (q, k, v))
        q, k = _rotate_halves(torch.stack((q, k)), rotary, self.config.rope_full_precision, v.dtype)
        return self.attn_out_proj(attend(self.layer, q, k, v).flatten(-2))


def _rotate_halves(x: Tensor, rotary: Rotary, full_precision: bool, dtype: torch.dtype) -> Tensor:
    """Rotate pairs (i, i + head_dim/2) of each head; x: (..., heads, head_dim)."""
    compute = torch.float32 if full_precision else dtype
    cos, sin = (t.unsqueeze(-2).to(compute) for t in rotary)
    first, second = x.to(compute).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(dtype)


class PatchEmbedder(Linear):
    """P token embeddings to one latent row; the weight is that of a Conv1d with kernel = stride = P: (D, D, P)."""

    def __init__(self, dim: int, patch_size: int):
        super().__init__(dim * patch_size, dim)
        self.weight = nn.Parameter(self.weight.detach().view(dim, patch_size, dim).transpose(1, 2).contiguous())

    def forward(self, x: Any) -> Any:  # (..., P * D), token after token -> (..., D)
        if self.weight.ndim == 3:  # in training
            return F.linear(x, self._flat(), self.bias)
        return super().forward(x)

    def pack(self) -> None:
        self.weight = nn.Parameter(self._flat().detach(), requires_grad=False)
        super().pack()

    def _flat(self) -> Tensor:
        """The weight for tokens one after the other: (D, P * D)."""
        return self.weight.transpose(1, 2).flatten(1)


class _Transformer(nn.Module):
    """Rotary table and blocks, shared by both halves."""

    final_layer: Linear

    def __init__(self, config: TextVAEConfig, num_blocks: int):
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(TextVAEBlock(config, i) for i in range(num_blocks))

    @property
    def num_layers(self) -> int:
        return len(self.blocks)

    @property
    def dtype(self) -> torch.dtype:
        """Of the matrix products."""
        return self.final_layer.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.final_layer.weight.device

    @property
    def kv_elements(self) -> int:
        """Of a latent's keys and values in all layers."""
        return 2 * len(self.blocks) * self.config.dim

    def rotary(self, positions: Tensor) -> Rotary:
        """Of latent positions (...)."""
        frequencies = to_device(rotary_frequencies(self.config.head_dim, self.config.rope_theta), positions.device)
        return rotary_angles(positions, frequencies)

    def transform(self, x: Tensor, rotary: Rotary, attend: Attend) -> Tensor:
        """Rows x: (..., D)."""
        x = x.float()
        for block in self.blocks:
            x = block(x, rotary, attend)
        return x


class TextVAEEncoder(_Transformer):
    """Token ids to the posterior over latents, q(z | x)."""

    def __init__(self, config: TextVAEConfig):
        super().__init__(config, config.encoder_num_blocks)
        self.wte = nn.Embedding(config.vocab_size + 1, config.dim)
        self.patch_embedder = PatchEmbedder(config.dim, config.patch_size)
        outputs = 2 * config.latent_dim if config.use_variation else config.latent_dim
        self.final_layer = Linear(config.dim, outputs, bias=config.bias)

    def forward(self, ids: Tensor, positions: Tensor, attend: Attend) -> tuple[Tensor, Tensor | None]:
        """ids: (..., n * P) padded to whole latents; positions: (..., n). Gives mean and log variance, (..., n, d)."""
        return self.posterior(self.transform(self.embed(ids), self.rotary(positions), attend))

    def embed(self, ids: Tensor) -> Tensor:
        """(..., n * P) to rows (..., n, D)."""
        tokens = self.wte(ids)
        return self.patch_embedder(tokens.unflatten(-2, (-1, self.config.patch_size)).flatten(-2))

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Rows after the last block to the mean, before normalisation, and the log variance in [-30, 20]."""
        outputs = self.final_layer(x).float()
        d, logvar = self.config.latent_dim, None
        mean = outputs[..., :d]
        if self.config.use_variation:
            logvar = outputs[..., d:].clamp(-30.0, 20.0)
        if self.config.encoder_last_ln or not self.config.use_variation:
            mean = F.layer_norm(mean, (d,), eps=self.config.layer_norm_eps)
        return mean, logvar

    def normalise(self, mean: Tensor) -> Tensor:
        """z = (mean - shifting_factor) * scaling_factor: what everything downstream works on."""
        return (mean - self.config.shifting_factor) * self.config.scaling_factor


class TextVAEDecoder(_Transformer):
    """Normalised latents to token logits, p(x | z)."""

    def __init__(self, config: TextVAEConfig):
        super().__init__(config, config.decoder_num_blocks)
        self.in_layer = Linear(config.latent_dim, config.dim, bias=config.bias)
        self.unpatch_layer = Linear(config.dim, config.patch_size * config.dim)
        self.final_norm = LayerNorm(config.dim, config.layer_norm_eps)
        self.final_layer = Linear(config.dim, config.vocab_size, bias=config.bias)

    def forward(self, latents: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """latents: (..., n, d) at positions (..., n). Gives logits (..., n * P, vocab_size), float32."""
        return self.logits(self.transform(self.in_layer(latents), self.rotary(positions), attend))

    def logits(self, x: Tensor) -> Tensor:
        """Rows after the last block, (..., n, D), to logits, (..., n * P, vocab_size), float32."""
        x = self.unpatch_layer(x).unflatten(-1, (self.config.dim, self.config.patch_size))
        x = x.transpose(-2, -1).flatten(-3, -2)
        return self.final_layer(self.final_norm(x)).float()


class TextVAE(nn.Module):
    """Both halves, for training."""

    def __init__(self, config: TextVAEConfig):
        super().__init__()
        self.config = config
        self.encoder = TextVAEEncoder(config)
        self.decoder = TextVAEDecoder(config)

    def encode(self, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """Whole sequences, ids: (N, n * P), to the normalised mean and the log variance, (N, n, d)."""
        positions = torch.arange(ids.shape[-1] // self.config.patch_size, device=ids.device)
        mean, logvar = self.encoder(ids, positions, self._attend(positions))
        return self.encoder.normalise(mean), logvar

    def decode(self, latents: Tensor) -> Tensor:
        """Whole sequences, (N, n, d), to logits (N, n * P, vocab_size)."""
        positions = torch.arange(latents.shape[-2], device=latents.device)
        return self.decoder(latents, positions, self._attend(positions))

    def _attend(self, positions: Tensor) -> Attend:
        return masked_attention(block_causal_mask(positions, positions, self.config.block_size))
