"""What calls return: frozen dataclasses, whose fields have the names of the messages' fields (`messages.py`)."""

import math
from dataclasses import dataclass, field, fields
from html import escape
from typing import Annotated, Any, Literal, TypeVar, dataclass_transform

from colaserve_client.arrays import FloatArray
from colaserve_client.errors import ColaserveError
from colaserve_client.fields import Field, documented
from colaserve_client.latents import Latents, html_table
from colaserve_client.settings import GenerationRequest, NoiseSeed

T = TypeVar("T")
_SHOWN = 200  # characters of a value, in a notebook
FinishReason = Literal["stop", "length"]  # an end token or a stop string; max_new_tokens were written


_TOKENS = Field("The text of each of them; a part of a character reads as U+FFFD.")
_LOGPROBS = Field("One for each token, when top_logprobs was given.")
_LOOKED_UP = Field("Log-probabilities of logprob_ids, or of all ids, at each token: (tokens, ids), on request.")
_VARIANCE = Field("Log variance of the posterior, in the latents' shape, on request.")


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def value(kind: type[T]) -> type[T]:
    """Class decorator: a frozen dataclass whose docstring describes its fields, and which a notebook shows as a table
    of them."""
    if not hasattr(kind, "_repr_html_"):
        kind._repr_html_ = lambda self: html_table(type(self).__name__, _rows(self))  # type: ignore[attr-defined]
    return documented(dataclass(frozen=True)(kind))


def _rows(value: Any) -> list[tuple[str, str]]:
    """Name and value of each field."""
    values = {each.name: repr(getattr(value, each.name)) for each in fields(value)}
    return [(name, text if len(text) <= _SHOWN else f"{text[:_SHOWN]} ...") for name, text in values.items()]


@value
class _Text:
    """A result that is mainly a text: `str` gives the text, and a notebook shows it above the other fields. Tokens that
    have log-probabilities are shaded, unlikely ones darker."""

    text: Annotated[str, Field("The text.")]
    token_ids: Annotated[tuple[int, ...], Field("Its tokens.")]
    tokens: Annotated[tuple[str, ...], _TOKENS]

    def __str__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        shaded = "".join(map(_shaded, getattr(self, "logprobs", ())))
        table = html_table(self.text, [row for row in _rows(self) if row[0] != "text"])
        return f"<p>{shaded}</p>{table}" if shaded else table


@value
class Timing:
    """Where the time of a call, or of one block, went."""

    queue_us: Annotated[int, Field("Microseconds between arrival and the first work.")]
    compute_us: Annotated[int, Field("Microseconds between the first work and the result.")]


@value
class Usage:
    """What a generation used."""

    prompt_tokens: Annotated[int, Field("Tokens of the prompt.")]
    completion_tokens: Annotated[int, Field("Tokens that were written.")]
    blocks: Annotated[int, Field("Blocks that the prior wrote, wasted ones included.")]
    wasted_blocks: Annotated[int, Field("Blocks after the end of the text, written since the prior runs ahead.")]
    steps_saved: Annotated[int, Field("Steps of these blocks that stable_steps left out.")] = 0


@value
class TopToken:
    """A likely token at a position."""

    token_id: Annotated[int, Field("The token.")]
    logprob: Annotated[float, Field("Its log-probability, of the raw logits.")]
    text: Annotated[
        str, Field("How it would read there; empty from a decoder that is called directly, which knows no texts.")
    ] = ""


@value
class TokenLogprobs(TopToken):
    """A token with its log-probability, and what else was likely at its position."""

    top: Annotated[tuple[TopToken, ...], Field("The most likely tokens, best first.")] = ()


def _shaded(token: TokenLogprobs) -> str:
    """A token for a notebook, with what else was likely where the pointer rests on it."""
    chance = math.exp(min(token.logprob, 0.0))
    likely = "".join(f"\n{math.exp(each.logprob):.1%} {each.text!r}" for each in token.top)
    style = f"background: rgba(255, 140, 0, {0.8 * (1 - chance):.2f}); white-space: pre-wrap"
    return f'<span style="{style}" title="{escape(f"{chance:.1%} {token.text!r}{likely}")}">{escape(token.text)}</span>'


@value
class Probes:
    """How sure the model is of a block. The first four are root mean squares in the latents' units; None: undefined."""

    norm: Annotated[float | None, Field("Of its latents.")]
    distance: Annotated[float | None, Field("Of the difference to the block before.")]
    drift: Annotated[float | None, Field("Of what the expected latents moved in the last step.")]
    disagreement: Annotated[float | None, Field("Of the difference between the two branches of guidance.")]
    entropy: Annotated[float | None, Field("Mean entropy of its tokens in nats.")]
    end_probability: Annotated[float | None, Field("Of an end token, at the position where it is likeliest.")]


