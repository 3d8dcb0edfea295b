"""The models of the Open Inference Protocol: each is one of the coordinator's calls, with its checks and its queue."""

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from reprlib import repr as brief
from typing import Any, Final

import numpy as np

from colaserve.v1 import generation_pb2, latent_service_pb2, types_pb2
from colaserve_client.fields import Field, fields_of, flat_fields
from colaserve_client.settings import GenerationRequest, NoiseSeed, Sampler, Sampling
from colaserve_services.bounds import COUNTS, FINISH_REASONS, SAMPLER, SAMPLING, Fields, wire
from colaserve_services.coordinator import generation, latent_space
from colaserve_services.coordinator.call import Call
from colaserve_services.coordinator.context import ServiceContext
from colaserve_services.errors import InvalidRequest, require
from colaserve_services.inference import open_inference_pb2 as pb
from colaserve_services.inference.tensors import Spec, add_output, read_inputs

VERSION: Final = "1"
LONGEST_ID: Final = 256  # characters
STREAMING: Final = Spec("streaming", "BOOL", optional=True)
# Parameters are settings of the one table, by their flat names.
WRITING: Final = ("max_new_tokens", "ignore_end", "print_special", "cache_salt")  # as GenerateRequest has them
_NOISE: Final = {name: field for name, field in flat_fields(NoiseSeed, Sampler).items() if not field.multiple}
_DRAWS: Final = flat_fields(Sampling)
_TEXT: Final = {name: fields_of(GenerationRequest)[name] for name in (*WRITING, "stop")}
_SPACE: Final = {"space": Field("Fingerprint of the latents' space; empty: not checked.")}

GENERATE: Final[Fields] = {**_NOISE, **_DRAWS, **_TEXT}
DECODE: Final[Fields] = {**_DRAWS, **_SPACE}
SAMPLE: Final[Fields] = {
    **_NOISE,
    **_SPACE,
    "cache_salt": _TEXT["cache_salt"],
    "max_blocks": COUNTS["SampleLatentsRequest.max_blocks"],
}
IGNORED: Final = "triton_enable_empty_final_response"  # how Triton's clients ask for what every stream has here
_KINDS: Final[Mapping[type, tuple[type, ...]]] = {bool: (bool,), int: (int,), float: (int, float), str: (str,)}
_WORDS: Final = {bool: "a bool", int: "an int64 or uint64", float: "a number", str: "a string"}
# The coordinator's names of what a request calls otherwise; the first that begins a field's name counts.
_NAMES: Final = {
    "prompt": "text_input",
    "texts[0]": "text_input",
    "prefix.values": "latents",
    "prefix.space": "parameters.space",
    "prefix": "latents",
    "latents.values": "latents",
    "latents.space": "parameters.space",
    "sampling.seed": "parameters.sampling_seed",
    "sampling.": "parameters.",
    "sampler.": "parameters.",
    "seed.base_seed": "parameters.seed",
    **{name: f"parameters.{name}" for name in ("max_new_tokens", "stop", "cache_salt", "max_blocks")},
}


@dataclass(frozen=True)
class Part:
    """One answer, or a part of it, which is joined to the others byte by byte. `last`: nothing follows."""

    outputs: Mapping[str, bytes]
    last: bool = True
    parameters: Mapping[str, int | str] = field(default_factory=dict)


Run = Callable[[ServiceContext, Mapping[str, Any], Mapping[str, Any], Call], AsyncGenerator[Part, None]]


@dataclass(frozen=True)
class InferenceModel:
    """What it takes and returns, and what runs it: with its inputs and parameters by name."""

    inputs: Sequence[Spec]
    outputs: Sequence[Spec]
    parameters: Fields
    run: Run

    def metadata(self, name: str, platform: str, latent_dim: int) -> pb.ModelMetadataResponse:
        inputs, outputs = ([spec.metadata(latent_dim) for spec in specs] for specs in (self.inputs, self.outputs))
        return pb.ModelMetadataResponse(
            name=name, versions=[VERSION], platform=platform, inputs=inputs, outputs=outputs
        )


