"""What calls return: small frozen dataclasses, built from the messages by `responses.py`."""

from dataclasses import dataclass, field, fields
from typing import Literal

from colaserve_client.arrays import FloatArray
from colaserve_client.errors import ColaserveError
from colaserve_client.latents import Latents
from colaserve_client.settings import GenerationRequest, NoiseSeed, Sampler, Sampling
from colaserve_client.tables import html_table

_SHOWN = 200  # characters of a value, in a notebook
FinishReason = Literal["stop", "length"]  # an end token or a stop string; max_new_tokens were written


class _Text:
    """What is a text before all: `str` gives it, and a notebook shows it above the rest."""

    text: str

    def __str__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        values = {each.name: repr(getattr(self, each.name)) for each in fields(self)}  # type: ignore[arg-type]
        rows = [(name, value if len(value) <= _SHOWN else f"{value[:_SHOWN]} ...") for name, value in values.items()]
        return html_table(self.text, [row for row in rows if row[0] != "text"])


@dataclass(frozen=True)
class Timing:
    """Where the time of a call, or of one block, went.

    Attributes:
        queue_us: microseconds between arrival and the first work.
        compute_us: microseconds between the first work and the result.
    """

    queue_us: int
    compute_us: int


@dataclass(frozen=True)
class Usage:
    """What a generation used.

    Attributes:
        prompt_tokens: tokens of the prompt.
        completion_tokens: tokens that were written.
        blocks: that the prior wrote, wasted ones included.
        wasted_blocks: of these, written after the end of the text because the prior runs ahead.
    """

    prompt_tokens: int
    completion_tokens: int
    blocks: int
    wasted_blocks: int


@dataclass(frozen=True)
class TopToken:
    """A likely token at a position.

    Attributes:
        token_id: the token.
        logprob: its log-probability, of the raw logits.
        text: how it would read there; empty from a decoder that is called directly, which knows no texts.
    """

    token_id: int
    logprob: float
    text: str = ""


@dataclass(frozen=True)
class TokenLogprobs(TopToken):
    """A token with its log-probability, and what else was likely at its position.

    Attributes:
        token_id: the token.
        logprob: its log-probability, of the raw logits.
        text: how it reads there; empty from a decoder that is called directly, which knows no texts.
        top: the most likely tokens, best first.
    """

    top: tuple[TopToken, ...] = ()


@dataclass(frozen=True)
class GenerationChunk(_Text):
    """What one written block brought.

    Attributes:
        text: all chunks' texts joined are the whole text.
        token_ids: the new tokens.
        tokens: the text of each of them; a part of a character reads as U+FFFD.
        logprobs: one a token when top_logprobs was given.
        latents: (B, d), when asked for.
        finish_reason: in the last chunk, as are usage and seed.
        usage: in the last chunk only.
        seed: in the last chunk only: repeats this run.
        timing: of the block; in the last chunk of the whole call.
    """

    text: str
    token_ids: tuple[int, ...]
    tokens: tuple[str, ...]
    logprobs: tuple[TokenLogprobs, ...]
    latents: Latents | None
    finish_reason: FinishReason | None
    usage: Usage | None
    seed: NoiseSeed | None
    timing: Timing


@dataclass(frozen=True)
class GenerationResult(_Text):
    """A whole generation.

    Attributes:
        text: the text that was written, without the prompt.
        token_ids: its tokens.
        tokens: the text of each of them; a part of a character reads as U+FFFD.
        logprobs: one a token when top_logprobs was given.
        latents: all blocks in a row, when asked for.
        finish_reason: "stop": an end token or a stop string; "length": max_new_tokens were written.
        usage: what it used.
        seed: repeats this run.
        timing: where its time went.
        request_id: to be found again in the server's logs.
    """

    text: str
    token_ids: tuple[int, ...]
    tokens: tuple[str, ...]
    logprobs: tuple[TokenLogprobs, ...]
    latents: Latents | None
    finish_reason: FinishReason
    usage: Usage
    seed: NoiseSeed
    timing: Timing
    request_id: str


