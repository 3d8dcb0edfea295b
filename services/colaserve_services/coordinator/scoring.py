"""The likelihood of a text: what the decoder, the posterior and the prior say of it, added up."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import numpy as np

from colaserve.v1 import encoder_pb2, prior_pb2, types_pb2
from colaserve.v1 import latent_service_pb2 as pb
from colaserve_services.bounds import (
    INTEGRATION,
    SAMPLE_ID,
    SCORING,
    block_seed,
    check,
    check_all,
    defaults,
    given,
    wire,
)
from colaserve_services.coordinator import checks, rows
from colaserve_services.coordinator.call import Call
from colaserve_services.coordinator.context import ServiceContext, add_timing, side_by_side
from colaserve_services.coordinator.defaults import resolve_seed
from colaserve_services.coordinator.failures import Attempts
from colaserve_services.coordinator.latent_space import check_fits, decode_all, decode_sampling, tokenize_whole
from colaserve_services.coordinator.runs import MANY_PASSES
from colaserve_services.coordinator.stages import Model
from colaserve_services.errors import InvalidRequest, ModelMismatch
from colaserve_services.rpc import arrays

Response = pb.LatentServiceScoreResponse

_ROWS: Final = 128  # of a score in a pass, about


@dataclass(frozen=True)
class _Layout:
    """A prefix and a text, filled with pad ids to whole latents and whole blocks."""

    prefix: Sequence[int]
    text: Sequence[int]
    ids: Sequence[int]  # both
    known: int  # latents of the prefix
    context: int  # of them, in whole blocks

    @classmethod
    def of(cls, prefix: Sequence[int], text: Sequence[int], model: Model, pad: int) -> "_Layout":
        prefix = [*prefix, *[pad] * (-len(prefix) % model.patch_size)]
        ids = [*prefix, *text]
        ids += [pad] * (-len(ids) % model.block_tokens)
        known = len(prefix) // model.patch_size
        return cls(prefix, text, ids, known, known // model.block_size * model.block_size)


async def score(services: ServiceContext, request: pb.LatentServiceScoreRequest, call: Call) -> Response:
    """LatentService.Score."""
    model = services.model
    services.admission.check(call, "prior")
    call.use_salt(request.cache_salt)
    _check_model(model)
    values = defaults(SCORING) | given(request, SCORING, "")
    check_all(SCORING, "", values)
    prefix = await services.tokenize(request.prefix, "prefix")
    [text] = await tokenize_whole(services, [request.text], ["text"])
    layout = _Layout.of(prefix, text, model, services.tokenizer.special.pad)
    positions, draws = len(layout.ids) // model.patch_size, max(values["samples"], 1)
    check_fits(services, "text", positions)
    seed = resolve_seed(request, positions // model.block_size)
    check(SAMPLE_ID, "seed.sample_id", seed.sample_id + draws - 1)
    seeds = [types_pb2.NoiseSeed(base_seed=seed.base_seed, sample_id=seed.sample_id + i) for i in range(draws)]
    async with services.admission.slot(call, "prior", positions, slow=True) as ticket:
        sequences = [layout.ids, layout.prefix] if layout.prefix else [layout.ids]
        answer = await services.encode(sequences, call, with_variance=True)
        drawn = [_drawn(answer, layout, model, own, values["samples"] > 0) for own in seeds]
        with Attempts(services, ticket) as attempts:
            densities = [await _density(attempts, *each, layout, values) for each in zip(drawn, seeds, strict=True)]
        decoded = await side_by_side([_decoded(services, call, latents, layout) for latents in drawn])
    found = _response(densities, [sum(logprobs) for logprobs, _ in decoded], _entropy(answer, layout, model))
    found.token_ids.extend(text)
    found.positions = positions - layout.known
    found.seed.CopyFrom(seed)
    add_timing(found.timing, answer.timing, *(each.timing for each in densities), *(timing for _, timing in decoded))
    return found


def _check_model(model: Model) -> None:
    if not model.has_variance:
        raise InvalidRequest("text", "this checkpoint's encoder has no posterior variance (use_variation is false)")
    if model.prior_dtype != "float32" or not model.scaling_factor:
        got = f"the prior computes in {model.prior_dtype or 'an unknown dtype'}"
        raise ModelMismatch(f"Score needs a prior in float32 and an encoder that says its scaling factor; {got}")


def _drawn(
    answer: encoder_pb2.EncodeResponse, layout: _Layout, model: Model, seed: types_pb2.NoiseSeed, noisy: bool
) -> types_pb2.Latents:
    """The prefix's mean, and behind it a draw from the text's posterior, or its mean."""
    mean, prefix = _values(answer.encodings[0].latents.values), _values(answer.encodings[-1].latents.values)
    latents = np.concatenate((prefix[: layout.known], mean[layout.known :]))
    if noisy:
        noise = np.random.default_rng((seed.base_seed, seed.sample_id)).standard_normal(mean.shape)
        deviation = np.exp(0.5 * _values(answer.encodings[0].log_variance)) * abs(model.scaling_factor)
        latents[layout.known :] += (deviation * noise)[layout.known :]
    return arrays.latents_to_message(latents, model.space)


def _entropy(answer: encoder_pb2.EncodeResponse, layout: _Layout, model: Model) -> float:
    """H(q) of the normalised latents behind the prefix, in nats."""
    log_variance = _values(answer.encodings[0].log_variance)[layout.known :].astype(np.float64)
    scale = math.log(2 * math.pi * math.e) + 2 * math.log(abs(model.scaling_factor))
    return 0.5 * float((log_variance + scale).sum())


def _values(tensor: types_pb2.Tensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    """float32 of a stage, which `checks` has seen."""
    return np.frombuffer(tensor.data, "<f4").reshape(tuple(tensor.shape))


async def _density(
    attempts: Attempts,
    latents: types_pb2.Latents,
    seed: types_pb2.NoiseSeed,
    layout: _Layout,
    values: Mapping[str, Any],
) -> prior_pb2.PriorServiceScoreResponse:
    """The prior's log density of the text's latents, asked for some blocks at a time, whose seeds follow each other:
    between them a much smaller call may have the slot, and what is there is not computed again when a replica ends."""
    count, size, admission = rows.count(latents), attempts.services.model.block_size, attempts.services.admission
    step, whole = size * _blocks_at_once(values, size), prior_pb2.PriorServiceScoreResponse()
    for start in range(layout.context, count, step):
        end, first = min(start + step, count), (start - layout.context) // size
        request = prior_pb2.PriorServiceScoreRequest(
            canvas=types_pb2.Canvas(
                latents=rows.take(latents, 0, end), open=[types_pb2.Span(start=max(start, layout.known), end=end)]
            ),
            seed=types_pb2.NoiseSeed(base_seed=block_seed(seed.base_seed, 0, first), sample_id=seed.sample_id),
            cache_salt=attempts.call.salt,
            **wire(INTEGRATION, values),
        )
        part = await attempts.answer("Score", request, partial(checks.scored, blocks=(end - start) // size))
        whole.log_densities.extend(part.log_densities)
        whole.standard_errors.extend(part.standard_errors)
        whole.evaluations += part.evaluations
        add_timing(whole.timing, part.timing)
        if end < count and admission.outlasts(attempts.ticket):
            admission.preempt(attempts.ticket)
    return whole


def _blocks_at_once(values: Mapping[str, Any], block_size: int) -> int:
    """Whose answer takes the prior at most MANY_PASSES, if it can."""
    evaluations = values["steps"] * (2 if values["solver"] == "heun" else 1)
    rows_of = block_size * (1 + 2 * values["probes"])
    return max(1, MANY_PASSES // (evaluations * -(-rows_of // _ROWS)))


async def _decoded(
    services: ServiceContext, call: Call, latents: types_pb2.Latents, layout: _Layout
) -> tuple[list[float], types_pb2.Timing]:
    """log p of each of the text's tokens."""
    before = layout.context * services.model.patch_size
    sampling = decode_sampling(services, types_pb2.Sampling(temperature=0))
    targets, context = layout.ids[before:], layout.context
    decoded = await decode_all(services, latents, sampling, call, targets=targets, patient=True, context=context)
    start = len(layout.prefix) - before
    return decoded.target_logprobs[start : start + len(layout.text)], decoded.timing


def _response(
    densities: Sequence[prior_pb2.PriorServiceScoreResponse], decoder_terms: Sequence[float], entropy: float
) -> Response:
    prior_terms = [math.fsum(each.log_densities) for each in densities]
    totals = [sum(both) for both in zip(prior_terms, decoder_terms, strict=True)]
    error = math.hypot(*densities[0].standard_errors)
    if len(totals) > 1:
        error = float(np.std(totals, ddof=1)) / math.sqrt(len(totals))
    return Response(
        log_likelihood=sum(totals) / len(totals) + entropy,
        standard_error=error,
        decoder_term=sum(decoder_terms) / len(totals),
        posterior_entropy=entropy,
        prior_log_density=sum(prior_terms) / len(totals),
        evaluations=sum(each.evaluations for each in densities),
    )
