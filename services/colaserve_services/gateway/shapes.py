"""Answers that are no texts. Typed so that mypy and the OpenAPI document know them; sent as plain JSON."""

from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12


class Model(TypedDict):
    """A served model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    defaults: dict[str, Any]
    space: str
    description: str


class ModelList(TypedDict):
    object: Literal["list"]
    data: list[Model]


class Health(TypedDict):
    status: Literal["ok", "not ready"]
    reason: NotRequired[str]


class ErrorBody(TypedDict):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(TypedDict):
    """Any answer of status 400 and above."""

    error: ErrorBody