_PROBES = Field("Probes of the block, on request.")


@value
class Preview:
    """The block being written, as the prior expects it to end."""

    index: Annotated[int, Field("Index of the block in the run, from 0 on.", wire="block_index")]
    step: Annotated[int, Field("Steps of the block that have run.")]
    text: Annotated[str, Field("The text that it would add to the chunks before.")]
    latents: Annotated[Latents | None, Field("The expected clean latents, (B, d), with with_latents.")]


@value
class ChoiceScore:
    """How likely one of a generation's choices is."""

    text: Annotated[str, Field("As given.")]
    token_count: Annotated[int, Field("Tokens it has; longer ones have lower sums.")]
    logprob: Annotated[float, Field("Sum over its tokens, of the raw logits, in nats.")]


@value
class GenerationChunk(_Text):
    """The text of one written block; or a preview of a block, without text."""

    logprobs: Annotated[tuple[TokenLogprobs, ...], _LOGPROBS]
    latents: Annotated[Latents | None, Field("Latents of the block, (B, d), on request.")]
    finish_reason: Annotated[FinishReason | None, Field("In the last chunk, as are usage and seed.")]
    usage: Annotated[Usage | None, Field("In the last chunk only.")]
    seed: Annotated[NoiseSeed | None, Field("In the last chunk only: repeats this run.")]
    timing: Annotated[Timing, Field("Where the time of the block went; in the last chunk, that of the whole call.")]
    preview: Annotated[Preview | None, Field("Between the blocks' chunks, with preview_every; None in those.")] = None
    probes: Annotated[Probes | None, _PROBES] = None
    choices: Annotated[tuple[ChoiceScore, ...], Field("In the last chunk: each of choices, in order.")] = ()


@value
class BranchBlock(GenerationChunk):
    """One block of one branch of a fork; finish reason, usage and seed are in the last of each."""

    branch: Annotated[int, Field("Index of the branch.")] = 0
    index: Annotated[int, Field("Index of the block in the branch, from 0 on.", wire="block_index")] = 0


@value
class GenerationResult(_Text):
    """A whole generation."""

    logprobs: Annotated[tuple[TokenLogprobs, ...], _LOGPROBS]
    latents: Annotated[Latents | None, Field("All blocks in a row, on request.")]
    finish_reason: Annotated[
        FinishReason, Field('"stop": an end token or a stop string; "length": max_new_tokens were written.')
    ]
    usage: Annotated[Usage, Field("What it used.")]
    seed: Annotated[NoiseSeed, Field("Repeats this run.")]
    timing: Annotated[Timing, Field("Where its time went.")]
    request_id: Annotated[str, Field("To be found again in the server's logs.")]
    previews: Annotated[tuple[Preview, ...], Field("How the blocks formed, with preview_every.")] = ()
    probes: Annotated[tuple[Probes, ...], Field("One for each block, on request.")] = ()
    choices: Annotated[tuple[ChoiceScore, ...], Field("Each of choices, in order; the best is the text.")] = ()


@value
class GenerationOutcome:
    """One request of a batch and what came of it: a result or an error."""

    request: Annotated[GenerationRequest, Field("The request.")]
    result: Annotated[GenerationResult | None, Field("What was written; None when it failed.")]
    error: Annotated[ColaserveError | None, Field("Why it failed; None when it did not.")]

    def unwrap(self) -> GenerationResult:
        """The result; raises the error where there is none."""
        if self.result is None:
            assert self.error is not None
            raise self.error
        return self.result


@value
class Tokens:
    """A tokenized text."""

    ids: Annotated[tuple[int, ...], Field("The token ids.", wire="token_ids")]
    texts: Annotated[
        tuple[str, ...], Field("The text of each id; a part of a character reads as U+FFFD.", wire="tokens")
    ]


@value
class SequenceEncoding:
    """What the encoder made of one sequence of token ids."""

    latents: Annotated[Latents, Field("The mean of the posterior, normalised.")]
    log_variance: Annotated[FloatArray | None, _VARIANCE] = field(compare=False)


@value
class TextEncoding(SequenceEncoding):
    """An encoded text."""

    token_ids: Annotated[tuple[int, ...], Field("The tokens of the text.")]
    tokens: Annotated[tuple[str, ...], _TOKENS]


@value
class Embedding:
    """An embedding of a text."""

    values: Annotated[FloatArray, Field("A vector (d), or one a block, (blocks, d).")] = field(compare=False)
    token_count: Annotated[int, Field("Tokens of the text.")]
    space: Annotated[str, Field("Fingerprint of the latent space.")]


@value
class DecodedLatents(_Text):
    """Latents turned into text."""

    logprobs: Annotated[tuple[TokenLogprobs, ...], _LOGPROBS]
    target_logprobs: Annotated[tuple[float, ...], Field("One for each of target_ids.")]
    timing: Annotated[Timing, Field("Where the time of the call went.")]


