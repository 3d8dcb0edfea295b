"""How to connect and how to generate: small frozen dataclasses. A field of None means: the server's default."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Literal, TypedDict

import numpy as np
from numpy.typing import ArrayLike

from colaserve.v1 import types_pb2
from colaserve_client.arrays import FloatArray
from colaserve_client.errors import invalid
from colaserve_client.fields import Field, Range, choices_of, documented
from colaserve_client.latents import LatentsLike

Solver = Literal["euler", "ab2", "heun"]
Interpolation = Literal["lerp", "slerp"]
LogprobsDtype = Literal["float32", "float16"]
Pooling = Literal["mean", "last_block", "per_block"]
Prompt = str | Sequence[int]  # a text, or its token ids

SOLVERS = choices_of(types_pb2.Solver.DESCRIPTOR)
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


@documented
@dataclass(frozen=True)
class NoiseSeed:
    """The seed of a run's noise; equal seeds repeat a run."""

    base_seed: Annotated[
        int, Field("Seed of what is drawn at random; equal seeds give equal results.", Range(0, 2**63 - 1), flat="seed")
    ]
    sample_id: Annotated[int, Field("Tells samples of one seed apart.", Range(0, 9_999))] = 0

    def noise(self, max_blocks: int, block_size: int, latent_dim: int, *, first_block: int = 0) -> FloatArray:
        """The noise that the seed stands for, (max_blocks, block_size, latent_dim), as `PriorClient.sample` takes it.

        It is what torch's CPU generator draws, whose rounding no other library repeats, so this needs torch, which the
        client does not bring along: an ImportError says so where it is not installed.
        """
        try:
            torch = import_module("torch")
        except ImportError as error:
            raise ImportError(f"NoiseSeed.noise() draws with torch's generator: pip install torch ({error})") from error
        blocks = []
        for block in range(first_block, first_block + max_blocks):
            generator = torch.Generator().manual_seed(self.base_seed + 1_000 * self.sample_id + 10_000_000 * block)
            blocks.append(torch.randn(block_size, latent_dim, generator=generator).numpy())
        return np.array(blocks, np.float32).reshape(max_blocks, block_size, latent_dim)


@documented
@dataclass(frozen=True, eq=False)
class Steering:
    """A probe of a latent whose gradient guides the latents that are written. Its score is that of
    `latent @ direction`, or log sigmoid(latent @ direction + bias) when it is logistic, summed over its columns."""

    direction: Annotated[FloatArray, Field("Numbers (d), or (d, k) for k columns, 1 to 64.")]
    bias: Annotated[FloatArray | None, Field("Of a logistic probe: a number, or (k) of them; unset: 0.")] = None
    scale: Annotated[float, Field("Strength; above 0 raises the score, below 0 lowers it.", Range(-1000, 1000))] = 1.0
    start: Annotated[float, Field("It steers from this time down; 1 is noise, 0 the end.", Range(0, 1))] = 1.0
    end: Annotated[float, Field("It does not steer at and below this time.", Range(0, 1))] = 0.0
    logistic: Annotated[bool, Field("Whether the probe is a logistic regression.")] = False


@documented
@dataclass(frozen=True)
class Sampler:
    """How latents are written from noise. In brackets: the default where server and checkpoint have none."""

    steps: Annotated[int | None, Field("Steps from noise to latents.", Range(1, 1000), 16)] = None
    guidance_scale: Annotated[
        float | None,
        Field("Weight of classifier-free guidance; 1 switches it off and halves the work.", Range(0, 1000), 7.0),
    ] = None
    solver: Annotated[Solver | None, Field("Integration rule.", default="euler", choices=SOLVERS)] = None
    guidance_start: Annotated[
        float | None, Field("Guidance is on from this time down; time runs from 1, noise, to 0.", Range(0, 1), 1.0)
    ] = None
    guidance_end: Annotated[
        float | None, Field("Guidance is off at and below this time; at most guidance_start.", Range(0, 1), 0.0)
    ] = None
    resamples: Annotated[int | None, Field("Times each step runs (RePaint).", Range(1, 100), 1)] = None
    stable_steps: Annotated[
        int | None,
        Field("End a block once its expected latents hardly move for so many steps; 0: never.", Range(0, 1000), 0),
    ] = None
    stable_distance: Annotated[
        float | None,
        Field("The most that a position may move (RMS) in each; needs stable_steps.", Range(0, 10_000, above=True)),
    ] = None
    steering: Annotated[Sequence[Steering], Field("Probes that steer the latents, up to 16; they add up.")] = ()


@documented
@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn from the decoder's logits. In brackets as for `Sampler`."""

    temperature: Annotated[
        float | None, Field("Temperature of the draws; 0 takes the most likely token.", Range(0, 100), 0.0)
    ] = None
    top_k: Annotated[int | None, Field("Draw from the k most likely tokens; 0 keeps all.", Range(0, 2**32 - 1), 50)] = (
        None
    )
    top_p: Annotated[
        float | None, Field("Draw from the likeliest tokens of this probability.", Range(0, 1, above=True), 0.9)
    ] = None
    repetition_penalty: Annotated[
        float | None,
        Field("Divides the scores of tokens of earlier blocks; 1 switches it off.", Range(0, 1000, above=True), 1.1),
    ] = None
    seed: Annotated[
        int | None,
        Field("Seed of the draws; unset: derived from the noise seed.", Range(0, 2**64 - 1), flat="sampling_seed"),
    ] = None


