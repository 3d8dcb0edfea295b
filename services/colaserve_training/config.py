"""Settings of a training run: small frozen dataclasses, checked once, before anything is computed."""

from __future__ import annotations

from dataclasses import dataclass, field

from colaserve_services.errors import UsageError

MOST = 2**31 - 1  # of what is counted


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

    def __post_init__(self) -> None:
        if not 0 < self.adamw_lr < float("inf"):
            raise UsageError(f"lr: got {self.adamw_lr}, expected a number above 0")
        for name in ("muon_lr", "weight_decay", "clip", "warmup"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UsageError(f"{name}: got {getattr(self, name)}, expected 0 or more")


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

    def __post_init__(self) -> None:
        _at_least("steps", self.steps, 1)
        _at_least("rows", self.rows, 1)
        _at_least("save_every", self.save_every, 0)
        _at_least("check_every", self.check_every, 0)
        _at_least("log_every", self.log_every, 1)
        if not 0 <= self.seed < 2**64:
            raise UsageError(f"seed: got {self.seed}, expected 0 to {2**64 - 1}")
        if not 1 <= self.micro_batches <= self.rows:
            raise UsageError(f"micro_batches: got {self.micro_batches}, expected 1 to rows ({self.rows})")
        if not 0 <= self.ema < 1:
            raise UsageError(f"ema: got {self.ema}, expected 0 (off) up to but not including 1")


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

    def __post_init__(self) -> None:
        _at_least("copies", self.copies, 1)
        _at_least("max_copies", self.max_copies, self.copies)
        for name in ("empty_history", "pin", "uniform_time", "pure_noise"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"{name}: got {getattr(self, name)}, expected a share from 0 to 1")


@dataclass(frozen=True)
class JointConfig:
    """Stage 2 with a trained VAE: its own losses, and a leash to the encoder it started from."""

    vae_weight: float = 1.0
    reference_kl: float = 0.1
    loss: VaeLossConfig = field(default_factory=VaeLossConfig)


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise UsageError(f"{name}: got {value}, expected at least {least}")
    if value > MOST:
        raise UsageError(f"{name}: got {value}, expected at most {MOST}")