@dataclass(frozen=True)
class GenerationOutcome:
    """One request of a batch and what came of it: a result or an error.

    Attributes:
        request: what was asked for.
        result: what was written; None when it failed.
        error: why it failed; None when it did not.
    """

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
    """A tokenized text.

    Attributes:
        ids: the token ids.
        texts: of each id; bytes that are no complete character read as U+FFFD.
    """

    ids: tuple[int, ...]
    texts: tuple[str, ...]


@dataclass(frozen=True)
class TextEncoding:
    """An encoded text.

    Attributes:
        latents: the mean of the posterior, normalised.
        log_variance: same shape as the latents, when asked for.
        token_ids: the tokens of the text.
        tokens: the text of each of them; a part of a character reads as U+FFFD.
    """

    latents: Latents
    log_variance: FloatArray | None = field(compare=False)
    token_ids: tuple[int, ...]
    tokens: tuple[str, ...]


@dataclass(frozen=True)
class DecodedLatents(_Text):
    """Latents turned into text.

    Attributes:
        text: the text.
        token_ids: its tokens.
        tokens: the text of each of them; a part of a character reads as U+FFFD.
        logprobs: one a token when top_logprobs was given.
        target_logprobs: one for each of target_ids.
        timing: where the time of the call went.
    """

    text: str
    token_ids: tuple[int, ...]
    tokens: tuple[str, ...]
    logprobs: tuple[TokenLogprobs, ...]
    target_logprobs: tuple[float, ...]
    timing: Timing


@dataclass(frozen=True)
class LatentBlock:
    """One block that the prior wrote.

    Attributes:
        index: its place in the run, from 0 on.
        latents: (B, d); known positions as given.
        timing: where the time of the block went.
        seed: repeats the run; None from a prior that is called directly.
    """

    index: int
    latents: Latents
    timing: Timing
    seed: NoiseSeed | None


@dataclass(frozen=True)
class InterpolationPoint(_Text):
    """One point of a walk between two texts or latents.

    Attributes:
        weight: 0 at the start, 1 at the end.
        latents: the point itself.
        text: what it decodes to.
        token_ids: the tokens of the text.
        tokens: the text of each of them; a part of a character reads as U+FFFD.
    """

    weight: float
    latents: Latents
    text: str
    token_ids: tuple[int, ...]
    tokens: tuple[str, ...]


@dataclass(frozen=True)
class InfillResult(_Text):
    """A text whose holes were written.

    Attributes:
        text: all segments joined.
        segments: one for each segment of the request; kept ones as given.
        token_ids: of all segments.
        tokens: the text of each of them; a part of a character reads as U+FFFD.
        finish_reasons: one for each hole; "stop": an end or pad token ended its text, "length": it is full.
        usage: what it used; completion_tokens counts those of the holes.
        seed: repeats this run.
        timing: where the time of the call went.
    """

    text: str
    segments: tuple[str, ...]
    token_ids: tuple[int, ...]
    tokens: tuple[str, ...]
    finish_reasons: tuple[FinishReason, ...]
    usage: Usage
    seed: NoiseSeed
    timing: Timing


@dataclass(frozen=True)
class Reconstruction(_Text):
    """A text after its round trip through the latent space.

    Attributes:
        text: what came back.
        token_ids: its tokens.
        tokens: the text of each of them; a part of a character reads as U+FFFD.
        original_ids: as many as token_ids.
        token_accuracy: share of positions where both agree, 0 to 1.
        bits_per_token: -log2 of the decoder's probability of the original ids, mean.
    """

    text: str
    token_ids: tuple[int, ...]
    tokens: tuple[str, ...]
    original_ids: tuple[int, ...]
    token_accuracy: float
    bits_per_token: float


@dataclass(frozen=True)
class SequenceEncoding:
    """What the encoder made of one sequence of token ids.

    Attributes:
        latents: the mean of the posterior, normalised.
        log_variance: of the posterior, same shape as the latents, when asked for.
    """

    latents: Latents
    log_variance: FloatArray | None = field(compare=False)