def read_parameters(request: pb.ModelInferRequest, table: Fields) -> dict[str, Any]:
    """The values by name. InvalidRequest names one that is unknown or has a value that it cannot have."""
    given = {}
    for name, parameter in request.parameters.items():
        field, choice = f"parameters.{name[:80]}", parameter.WhichOneof("parameter_choice")
        if name == IGNORED:
            continue
        known = table.get(name)
        if known is None:
            raise InvalidRequest(field, f"is unknown, expected {', '.join(table) or 'none'}")
        value = getattr(parameter, choice) if choice else None
        require(type(value) in _KINDS[known.kind], field, brief(value), _WORDS[known.kind])
        if fault := known.fault(value):
            raise InvalidRequest(field, fault)
        given[name] = value
    require("sample_id" not in given or "seed" in given, "parameters.sample_id", "it alone", "seed beside it")
    return given


def _noise_seed(given: Mapping[str, Any]) -> types_pb2.NoiseSeed | None:
    """None: to be drawn."""
    base_seed = given.get("seed")
    return None if base_seed is None else types_pb2.NoiseSeed(base_seed=base_seed, sample_id=given.get("sample_id", 0))


def _of(table: Fields, given: Mapping[str, Any]) -> dict[str, Any]:
    return wire(table, {name: given.get(field.flat) for name, field in table.items()})


