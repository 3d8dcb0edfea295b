"""What every dialect's request is made of. Types are strict: "16" is no integer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import is_dataclass
from typing import Annotated, Any, ClassVar, Final, Literal, TypeVar

from annotated_types import Interval
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, create_model

from colaserve.v1 import types_pb2
from colaserve.v1.generation_pb2 import GenerateRequest
from colaserve.v1.latent_service_pb2 import InfillRequest
from colaserve_client import errors, messages
from colaserve_client.arrays import FloatArray
from colaserve_client.fields import Field as Setting
from colaserve_client.fields import flat_fields
from colaserve_client.settings import Sampler, Sampling, Steering
from colaserve_services.bounds import SAMPLER, SAMPLING, SEED_END, wire
from colaserve_services.gateway.errors import invalid
from colaserve_services.rpc.steering import MOST as MOST_PROBES

# The most items of each list. Where a list is checked, its first wrong item ends the check (fail_fast).
MOST_MESSAGES: Final = 2_048  # also parts of one message
MOST_IDS: Final = 131_072  # of one prompt
EACH_BLOCK: Final = ("preview_every", "with_probes", "with_latents")  # what they ask for comes with each block
UINT32: Final = 2**32 - 1
NAMES: Final[set[str]] = set()  # of all fields of all requests

M = TypeVar("M", bound=BaseModel)


def at_most(items: int) -> Any:
    """The bound of a list, which is checked before its items."""
    return Field(max_length=items, fail_fast=True)


def _whole_characters(text: str) -> str:
    """Half of a surrogate pair, which JSON can say, is no text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"half of a surrogate pair at character {error.start}") from None
    return text