@dataclass(frozen=True)
class DecodedBlock:
    """What the decoder made of one block; nothing is trimmed.

    Attributes:
        token_ids: B * P.
        logprobs: one a token when top_logprobs was given.
        logits: (B * P, vocab_size), when asked for.
        target_logprobs: one for each of target_ids in this block.
        timing: where the time of the block went.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    logits: FloatArray | None = field(compare=False)
    target_logprobs: tuple[float, ...]
    timing: Timing


@dataclass(frozen=True)
class ModelShape:
    """The shape of the model that a service holds.

    Attributes:
        latent_dim: d.
        block_size: B, latents a block.
        vae_block_size: latents a block of the Text VAE's mask.
        patch_size: P, tokens a latent.
        vocab_size: tokens that the tokenizer and the decoder know.
        parameters: of the networks of this service.
    """

    latent_dim: int
    block_size: int
    vae_block_size: int
    patch_size: int
    vocab_size: int
    parameters: int


@dataclass(frozen=True)
class Limits:
    """What a service takes at most; 0: not limited by it.

    Attributes:
        max_context: latent positions of a session.
        max_message_bytes: of one message.
        max_running: sessions that run at a time.
        max_waiting: sessions that are queued at a time.
        kv_bytes: memory of the KV cache.
        run_ahead: blocks that a prior writes before they are read.
    """

    max_context: int
    max_message_bytes: int
    max_running: int
    max_waiting: int
    kv_bytes: int
    run_ahead: int


@dataclass(frozen=True)
class ServerInfo:
    """The process that answers, and its load at that moment.

    Attributes:
        version: of colaserve.
        device: empty where no network runs.
        dtype: in which the network computes.
        running: sessions that run.
        waiting: sessions that are queued.
        kv_bytes_used: memory of the KV cache that sessions hold.
        uptime_seconds: since it was ready first.
    """

    version: str
    device: str
    dtype: str
    running: int
    waiting: int
    kv_bytes_used: int
    uptime_seconds: float


@dataclass(frozen=True)
class StageInfo:
    """A stage as the coordinator sees it.

    Attributes:
        stage: "encoder", "prior" or "decoder".
        target: "in-process" when it lives in the coordinator's process.
        serving: whether it was found serving at the last look.
        space: fingerprint of its latent space.
        limits: what it takes at most.
        server: its process, and the load.
    """

    stage: str
    target: str
    serving: bool
    space: str
    limits: Limits
    server: ServerInfo


@dataclass(frozen=True)
class ServiceInfo:
    """A service: what it holds and how busy it is.

    Attributes:
        model: shape of the model.
        space: fingerprint of its latent space.
        limits: what it takes at most.
        server: its process, and the load.
        has_variance: whether an encoder knows log variances; None for other services.
    """

    model: ModelShape
    space: str
    limits: Limits
    server: ServerInfo
    has_variance: bool | None = None


@dataclass(frozen=True)
class ModelInfo:
    """What a coordinator serves.

    Attributes:
        name: as requests name it.
        model: parameters of all stages together.
        space: fingerprint of the latent space.
        limits: what the coordinator takes at most.
        server: the coordinator's process, and its load.
        default_sampler: what a Sampler's unset fields mean.
        default_sampling: what a Sampling's unset fields mean.
        default_max_new_tokens: what an unset max_new_tokens means.
        chat_frame: around one user message, with the place "{prompt}"; empty: the message as it is.
        end_ids: tokens that end a text.
        pad_id: the token that fills up.
        stages: the stages behind the coordinator.
        description: what the model can and cannot do, by its own card; empty where it has none.
    """

    name: str
    model: ModelShape
    space: str
    limits: Limits
    server: ServerInfo
    default_sampler: Sampler
    default_sampling: Sampling
    default_max_new_tokens: int
    chat_frame: str
    end_ids: tuple[int, ...]
    pad_id: int
    stages: tuple[StageInfo, ...]
    description: str = ""
