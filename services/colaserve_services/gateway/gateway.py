"""What the routes of one gateway share, and how a checked request becomes a plan."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from pydantic import BaseModel

from colaserve.v1.generation_pb2 import GenerateRequest
from colaserve.v1.latent_service_pb2 import InfillRequest
from colaserve_services.gateway.answer import Answer, Plan
from colaserve_services.gateway.backend import Backend, GenerationStub, Info, Reach
from colaserve_services.gateway.dialects import ChatDialect, CompletionDialect, Dialect
from colaserve_services.gateway.errors import ApiError, api_error, invalid
from colaserve_services.gateway.infill import infill_names, infill_request
from colaserve_services.gateway.prompting import chat_prompt
from colaserve_services.gateway.record import RequestRecord
from colaserve_services.gateway.refusals import refuse_extras
from colaserve_services.gateway.schemas import ChatRequest, CompletionRequest, GenerationFields
from colaserve_services.gateway.settings import GatewaySettings
from colaserve_services.gateway.translate import (
    Choices,
    completion_prompts,
    most_likely,
    names_of,
    text_prompt,
)
from colaserve_services.rpc.kept import Kept


class Gateway:
    """One gateway: its settings, its coordinator, and whether it is going down."""

    def __init__(self, stub: GenerationStub, settings: GatewaySettings, reach: Reach | None = None):
        self.settings = settings
        self.backend = Backend(stub, settings.info_seconds, reach)
        self.started = int(time.time())
        self.draining = False
        self._readiness = Kept(self._look, settings.ready_seconds)

    async def not_ready(self) -> str:
        """Why requests should not come here; empty: they should."""
        return "going down" if self.draining else await self._readiness.get()

    async def _look(self) -> str:
        try:
            await self.backend.check_ready()
        except Exception as error:
            return api_error(error).message
        return ""

    def check_model(self, asked: str | None, info: Info) -> str:
        """The served model's name; 404 when another one was asked for."""
        served = info.model_name
        if asked not in (None, served):
            message = f"model: {asked!r} is not served here, {served!r} is"
            raise ApiError(404, message, param="model", code="model_not_found")
        return served

    def check_extras(self, body: BaseModel) -> None:
        """Raise a 400 for the first field that cannot be honoured."""
        refuse_extras(body, allow_unknown=self.settings.allow_unknown_fields)

    async def chat(self, body: ChatRequest, record: RequestRecord, seconds: float | None) -> Answer:
        """The answer to a chat request."""
        self.check_extras(body)
        info = await self.backend.info()
        model = self.check_model(body.model, info)
        self._check_choices(body, 1)
        prompt = text_prompt(chat_prompt(body.messages, info.chat_frame))
        dialect = ChatDialect(record.request_id, model, info.space, most_likely(body) is not None)
        choices = Choices([prompt], body)
        return self._answer(body, choices, choices.per_prompt, dialect, record, seconds, names_of(body))

    async def complete(self, body: CompletionRequest, record: RequestRecord, seconds: float | None) -> Answer:
        """The answer to a completion request."""
        self.check_extras(body)
        _check_completion(body)
        info = await self.backend.info()
        model = self.check_model(body.model, info)
        if body.suffix:
            dialect = CompletionDialect(record.request_id, model, info.space, logprobs=False, echoes=[""])
            names = infill_names(body, info)
            return self._answer(body, [infill_request(body, info)], 1, dialect, record, seconds, names)
        prompts = completion_prompts(body.prompt, info.model.vocab_size)
        self._check_choices(body, len(prompts))
        echoes = await self._echoes(prompts) if body.echo else [""] * len(prompts)
        each = [echo for echo in echoes for _ in range(body.n or 1)]
        dialect = CompletionDialect(record.request_id, model, info.space, most_likely(body) is not None, each)
        choices = Choices(prompts, body)
        return self._answer(body, choices, choices.per_prompt, dialect, record, seconds, names_of(body))

    def _answer(
        self,
        body: ChatRequest | CompletionRequest,
        requests: Sequence[GenerateRequest] | Sequence[InfillRequest],
        per_prompt: int,
        dialect: Dialect,
        record: RequestRecord,
        seconds: float | None,
        names: Mapping[str, str],
    ) -> Answer:
        bounds = self.settings.bounds
        record.user = body.user or ""
        plan = Plan(
            requests=requests,
            per_prompt=per_prompt,
            dialect=dialect,
            deadline=record.started + min(seconds or bounds.request_seconds, bounds.request_seconds),
            stream=bool(body.stream),
            usage_chunk=_usage_chunk(body),
            names=names,
        )
        return Answer(plan, self.backend, bounds)

    def _check_choices(self, body: GenerationFields, prompts: int) -> None:
        per_prompt, bound = body.n or 1, self.settings.bounds.choices
        if per_prompt > bound:
            raise invalid("n", f"got {per_prompt}, expected at most {bound}")
        if prompts * per_prompt > bound:
            raise invalid("prompt", f"{prompts} prompts with n = {per_prompt} are more than the {bound} texts allowed")

    async def _echoes(self, prompts: Sequence[GenerateRequest]) -> list[str]:
        return [
            await self.backend.detokenize(list(prompt.prompt_ids.ids))
            if prompt.HasField("prompt_ids")
            else prompt.prompt
            for prompt in prompts
        ]


def _check_completion(body: CompletionRequest) -> None:
    if body.best_of not in (None, body.n or 1):
        raise invalid("best_of", f"got {body.best_of}, expected the value of n, {body.n or 1}", "unsupported_parameter")
    if body.echo and body.logprobs is not None:
        raise invalid("echo", "not together with logprobs: prompts are not scored", "unsupported_parameter")


def _usage_chunk(body: GenerationFields) -> bool:
    if body.stream_options is None:
        return False
    if not body.stream:
        raise invalid("stream_options", "needs stream to be true")
    return bool(body.stream_options.include_usage)
