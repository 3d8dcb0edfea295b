"""Settings of a training run and shapes of networks to train from nothing. The command line checks what it is given."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from colaserve_services.errors import UsageError
from colaserve_services.model.config import DiTConfig, TextVAEConfig

_FULL_RATE, _WIDTH = 2e-3, 192  # AdamW's rate, tried up to this width; wider networks want less
_FINE_TUNING = 0.1  # of the rate from nothing


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW for everything, or Muon for the matrices inside blocks and AdamW for the rest."""

    adamw_lr: float = 2e-3
    muon_lr: float = 0.0  # 0: no Muon, AdamW trains every parameter
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float = 1.0  # largest gradient norm over all parameters; 0 switches clipping off
    warmup: int = 50  # steps from 0 to the full rate, linear
    cooldown: float = 0.7  # last share of the run over which the rate falls to `final`, as a half cosine
    final: float = 0.02  # the rate at the last step, as a share of the full rate


@dataclass(frozen=True)
class RunConfig:
    """How long, how large, how often."""

    steps: int = 1000
    rows: int = 64  # sequences a step, over all processes and micro-batches
    micro_batches: int = 1  # a step's rows are sorted by length and cut into so many passes
    seed: int = 0
    ema: float = 0.999  # decay of the averaged weights, which are what is written; 0 writes the last weights
    log_every: int = 10
    save_every: int = 500  # steps between resumable states; 0 writes one at the end or when a signal ends the run
    check_every: int = 0  # steps between checks (validation loss and sample texts); 0 makes none
    autocast: bool = False  # bfloat16 matrix products (weights and optimizer stay float32)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)


@dataclass(frozen=True)
class VaeLossConfig:
    """Weights and noise of stage 1 (MODEL.md section 7)."""

    kl: float = 5e-3  # beta
    masking: float = 0.1  # lambda
    masked_rows: float = 0.5  # share of the rows that have masked tokens
    masked_tokens: float = 0.1  # share of such a row's tokens
    decoder_noise: float = 0.3  # the decoder sees latents + sigma * noise, sigma ~ U(0, this), once a row


@dataclass(frozen=True)
class FlowConfig:
    """How stage 2 makes noisy copies of blocks."""

    copies: int = 4  # noisy blocks a row at least; a row with more blocks to train has one of each
    max_copies: int = 16
    empty_history: float = 0.12  # share of copies without history: the unconditional branch of guidance
    history_noise: float = 0.05  # clean history + sigma * noise, sigma ~ U(0, this), once a row
    pin: float = 0.3  # share of copies with 1 to B-1 leading positions pinned where no prompt pins any
    uniform_time: float = 0.5  # share of times from U(0, 1); the others are logit-normal(loc, scale)
    loc: float = 1.0
    scale: float = 1.0
    pure_noise: float = 0.05  # share of copies at exactly t = 1, where generation starts


@dataclass(frozen=True)
class JointConfig:
    """Stage 2 with a trained VAE: its own losses, and a KL that ties it to the encoder it started from."""

    vae_weight: float = 1.0
    reference_kl: float = 0.1
    loss: VaeLossConfig = field(default_factory=VaeLossConfig)


@dataclass(frozen=True)
class Preset:
    """Both networks of one size. Where another width is asked for, heads and feed-forward keep their proportions."""

    vae: TextVAEConfig
    dit: DiTConfig

    def vae_config(
        self, vocab_size: int, dim: int | None = None, blocks: int | None = None, block_size: int | None = None,
        patch_size: int | None = None,
    ) -> TextVAEConfig:  # fmt: skip
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