async def _generate(
    services: ServiceContext, inputs: Mapping[str, Any], given: Mapping[str, Any], call: Call
) -> AsyncGenerator[Part, None]:
    request = generation_pb2.GenerateRequest(
        prompt=inputs["text_input"],
        stop=[given["stop"]] if "stop" in given else (),
        sampler=types_pb2.Sampler(**_of(SAMPLER, given)),
        sampling=types_pb2.Sampling(**_of(SAMPLING, given)),
        seed=_noise_seed(given),
        **{name: given[name] for name in WRITING if name in given},
    )
    async with aclosing(generation.generate(services, request, call)) as responses:
        async for [response] in responses:
            reason, usage = FINISH_REASONS.get(response.finish_reason, ""), response.usage
            counts = {"prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens}
            outputs = {
                "text_output": response.text.encode(),
                "finish_reason": reason.encode(),
                "token_ids": np.array(response.token_ids, "<u4").tobytes(),
            }
            yield Part(outputs, bool(reason), counts | _seed(response.seed) if reason else {})


async def _encode(
    services: ServiceContext, inputs: Mapping[str, Any], given: Mapping[str, Any], call: Call
) -> AsyncGenerator[Part, None]:
    request = latent_service_pb2.EncodeTextRequest(texts=[inputs["text_input"]])
    [encoding] = (await latent_space.encode_text(services, request, call)).encodings
    yield Part({"latents": encoding.latents.values.data}, parameters={"space": encoding.latents.space})


async def _decode(
    services: ServiceContext, inputs: Mapping[str, Any], given: Mapping[str, Any], call: Call
) -> AsyncGenerator[Part, None]:
    latents = types_pb2.Latents(values=inputs["latents"], space=given.get("space", ""))
    request = latent_service_pb2.DecodeLatentsRequest(
        latents=latents, sampling=types_pb2.Sampling(**_of(SAMPLING, given))
    )
    response = await latent_space.decode_latents(services, request, call)
    yield Part({"text_output": response.text.encode()})


async def _sample(
    services: ServiceContext, inputs: Mapping[str, Any], given: Mapping[str, Any], call: Call
) -> AsyncGenerator[Part, None]:
    prefix = types_pb2.Latents(values=inputs.get("latents"), space=given.get("space", ""))
    request = latent_service_pb2.SampleLatentsRequest(
        prefix=prefix,
        max_blocks=given.get("max_blocks", 1),
        sampler=types_pb2.Sampler(**_of(SAMPLER, given)),
        seed=_noise_seed(given),
        cache_salt=given.get("cache_salt", ""),
    )
    written = 0
    async with aclosing(latent_space.sample_latents(services, request, call)) as responses:
        async for [response] in responses:
            written, latents = written + 1, response.latents
            last = written == request.max_blocks
            ends = {"space": latents.space} | _seed(response.seed) if last else {}
            yield Part({"latents": latents.values.data}, last, ends)


MODELS: Final[Mapping[str, InferenceModel]] = {
    "generate": InferenceModel(
        [Spec("text_input", "BYTES"), STREAMING],
        [Spec("text_output", "BYTES"), Spec("finish_reason", "BYTES"), Spec("token_ids", "UINT32")],
        GENERATE,
        _generate,
    ),
    "encoder": InferenceModel([Spec("text_input", "BYTES")], [Spec("latents", "FP32")], {}, _encode),
    "decoder": InferenceModel([Spec("latents", "FP32")], [Spec("text_output", "BYTES")], DECODE, _decode),
    "prior": InferenceModel([Spec("latents", "FP32", optional=True)], [Spec("latents", "FP32")], SAMPLE, _sample),
}


def model_of(name: str, version: str, field: str = "model_name") -> InferenceModel:
    """The model, or InvalidRequest."""
    require(name in MODELS, field, brief(name), f"one of {list(MODELS)}")
    require(version in ("", VERSION), field.replace("name", "version"), brief(version), f"{VERSION!r}, or none")
    return MODELS[name]


class Inference:
    """One request, checked."""

    def __init__(self, request: pb.ModelInferRequest):
        self.model = model_of(request.model_name, request.model_version)
        require(len(request.id) <= LONGEST_ID, "id", f"{len(request.id)} characters", f"at most {LONGEST_ID}")
        self._request = request
        self._inputs = read_inputs(request, self.model.inputs)
        self.streaming: bool = self._inputs.get(STREAMING.name, False)  # asked for an answer a block
        self._given = read_parameters(request, self.model.parameters)
        names = [spec.name for spec in self.model.outputs]
        for index, wanted in enumerate(request.outputs):
            require(wanted.name in names, f"outputs[{index}].name", brief(wanted.name), f"one of {names}")
            require(not wanted.parameters, f"outputs[{index}].parameters", len(wanted.parameters), "none")
        wanted_names = {wanted.name for wanted in request.outputs}
        self._outputs = [spec for spec in self.model.outputs if not wanted_names or spec.name in wanted_names]

    async def parts(self, services: ServiceContext, call: Call) -> AsyncGenerator[Part, None]:
        """What the model returns, as it comes."""
        try:
            async with aclosing(self.model.run(services, self._inputs, self._given, call)) as parts:
                async for part in parts:
                    yield part
        except InvalidRequest as error:
            raise _renamed(error) from error

    def answer(self, parts: Sequence[Part], latent_dim: int) -> pb.ModelInferResponse:
        """The message of these parts, joined."""
        request = self._request
        response = pb.ModelInferResponse(model_name=request.model_name, model_version=VERSION, id=request.id)
        for name, value in parts[-1].parameters.items():
            kind = "string_param" if isinstance(value, str) else "int64_param"
            setattr(response.parameters[name], kind, value)
        for spec in self._outputs:
            add_output(response, spec, b"".join(part.outputs[spec.name] for part in parts), latent_dim)
        return response


async def answers(
    inference: Inference, parts: AsyncIterator[Part], latent_dim: int
) -> AsyncIterator[pb.ModelInferResponse]:
    """Of a stream: one a block, or one for all. The last is marked as Triton's clients look for it."""
    waiting: list[Part] = []
    async for part in parts:
        waiting.append(part)
        if inference.streaming or STREAMING not in inference.model.inputs or part.last:
            response = inference.answer(waiting, latent_dim)
            response.parameters["triton_final_response"].bool_param = part.last
            yield response
            waiting.clear()


def _seed(seed: types_pb2.NoiseSeed) -> dict[str, int]:
    return {"seed": seed.base_seed, "sample_id": seed.sample_id}


def _renamed(error: InvalidRequest) -> InvalidRequest:
    """The same, naming what the request calls the field."""
    for begin, ours in _NAMES.items():
        if error.field.startswith(begin):
            message = str(error).removeprefix(f"{error.field}: ")
            return InvalidRequest(ours + error.field.removeprefix(begin), message)
    return error
