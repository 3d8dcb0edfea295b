"""Sizes of networks to train from nothing, and the learning rates that go with a size."""

from __future__ import annotations

from dataclasses import dataclass, replace

from colaserve_services.errors import UsageError
from colaserve_services.model.config import DiTConfig, TextVAEConfig

_FULL_RATE, _WIDTH = 2e-3, 192  # AdamW's rate, tried up to this width; wider networks want less
_FINE_TUNING = 0.1  # of the rate from nothing


@dataclass(frozen=True)
class Preset:
    """Both networks of one size. Where another width is asked for, heads and feed-forward keep their proportions."""

    vae: TextVAEConfig
    dit: DiTConfig

    def vae_config(
        self,
        vocab_size: int,
        dim: int | None = None,
        blocks: int | None = None,
        block_size: int | None = None,
        patch_size: int | None = None,
    ) -> TextVAEConfig:
        """The Text VAE, other values than the preset's where they are given."""
        base, dim = self.vae, dim or self.vae.dim
        if dim % min(dim, base.head_dim) or dim % 2:
            raise UsageError(f"--dim: got {dim}, expected a multiple of {base.head_dim}, the width of a head")
        return replace(
            base, vocab_size=vocab_size, dim=dim, ffn_dim=dim * base.ffn_dim // base.dim,
            num_heads=max(1, dim // base.head_dim), encoder_num_blocks=blocks or base.encoder_num_blocks,
            decoder_num_blocks=blocks or base.decoder_num_blocks, block_size=block_size or base.block_size,
            patch_size=patch_size or base.patch_size,
        )  # fmt: skip

    def dit_config(
        self, latent_dim: int = 16, dim: int | None = None, layers: int | None = None, block_size: int | None = None
    ) -> DiTConfig:
        """The prior, other values than the preset's where they are given."""
        base, dim = self.dit, dim or self.dit.txt_dim
        return replace(
            base, txt_in_channels=latent_dim, txt_out_channels=latent_dim, txt_dim=dim, emb_dim=dim,
            heads=max(1, dim // base.head_dim), num_layers=layers or base.num_layers,
            block_size=block_size or base.block_size,
        )  # fmt: skip


PRESETS = {
    "demo": Preset(
        TextVAEConfig(
            encoder_num_blocks=2, decoder_num_blocks=2, dim=128, ffn_dim=512, num_heads=4, block_size=1
        ),
        DiTConfig(txt_dim=192, emb_dim=192, heads=6, head_dim=32, num_layers=4, rope_dim=32),
    ),
    "small": Preset(
        TextVAEConfig(
            encoder_num_blocks=2, decoder_num_blocks=2, dim=512, ffn_dim=2048, num_heads=8, block_size=1
        ),
        DiTConfig(txt_dim=512, emb_dim=512, heads=8, head_dim=64, num_layers=8, rope_dim=48),
    ),
    "released": Preset(TextVAEConfig(), DiTConfig()),
}  # fmt: skip


def full_rate(width: int, fine_tuning: bool) -> float:
    """AdamW's full rate for a network of this width."""
    return _FULL_RATE * min(1.0, _WIDTH / width) * (_FINE_TUNING if fine_tuning else 1.0)