Text = Annotated[str, AfterValidator(_whole_characters)]
StopString = Annotated[Text, StringConstraints(min_length=1)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0, le=UINT32)]], at_most(MOST_IDS)]
Numbers = Annotated[list[float], Field(fail_fast=True)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Budget = Annotated[int, Field(ge=1, le=UINT32)]
EndUser = Annotated[Text, Field(max_length=256)]
ServedModel = Annotated[str | None, Field(description="The served model's name; left out, the served model.")]


class Strict(BaseModel):
    """Extras are gathered, then refused by refusals.py with a better message than the schema could give."""

    model_config = ConfigDict(
        strict=True, extra="allow", allow_inf_nan=False, json_schema_extra={"additionalProperties": False}
    )
    unions: ClassVar[Mapping[str, str]] = {}  # what a field of several kinds expects, for errors

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        NAMES.update(cls.model_fields)


def with_settings(*kinds: type, only: Sequence[str] = ()) -> Callable[[type[M]], type[M]]:
    """Class decorator: a field for each request setting of the dataclasses that the schema does not declare itself, or
    for those named."""

    def decorate(model: type[M]) -> type[M]:
        found = flat_fields(*kinds)
        table = {name: found[name] for name in only or found if name not in model.model_fields}
        own: Any = {name: (kind_of(field), Field(None, description=field.doc)) for name, field in table.items()}
        made: type[M] = create_model(
            model.__name__, __base__=model, __doc__=model.__doc__, __module__=model.__module__, **own
        )
        return made

    return decorate


def kind_of(field: Setting) -> Any:
    """The type of a setting, which may be left out."""
    if is_dataclass(field.kind):
        return Annotated[list[Probe], at_most(MOST_PROBES)] | None
    if field.kind == FloatArray:
        return float | Numbers | Annotated[list[Numbers], Field(fail_fast=True)] | None
    if field.choices is not None:
        return Literal[tuple(field.choices)] | None
    if field.range is None:
        return field.kind | None
    bounds = field.range
    least = {"gt": bounds.least} if bounds.above else {"ge": bounds.least}
    return Annotated[field.kind, Interval(**least, le=bounds.most)] | None


@with_settings(Steering)
class Probe(Strict):
    """A probe of a latent that steers what is written."""


@with_settings(Sampler, Sampling)
class GenerationFields(Strict):
    """What every dialect takes, each setting of the sampler and of the sampling among it. A field left out takes the
    server's default, see GET /v1/models."""

    model: ServedModel = None
    stream: bool | None = Field(None, description="Send server-sent events, one or more for each block.")
    seed: int | None = Field(
        None, ge=0, lt=SEED_END, description="Repeats a run; choice i of a prompt is sample i of this seed."
    )
    top_k: int | None = Field(None, ge=-1, le=UINT32, description="Keep the k most likely tokens; 0 or -1 keeps all.")
    guidance_interval: list[Fraction] | None = Field(
        None,
        min_length=2,
        max_length=2,
        description="Guidance is on between these two times; time runs from 1 (noise) to 0; [1, 0].",
    )
    ignore_eos: bool | None = Field(None, description="Write on after an end token.")
    skip_special_tokens: bool | None = Field(None, description="False prints end and pad tokens, too; true.")
    cache_salt: Text | None = Field(
        None, max_length=256, description="Cached prefixes are shared only among requests of the same salt."
    )

    def choices(self) -> int:
        """Texts to write for each prompt."""
        return 1

    def budget(self) -> int | None:
        """Tokens to write at most."""
        return None

    def stops(self) -> Sequence[str]:
        """Strings that end the text."""
        return ()

    def alternatives(self) -> int | None:
        """How many likely tokens to return beside each token; None: no log-probabilities at all."""
        return None

    def guided(self) -> Sequence[str]:
        """The texts of which the answer is one; none: free text."""
        return ()

    def end_user(self) -> str:
        """Whom the client calls for; logged."""
        return ""


class TextPart(Strict):
    """A part of a message."""

    type: Literal["text"]
    text: Text


def generate_request(prompt: GenerateRequest, fields: GenerationFields) -> GenerateRequest:
    """The request for the first text of a prompt: `prompt` with all else that the client set."""
    request = GenerateRequest()
    request.CopyFrom(prompt)
    if (budget := fields.budget()) is not None:
        request.max_new_tokens = budget
    if fields.seed is not None:
        request.seed.CopyFrom(types_pb2.NoiseSeed(base_seed=fields.seed))
    if (alternatives := fields.alternatives()) is not None:
        request.top_logprobs = alternatives
    request.stop.extend(fields.stops())
    request.choices.extend(fields.guided())
    request.ignore_end = bool(fields.ignore_eos)
    request.print_special = fields.skip_special_tokens is False
    request.cache_salt = fields.cache_salt or ""
    for name in EACH_BLOCK:
        if value := getattr(fields, name, None):
            setattr(request, name, value)
    set_sampling(request, fields)
    return request


def set_sampling(request: GenerateRequest | InfillRequest, fields: GenerationFields) -> None:
    """What the client set of how latents are sampled and how tokens are drawn."""
    sampler, sampling = request.sampler, request.sampling
    for message, table in ((sampler, SAMPLER), (sampling, SAMPLING)):
        values = {name: getattr(fields, field.flat) for name, field in table.items()}
        for name, value in wire(table, values).items():
            if table[name].multiple:
                sampler.MergeFrom(_probes(value))
                continue
            setattr(message, name, 0 if name == "top_k" and value == -1 else value)  # -1: as others say that all count
    if fields.guidance_interval is not None:  # in either order: time runs from the greater one down
        if sampler.HasField("guidance_start") or sampler.HasField("guidance_end"):
            raise invalid("guidance_interval", "means the same as guidance_start and guidance_end: set one of them")
        sampler.guidance_start, sampler.guidance_end = max(fields.guidance_interval), min(fields.guidance_interval)


def _probes(steering: Sequence[Probe]) -> types_pb2.Sampler:
    try:
        return messages.build(types_pb2.Sampler, {"steering": [probe.model_dump() for probe in steering]})
    except errors.InvalidRequest as error:
        field = error.details.field
        raise invalid(field, str(error).removeprefix(f"{field}: ")) from None
