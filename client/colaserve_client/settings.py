"""How to connect and how to generate: small frozen dataclasses. A field of None means: the server's default."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from colaserve_client.errors import invalid

Solver = Literal["euler", "ab2", "heun"]
Interpolation = Literal["lerp", "slerp"]
Prompt = str | Sequence[int]  # a text, or its token ids

DEFAULT_TARGET = "127.0.0.1:50051"
_MIB = 1 << 20


@dataclass(frozen=True)
class Tls:
    """An encrypted connection; all files are PEM.

    Attributes:
        ca: the authorities to trust; None: those that gRPC ships with.
        cert: this side's certificate chain, for mutual TLS; needs key.
        key: its private key.
        server_name: the name to expect in the server's certificate; None: the target's host.
    """

    ca: str | Path | None = None
    cert: str | Path | None = None
    key: str | Path | None = None
    server_name: str | None = None

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            raise invalid("tls", "cert and key belong together; got only one of them")


@dataclass(frozen=True)
class Retry:
    """How often a call is tried that failed before anything came back.

    Only what is safe is tried again: Unavailable and Overloaded before the first message. A server's hint
    (google.rpc.RetryInfo) comes before the pauses here.

    Attributes:
        attempts: in all; 1 switches retries off.
        first_pause: seconds before the second attempt.
        growth: each later pause is this much longer.
        longest_pause: seconds; a longer hint of the server's counts in full.
    """

    attempts: int = 4
    first_pause: float = 0.2
    growth: float = 2.0
    longest_pause: float = 10.0

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise invalid("retry.attempts", f"expected 1 or more, got {self.attempts}")

    def pause(self, failures: int) -> float:
        """Seconds to wait after so many failures, when the server gave no hint."""
        return min(self.first_pause * self.growth ** (failures - 1), self.longest_pause)


@dataclass(frozen=True)
class Connection:
    """How the connection is kept.

    Attributes:
        keepalive: seconds between pings on a silent connection; servers may refuse more frequent ones.
        keepalive_timeout: seconds without an answer to a ping after which the connection is broken.
        idle: seconds without a call after which it is closed; the next call opens it again.
        max_message_bytes: of one message, either way.
        load_balancing: over the addresses that the name resolves to.
    """

    keepalive: float = 60.0
    keepalive_timeout: float = 20.0
    idle: float = 1800.0
    max_message_bytes: int = 64 * _MIB
    load_balancing: Literal["round_robin", "pick_first"] = "round_robin"


@dataclass(frozen=True)
class NoiseSeed:
    """The seed of a run's noise; equal seeds repeat a run.

    Attributes:
        base_seed: any number from 0 on; base_seed + sample_id is below 2^63.
        sample_id: below 10,000: tells samples of one base_seed apart.
    """

    base_seed: int
    sample_id: int = 0


@dataclass(frozen=True)
class Sampler:
    """How latents are carried from noise to text. In brackets: the default where server and checkpoint have none.

    Attributes:
        steps: [16] 1 to 1000.
        guidance_scale: [7] 0 to 1000; 1 switches guidance off and halves the work.
        solver: [euler] "euler", "ab2" or "heun".
        guidance_start: [1] guidance is on where guidance_start >= t > guidance_end.
        guidance_end: [0] see guidance_start.
        resamples: [1] times each step runs (RePaint).
    """

    steps: int | None = None
    guidance_scale: float | None = None
    solver: Solver | None = None
    guidance_start: float | None = None
    guidance_end: float | None = None
    resamples: int | None = None


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn from the decoder's logits. In brackets as for `Sampler`.

    Attributes:
        temperature: [0] 0 to 100; 0 takes the most likely token.
        top_k: [50] 0 keeps all.
        top_p: [0.9] above 0, at most 1.
        repetition_penalty: [1.1] above 0; 1 switches it off.
        seed: of the draws; unset: derived from the noise seed.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None


@dataclass(frozen=True)
class GenerationRequest:
    """One generation of a batch; the same fields as `Client.generate` takes.

    Attributes:
        prompt: a text, or token ids; may be empty.
        max_new_tokens: [32].
        sampler: how latents are sampled.
        sampling: how tokens are drawn.
        seed: of the noise; None: random, and returned.
        stop: up to 16 strings; the text ends before the first of them.
        ignore_end: write on past end tokens.
        with_latents: also return the latents of the written blocks.
        top_logprobs: 0 to 20: also return log-probabilities, of so many likely tokens too.
        print_special: print end and pad tokens in the text.
    """

    prompt: Prompt
    max_new_tokens: int | None = None
    sampler: Sampler | None = None
    sampling: Sampling | None = None
    seed: int | NoiseSeed | None = None
    stop: Sequence[str] = ()
    ignore_end: bool = False
    with_latents: bool = False
    top_logprobs: int | None = None
    print_special: bool = False
