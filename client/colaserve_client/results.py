"""What calls return: small frozen dataclasses, built from the messages by `responses.py`."""

from dataclasses import dataclass, field
from typing import Literal

from colaserve_client.arrays import FloatArray
from colaserve_client.errors import ColaserveError
from colaserve_client.latents import Latents
from colaserve_client.settings import GenerationRequest, NoiseSeed, Sampler, Sampling

FinishReason = Literal["stop", "length"]  # an end token or a stop string; max_new_tokens were written


@dataclass(frozen=True)
class Timing:
    """Where the time of a call, or of one block, went."""

    queue_us: int  # microseconds between arrival and the first work
    compute_us: int  # microseconds between the first work and the result


@dataclass(frozen=True)
class Usage:
    """What a generation used."""

    prompt_tokens: int
    completion_tokens: int
    blocks: int  # that the prior wrote, wasted ones included
    wasted_blocks: int  # of these, written after the end of the text because the prior runs ahead


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities at one position, of the raw logits."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob) of the most likely tokens, best first


@dataclass(frozen=True)
class GenerationChunk:
    """What one written block brought."""

    text: str  # all chunks' texts joined are the whole text
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]  # one a token when top_logprobs was given
    latents: Latents | None  # (B, d), when asked for
    finish_reason: FinishReason | None  # in the last chunk, as are usage and seed
    usage: Usage | None
    seed: NoiseSeed | None
    timing: Timing  # of the block; in the last chunk of the whole call


@dataclass(frozen=True)
class GenerationResult:
    """A whole generation."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]  # one a token when top_logprobs was given
    latents: Latents | None  # all blocks in a row, when asked for
    finish_reason: FinishReason
    usage: Usage
    seed: NoiseSeed  # repeats this run
    timing: Timing
    request_id: str


@dataclass(frozen=True)
class GenerationOutcome:
    """One request of a batch and what came of it: a result or an error."""

    request: GenerationRequest
    result: GenerationResult | None
    error: ColaserveError | None

    def unwrap(self) -> GenerationResult:
        """The result; raises the error where there is none."""
        if self.result is None:
            assert self.error is not None
            raise self.error
        return self.result


@dataclass(frozen=True)
class Tokens:
    """A tokenized text."""

    ids: tuple[int, ...]
    texts: tuple[str, ...]  # of each id; bytes that are no complete character read as U+FFFD


@dataclass(frozen=True)
class TextEncoding:
    """An encoded text."""

    latents: Latents
    log_variance: FloatArray | None = field(compare=False)  # same shape as the latents, when asked for
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class DecodedLatents:
    """Latents turned into text."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]  # one a token when top_logprobs was given
    target_logprobs: tuple[float, ...]  # one for each of target_ids
    timing: Timing


@dataclass(frozen=True)
class LatentBlock:
    """One block that the prior wrote."""

    index: int
    latents: Latents  # (B, d); known positions as given
    timing: Timing
    seed: NoiseSeed | None  # repeats the run; None from a prior that is called directly


@dataclass(frozen=True)
class InterpolationPoint:
    """One point of a walk between two texts or latents."""

    weight: float  # 0 at the start, 1 at the end
    latents: Latents
    text: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class InfillResult:
    """A text whose holes were written."""

    text: str  # all segments joined
    segments: tuple[str, ...]  # one for each segment of the request; kept ones as given
    token_ids: tuple[int, ...]  # of all segments
    usage: Usage
    seed: NoiseSeed  # repeats this run
    timing: Timing


@dataclass(frozen=True)
class Reconstruction:
    """A text after its round trip through the latent space."""

    text: str
    token_ids: tuple[int, ...]
    original_ids: tuple[int, ...]  # as many as token_ids
    token_accuracy: float  # share of positions where both agree, 0 to 1
    bits_per_token: float  # -log2 of the decoder's probability of the original ids, mean


@dataclass(frozen=True)
class SequenceEncoding:
    """What the encoder made of one sequence of token ids."""

    latents: Latents
    log_variance: FloatArray | None = field(compare=False)


@dataclass(frozen=True)
class DecodedBlock:
    """What the decoder made of one block; nothing is trimmed."""

    token_ids: tuple[int, ...]  # B * P
    logprobs: tuple[TokenLogprobs, ...]
    logits: FloatArray | None = field(compare=False)  # (B * P, vocab_size), when asked for
    target_logprobs: tuple[float, ...]
    timing: Timing


@dataclass(frozen=True)
class ModelShape:
    """The shape of the model that a service holds."""

    latent_dim: int  # d
    block_size: int  # B, latents a block
    vae_block_size: int  # latents a block of the Text VAE's mask
    patch_size: int  # P, tokens a latent
    vocab_size: int
    parameters: int


@dataclass(frozen=True)
class Limits:
    """What a service takes at most; 0: not limited by it."""

    max_context: int  # latent positions of a session
    max_message_bytes: int
    max_running: int
    max_waiting: int
    kv_bytes: int
    run_ahead: int


@dataclass(frozen=True)
class ServerInfo:
    """The process that answers, and its load at that moment."""

    version: str
    device: str  # empty where no network runs
    dtype: str
    running: int
    waiting: int
    kv_bytes_used: int
    uptime_seconds: float


@dataclass(frozen=True)
class StageInfo:
    """A stage as the coordinator sees it."""

    stage: str  # "encoder", "prior" or "decoder"
    target: str  # "in-process" when it lives in the coordinator's process
    serving: bool
    space: str
    limits: Limits
    server: ServerInfo


@dataclass(frozen=True)
class ServiceInfo:
    """A service: what it holds and how busy it is."""

    model: ModelShape
    space: str  # fingerprint of its latent space
    limits: Limits
    server: ServerInfo
    has_variance: bool | None = None  # whether an encoder knows log variances; None for other services


@dataclass(frozen=True)
class ModelInfo:
    """What a coordinator serves."""

    name: str
    model: ModelShape  # parameters of all stages together
    space: str
    limits: Limits
    server: ServerInfo
    default_sampler: Sampler
    default_sampling: Sampling
    default_max_new_tokens: int
    chat_frame: str  # around one user message, with the place "{prompt}"; empty: the message as it is
    end_ids: tuple[int, ...]
    pad_id: int
    stages: tuple[StageInfo, ...]
