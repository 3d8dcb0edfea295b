"""POST /v1/latents/...: the methods of LatentService as JSON; streams are server-sent events."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Literal

import grpc
from google.protobuf.descriptor import MethodDescriptor
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from colaserve.v1 import latent_service_pb2
from colaserve_services.gateway.answer import CallsAnswer, json_response
from colaserve_services.gateway.backend import Backend
from colaserve_services.gateway.body import MOST_ITEMS, json_body, parse
from colaserve_services.gateway.dialects.base import event
from colaserve_services.gateway.dialects.fields import ServedModel, Strict
from colaserve_services.gateway.dialects.openai import DONE
from colaserve_services.gateway.dialects.refusals import refuse_extras
from colaserve_services.gateway.edge import record_of
from colaserve_services.gateway.errors import ApiError, api_error, invalid, with_own_names
from colaserve_services.gateway.gateway import checked_model, deadline
from colaserve_services.gateway.json_form import answer_of, comment_of, message_of, plain, schema_of
from colaserve_services.gateway.openapi import JSON, Endpoint
from colaserve_services.gateway.settings import GatewaySettings
from colaserve_services.offload import offload

_SERVICE: Final = latent_service_pb2.DESCRIPTOR.services_by_name["LatentService"]
_SMALL: Final = 64 * 1024  # bytes; a longer answer is written in a thread


class LatentsRequest(Strict):
    """The fields that every request has besides those of its message."""

    model: ServedModel = None
    encoding: Literal["base64", "list"] | None = Field(
        None, description="How arrays come back: base64 of little-endian float32, or nested lists; base64."
    )


def endpoints(backend: Backend, settings: GatewaySettings) -> Iterator[Endpoint]:
    """A path for each method: /v1/latents/decode for DecodeLatents."""
    for method in _SERVICE.methods:
        if method.name != "GetInfo":
            yield _endpoint(method, backend, settings)


def _endpoint(method: MethodDescriptor, backend: Backend, settings: GatewaySettings) -> Endpoint:
    schema = schema_of(method.input_type, LatentsRequest)

    async def handle(request: Request) -> LatentsAnswer:
        read = partial(_read, method, schema, settings.allow_unknown_fields)
        fields, message = await json_body(request, read, settings.bounds)
        checked_model(fields.model, await backend.info())
        call = partial(backend.messages, method.name, message, streaming=method.server_streaming)
        record, until = record_of(request.scope), deadline(request, settings.bounds)
        as_lists = fields.encoding == "list"
        return LatentsAnswer(backend, settings.bounds, record, until, [call], method.server_streaming, method, as_lists)

    name = re.sub("Text$|Latents$", "", method.name).lower()
    handle.__name__, handle.__doc__ = f"{name}_latents", comment_of(method)
    kind = "text/event-stream" if method.server_streaming else JSON
    answers = {kind: answer_of(method.output_type)}
    return Endpoint("POST", f"/v1/latents/{name}", handle, schema, answers, reads_body=True)


def _read(method: MethodDescriptor, schema: Any, allow_unknown: bool, body: bytes) -> tuple[LatentsRequest, Any]:
    """The fields that the client set, and the message that they stand for."""
    fields = parse(body, schema)
    refuse_extras(fields, allow_unknown=allow_unknown)
    return fields, message_of(method.input_type, fields)


@dataclass
class LatentsAnswer(CallsAnswer):
    """The answer of a method. In a stream each message is an event, and the last event is [DONE]."""

    method: MethodDescriptor
    as_lists: bool
    message: Any = None  # the whole answer

    async def take(self, index: int, message: Any) -> Iterable[bytes]:
        if self.as_lists and message.ByteSize() > 4 * MOST_ITEMS:
            raise invalid("encoding", f"the answer has more than {MOST_ITEMS} numbers, the most that come as lists")
        if not self.streaming:
            self.message = message
            return ()
        if not {"provisional", "preview"}.intersection(field.name for field, _ in message.ListFields()):
            self.record.saw_block()
        return [event(plain(message, self.as_lists))]

    async def whole(self) -> Response:
        usage = getattr(self.message, "usage", None)
        if usage is not None:
            self.record.prompt_tokens, self.record.completion_tokens = usage.prompt_tokens, usage.completion_tokens
        if self.message.ByteSize() <= _SMALL:
            return self._response()
        return await offload(self._response)

    def _response(self) -> Response:
        return json_response(plain(self.message, self.as_lists))

    def last_events(self) -> Iterable[bytes]:
        return [DONE]

    def error(self, error: Exception) -> ApiError:
        if isinstance(error, grpc.RpcError):
            error = with_own_names(error, f"LatentService.{self.method.name}")
        known = api_error(error)
        if known.param is None or ".values" not in known.param:
            return known
        param = known.param.replace(".values", "")  # latents are an array here
        return invalid(param, known.message.removeprefix(f"{known.param}: "))
