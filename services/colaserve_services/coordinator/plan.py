"""A generation request, checked and with every open question settled, before any work is done for it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from colaserve.v1 import generation_pb2, types_pb2
from colaserve_services.bounds import MAX_NEW_TOKENS, PREVIEW_EVERY, TOP_LOGPROBS, check
from colaserve_services.coordinator.choices import GREEDY, Choices, Chooser, read_choices
from colaserve_services.coordinator.context import ServiceContext
from colaserve_services.coordinator.defaults import resolve_sampler, resolve_sampling, resolve_seed, sampling_seed
from colaserve_services.coordinator.stages import Model
from colaserve_services.coordinator.writer import Writer
from colaserve_services.errors import InvalidRequest
from colaserve_services.text import Tokenizer, stop_strings

MOST_STOPS: Final = 16


@dataclass(frozen=True)
class Plan:
    """One generation."""

    request: generation_pb2.GenerateRequest
    prompt_ids: Sequence[int]  # none where only its latents are known
    prompt_tokens: int
    context: int  # latents of the prompt that fill whole blocks
    redecoded: int  # leading sampled ids that repeat the prompt's tail
    blocks: int  # to write, if the text does not end before
    max_new_tokens: int
    sampler: types_pb2.Sampler
    sampling: types_pb2.Sampling
    seed: types_pb2.NoiseSeed
    latents: types_pb2.Latents | None = None  # of the prompt; None: it is yet to be encoded
    noise: types_pb2.Latents | None = None  # of all blocks, row by row, instead of the seed
    written: Sequence[types_pb2.Latents] = ()  # its first blocks
    choices: Choices = field(default_factory=Choices)

    def positions(self, model: Model) -> int:
        """Latents of the prompt and of what is to be written."""
        return self.context + self.blocks * model.block_size

    def writer(self, tokenizer: Tokenizer) -> Writer:
        """What turns this generation's ids into text."""
        end_ids = frozenset() if self.request.ignore_end else tokenizer.special.end
        unprinted = frozenset() if self.request.print_special else tokenizer.special.end | {tokenizer.special.pad}
        before = self.prompt_ids[-1] if self.prompt_ids else None
        if self.choices.texts:
            return Chooser(self.choices, partial(tokenizer.detokenizer, self.prompt_ids), self.redecoded, before)
        detokenizer = tokenizer.detokenizer(self.prompt_ids)
        stops, budget = self.request.stop, self.max_new_tokens
        return Writer(detokenizer, stops, end_ids, budget, self.redecoded, unprinted, before)


async def plan_generation(services: ServiceContext, request: generation_pb2.GenerateRequest) -> Plan:
    """Raises InvalidRequest naming the field that cannot be honoured."""
    prompt_ids = await _prompt_ids(services, request)
    return plan_behind(services, request, prompt_ids, len(prompt_ids), await read_choices(services, request))


def plan_behind(
    services: ServiceContext,
    request: generation_pb2.GenerateRequest,
    prompt_ids: Sequence[int],
    tokens: int,
    choices: Choices | None = None,
) -> Plan:
    """As `plan_generation`, behind a prompt of so many tokens, whose ids may be unknown."""
    context, redecoded = split_prompt(tokens, services.model)
    choices = choices or Choices()
    if choices.texts:
        budget = choices.longest
    elif request.HasField("max_new_tokens"):
        budget = request.max_new_tokens
    else:  # nobody asked for so many
        most = (services.model.max_context - context) * services.model.patch_size - redecoded
        budget = min(services.defaults.max_new_tokens, max(most, 1))
    check(MAX_NEW_TOKENS, "max_new_tokens", budget)
    blocks = -(-(redecoded + budget) // services.model.block_tokens)
    name = "choices" if choices.texts else "max_new_tokens"
    _check_fits(services.model, tokens, budget, context + blocks * services.model.block_size, name)
    check_stops(request.stop)
    check(TOP_LOGPROBS, "top_logprobs", request.top_logprobs)
    check(PREVIEW_EVERY, "preview_every", request.preview_every)
    seed = resolve_seed(request, blocks)
    return Plan(
        request=request,
        prompt_ids=prompt_ids,
        prompt_tokens=tokens,
        context=context,
        redecoded=redecoded,
        blocks=blocks,
        max_new_tokens=budget,
        sampler=resolve_sampler(request.sampler, services.defaults, services.model.latent_dim),
        sampling=resolve_sampling(
            request.sampling, services.defaults, sampling_seed(seed), **(GREEDY if choices.texts else {})
        ),
        seed=seed,
        choices=choices,
    )


def split_prompt(tokens: int, model: Model) -> tuple[int, int]:
    """(latents that fill whole blocks, leading ids of the first block that repeat the prompt) of a prompt's length.

    The m = ceil(L / P) latents of L tokens fill floor(m / B) blocks; what is left of them begins the first block that
    is written, where its tokens are decoded again.
    """
    positions = model.positions(tokens)
    context = positions // model.block_size * model.block_size
    return context, tokens - context * model.patch_size if positions > context else 0


async def _prompt_ids(services: ServiceContext, request: generation_pb2.GenerateRequest) -> Sequence[int]:
    if not request.HasField("prompt_ids"):
        return await services.tokenize(request.prompt, "prompt")
    if request.prompt:
        raise InvalidRequest("prompt_ids", "got both prompt and prompt_ids, expected one of them")
    return services.checked(request.prompt_ids.ids, "prompt_ids")


def _check_fits(model: Model, prompt: int, budget: int, needed: int, name: str) -> None:
    if needed > model.max_context:
        field = "prompt" if model.positions(prompt) >= model.max_context else name
        raise InvalidRequest(
            field,
            f"a prompt of {prompt} tokens and {name} {budget} need {needed} latent positions, "
            f"at most {model.max_context} fit (max_context)",
        )


def check_stops(stops: Sequence[str], field: str = "stop") -> None:
    """InvalidRequest naming the field when there are too many stop strings, or one is none."""
    if len(stops) > MOST_STOPS:
        raise InvalidRequest(field, f"got {len(stops)} strings, expected at most {MOST_STOPS}")
    if not all(stops):
        raise InvalidRequest(field, "got an empty string, expected strings of one character or more")
    if (longest := max(map(len, stops), default=0)) > stop_strings.LONGEST:
        raise InvalidRequest(field, f"got {longest} characters, expected at most {stop_strings.LONGEST} in a string")