@documented
@dataclass(frozen=True)
class Scoring:
    """How the likelihood of a text is estimated. In brackets as for `Sampler`."""

    samples: Annotated[
        int | None, Field("Draws from the encoder's posterior; 0 takes its mean instead.", Range(0, 64), 1)
    ] = None
    probes: Annotated[int | None, Field("Probes of Hutchinson's estimator.", Range(1, 256), 8)] = None
    steps: Annotated[int | None, Field("Steps from latents to noise.", Range(1, 1000), 32)] = None
    solver: Annotated[Solver | None, Field("Integration rule.", default="heun", choices=SOLVERS)] = None


class CallFields(TypedDict, total=False):
    """What every call takes as keywords."""

    timeout: float | None
    request_id: str


class SamplerFields(CallFields, total=False):
    """A `Sampler`, or its fields, as keywords of a call."""

    sampler: Sampler | None
    steps: int | None
    guidance_scale: float | None
    solver: Solver | None
    guidance_start: float | None
    guidance_end: float | None
    resamples: int | None
    stable_steps: int | None
    stable_distance: float | None
    steering: Sequence[Steering]


class DensityFields(CallFields, total=False):
    """What a prior's `score` takes as keywords."""

    probes: int | None
    steps: int | None
    solver: Solver | None
    seed: int | NoiseSeed | None
    cache_salt: str


class ScoringFields(DensityFields, total=False):
    """The fields of `Scoring`, and what else a coordinator's `score` takes as keywords."""

    samples: int | None


class LogprobsFields(CallFields, total=False):
    """What `logprobs` takes as keywords."""

    top_logprobs: int
    logprob_ids: Sequence[int]
    all_logprobs: bool
    logprobs_dtype: LogprobsDtype | None
    cache_salt: str


class SampleFields(SamplerFields, total=False):
    """A `Sampler`, or its fields, and what else `sample_latents` takes as keywords."""

    seed: int | NoiseSeed | None
    cache_salt: str
    preview_every: int | None
    with_probes: bool


class CanvasFields(SampleFields, total=False):
    """The same of a prior's `sample`."""

    first_block: int
    noise: ArrayLike | None


class SamplingFields(CallFields, total=False):
    """A `Sampling`, or its fields, as keywords of a call."""

    sampling: Sampling | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    repetition_penalty: float | None
    sampling_seed: int | None


class DecodeFields(SamplingFields, total=False):
    """A `Sampling`, or its fields, and what else `decode_latents` takes as keywords."""

    top_logprobs: int | None
    target_ids: Sequence[int]
    token_count: int | None


class SessionFields(SamplingFields, LogprobsFields, total=False):
    """A `Sampling`, or its fields, and what else a decoder's `session` takes as keywords."""

    history_ids: Sequence[int]
    target_ids: Sequence[int]
    with_logits: bool
    with_probes: bool
    max_latents: int


class WritingFields(SamplerFields, SamplingFields, total=False):
    """Both, and what else calls take that write."""

    seed: int | NoiseSeed | None
    cache_salt: str


@documented
@dataclass(frozen=True)
class GenerationRequest:
    """One generation of a batch; the same fields as `Client.generate` takes.

    Attributes:
        prompt: a text, or token ids; may be empty.
        sampler: how latents are sampled.
        sampling: how tokens are drawn.
        seed: of the noise; None: random, and returned.
    """

    prompt: Prompt
    max_new_tokens: Annotated[int | None, Field("Tokens to write at most.", Range(1, 2**32 - 1), 32)] = None
    sampler: Sampler | None = None
    sampling: Sampling | None = None
    seed: int | NoiseSeed | None = None
    stop: Annotated[Sequence[str], Field("The text ends before the first of these strings, up to 16.")] = ()
    ignore_end: Annotated[bool, Field("Write on past end tokens.")] = False
    with_latents: Annotated[bool, Field("Return the latents of the written blocks, too.", option="--latents")] = False
    top_logprobs: Annotated[
        int | None, Field("Return log-probabilities, and those of so many likely tokens.", Range(0, 20))
    ] = None
    print_special: Annotated[bool, Field("Print end and pad tokens in the text.")] = False
    cache_salt: Annotated[str, Field("Share cached prefixes only with requests of the same salt.")] = ""
    preview_every: Annotated[
        int | None,
        Field("Send a preview of the block under way after every so many steps; 0 sends none.", Range(0, 1000), 0),
    ] = None
    with_probes: Annotated[
        bool, Field("Return probes of each block, numbers that tell how sure it is, too.", option="--probes")
    ] = False
    choices: Annotated[Sequence[str], Field("Write one of these, 2 to 64: the likeliest.", option="--choice")] = ()


@dataclass(frozen=True, eq=False)
class Branch:
    """One continuation of `Client.fork`. A field that is None or empty is taken from the call.

    Attributes:
        seed: of the noise; None: sample i of the call's seed for branch i.
        noise: the noise itself instead, (blocks, B, d), as many blocks as max_new_tokens needs.
        sampler: how latents are sampled; unset fields are the call's.
        sampling: how tokens are drawn; unset fields are the call's.
        max_new_tokens: tokens to write at most.
        stop: the text ends before the first of these strings.
        written: its first k blocks, (k * B, d), of an earlier run; the branch continues after them as that run did.
    """

    seed: int | NoiseSeed | None = None
    noise: ArrayLike | None = None
    sampler: Sampler | None = None
    sampling: Sampling | None = None
    max_new_tokens: int | None = None
    stop: Sequence[str] = ()
    written: LatentsLike | None = None


class ForkFields(WritingFields, total=False):
    """What the branches of a fork share, as keywords of a call."""

    max_new_tokens: int | None
    stop: Sequence[str]
    ignore_end: bool
    top_logprobs: int | None
    print_special: bool
    preview_every: int | None
    with_probes: bool


class GenerationFields(ForkFields, total=False):
    """The fields of `GenerationRequest`, and those of its sampler and its sampling, as keywords of a call."""

    with_latents: bool
    choices: Sequence[str]