@value
class Logprobs(_Text):
    """A text, or latents as text, with the log-probabilities of its tokens: of given latents the most likely ones."""

    logprobs: Annotated[tuple[TokenLogprobs, ...], Field("One for each token.")]
    position_logprobs: Annotated[FloatArray | None, _LOOKED_UP] = field(compare=False)
    timing: Annotated[Timing, Field("Where the time of the call went.")]


@value
class Score:
    """The likelihood of a text after a prefix: sums over all its tokens, in nats."""

    log_likelihood: Annotated[float, Field("The three terms together: a lower bound, unless samples is 0.")]
    standard_error: Annotated[
        float, Field("Of log_likelihood; below two samples of the probes alone, from two on of the samples.")
    ]
    decoder_term: Annotated[float, Field("Mean log-probability of the text given its latents.")]
    posterior_entropy: Annotated[float, Field("Entropy of the encoder's posterior.")]
    prior_log_density: Annotated[float, Field("Mean log density of the latents under the prior.")]
    token_ids: Annotated[tuple[int, ...], Field("The tokens of the text.")]
    positions: Annotated[int, Field("Latent positions in the prior's term, those that fill the last block included.")]
    evaluations: Annotated[int, Field("Velocities that the prior evaluated.")]
    seed: Annotated[NoiseSeed, Field("Repeats this score.")]
    timing: Annotated[Timing, Field("Where the time of the call went.")]


@value
class Density:
    """The log density of latents under the prior, in nats: a number for each block after the context."""

    log_densities: Annotated[tuple[float, ...], Field("Means over the probes; 0 for a block without an open position.")]
    standard_errors: Annotated[tuple[float, ...], Field("Of these means; 0 with one probe, which shows none.")]
    evaluations: Annotated[int, Field("Velocities that the prior evaluated.")]
    timing: Annotated[Timing, Field("Where the time of the call went.")]


@value
class LatentBlock:
    """One block that the prior wrote, or a preview of it."""

    index: Annotated[int, Field("Index of the block in the run, from 0 on.", wire="block_index")]
    latents: Annotated[Latents, Field("Latents of the block, (B, d); known positions as given.")]
    timing: Annotated[Timing, Field("Where the time of the block went.")]
    seed: Annotated[NoiseSeed | None, Field("Repeats the run; None from a prior that is called directly.")]
    provisional: Annotated[bool, Field("Whether this is a preview: the block is still to come.")] = False
    step: Annotated[int, Field("Steps of the block that have run.")] = 0
    probes: Annotated[Probes | None, _PROBES] = None
    steps_saved: Annotated[int, Field("Steps that stable_steps left out.")] = 0


@value
class InterpolationPoint(_Text):
    """One point of a walk between two texts or latents."""

    weight: Annotated[float, Field("0 at the start, 1 at the end.")]
    latents: Annotated[Latents, Field("The point itself.")]


@value
class InfillResult(_Text):
    """A text whose holes were written."""

    segments: Annotated[tuple[str, ...], Field("One for each segment of the request; kept ones as given.")]
    finish_reasons: Annotated[
        tuple[FinishReason, ...],
        Field('One for each hole; "stop": an end or pad token ended its text, "length": it is full.'),
    ]
    usage: Annotated[Usage, Field("What it used; completion_tokens counts those of the holes.")]
    seed: Annotated[NoiseSeed, Field("Repeats this run.")]
    timing: Annotated[Timing, Field("Where the time of the call went.")]


@value
class Reconstruction(_Text):
    """A text after its round trip through the latent space."""

    original_ids: Annotated[tuple[int, ...], Field("The ids of the original text, as many as token_ids.")]
    token_accuracy: Annotated[float, Field("Share of positions where both agree, 0 to 1.")]
    bits_per_token: Annotated[float, Field("-log2 of the decoder's probability of the original ids, mean.")]


@value
class DecodedBlock:
    """What the decoder made of one block; nothing is trimmed."""

    token_ids: Annotated[tuple[int, ...], Field("The ids of all B * P tokens.")]
    logprobs: Annotated[tuple[TokenLogprobs, ...], _LOGPROBS]
    logits: Annotated[FloatArray | None, Field("Raw logits, (B * P, vocab_size), on request.")] = field(compare=False)
    target_logprobs: Annotated[tuple[float, ...], Field("One for each of target_ids in this block.")]
    position_logprobs: Annotated[FloatArray | None, _LOOKED_UP] = field(compare=False)
    timing: Annotated[Timing, Field("Where the time of the block went.")]
    provisional: Annotated[bool, Field("Whether a preview was asked for.")] = False
    probes: Annotated[Probes | None, _PROBES] = None
