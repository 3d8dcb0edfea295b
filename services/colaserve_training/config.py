"""Settings of a training run, shapes of networks to train from nothing, and the options made of both."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

import click

from colaserve_services.errors import UsageError
from colaserve_services.model.config import DiTConfig, TextVAEConfig

T = TypeVar("T", bound=Any)

_FULL_RATE, _WIDTH = 2e-3, 192  # AdamW's rate, tried up to this width; wider networks want less
_FINE_TUNING = 0.1  # of the rate from nothing

SIZE, COUNT = click.IntRange(1, 2**31 - 1), click.IntRange(0, 2**31 - 1)
RATE = click.FloatRange(min=0)


def _option(default: Any, kind: click.ParamType[Any] | None = None, text: str = "") -> Any:
    """A field that is also an option of `train vae` and `train prior`; without a type it is a flag."""
    return field(default=default, metadata={"type": kind, "is_flag": kind is None, "help": text})


def field_options(kind: type[Any]) -> list[Callable[[Any], Any]]:
    """The options that fields of a dataclass are."""
    return [
        click.option(f"--{each.name.replace('_', '-')}", default=each.default, show_default=True, **each.metadata)
        for each in fields(kind)
        if each.metadata
    ]


def taken(kind: type[T], values: Mapping[str, Any], **others: Any) -> T:
    """A dataclass of the values of its options, and of others."""
    return kind(**{each.name: values[each.name] for each in fields(kind) if each.metadata}, **others)


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW for everything, or Muon for the matrices inside blocks and AdamW for the rest."""

    adamw_lr: float = 2e-3
    muon_lr: float = _option(0.0, RATE, "Muon's full rate; 0: AdamW for all.")
    weight_decay: float = _option(0.0, RATE)
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float = _option(1.0, RATE, "Largest gradient norm; 0: any.")
    warmup: int = _option(50, COUNT, "Steps until the rate is full.")
    cooldown: float = 0.7  # last share of the run over which the rate falls to `final`, as a half cosine
    final: float = 0.02  # the rate at the last step, as a share of the full rate


@dataclass(frozen=True)
class RunConfig:
    """How long, how large, how often."""

    steps: int = _option(1000, SIZE)
    rows: int = _option(64, SIZE, "Sequences a step, over all processes.")
    micro_batches: int = _option(1, SIZE, "Passes that share a step, each with rows of like length.")
    seed: int = _option(0, click.IntRange(0, 2**64 - 1))
    ema: float = _option(
        0.995, click.FloatRange(0, 1, max_open=True), "Decay of the averaged weights, which are written; 0: off."
    )
    log_every: int = 10
    save_every: int = _option(500, COUNT, "Steps between states; 0: only at the end, and when a signal ends the run.")
    check_every: int = _option(100, COUNT, "Steps between checks: loss on held-out rows, and sample texts; 0: none.")
    autocast: bool = _option(False, text="bfloat16 matrix products; weights and optimizer stay float32.")
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


VAE_LOSS, FLOW, JOINT = VaeLossConfig(), FlowConfig(), JointConfig()


@dataclass(frozen=True)
class Preset:
    """Both networks of one size. Where another width is asked for, heads and feed-forward keep their proportions."""

    vae: TextVAEConfig
    dit: DiTConfig

    def vae_config(
        self, vocab_size: int, dim: int | None = None, blocks: int | None = None, **others: int | None
    ) -> TextVAEConfig:
        """The Text VAE; values that are given, `block_size` and `patch_size` among them, win over the preset's."""
        base, dim = self.vae, dim or self.vae.dim
        if dim % min(dim, base.head_dim) or dim % 2:
            raise UsageError(f"--dim: got {dim}, expected a multiple of {base.head_dim}, the width of a head")
        others |= {"encoder_num_blocks": blocks, "decoder_num_blocks": blocks}
        width = {"dim": dim, "ffn_dim": dim * base.ffn_dim // base.dim, "num_heads": max(1, dim // base.head_dim)}
        return _changed(base, vocab_size=vocab_size, **width, **others)

    def dit_config(self, latent_dim: int = 16, dim: int | None = None, **others: int | None) -> DiTConfig:
        """The prior; values that are given, `num_layers` and `block_size` among them, win over the preset's."""
        base, dim = self.dit, dim or self.dit.txt_dim
        width = {"txt_dim": dim, "emb_dim": dim, "heads": max(1, dim // base.head_dim)}
        return _changed(base, txt_in_channels=latent_dim, txt_out_channels=latent_dim, **width, **others)


def _changed(config: T, **values: int | None) -> T:
    return replace(config, **{name: value for name, value in values.items() if value is not None})


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
