"""What is known about the HTTP request being served; the edge makes one, counts and logs it at the end."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, Final, cast

from starlette.types import Scope

from colaserve_services.gateway.errors import ApiError

CLIENT_GONE: Final = 499
_PLACE: Final = "colaserve.record"


@dataclass
class RequestRecord:
    """Filled in while the request runs. Holds no text."""

    request_id: str
    client: str = ""  # the key's name, else the address
    user: str = ""
    status: int = 0  # of the answer, once begun
    failed_with: int = 0  # the status of an error that came after the answer was begun
    client_gone: bool = False
    choices: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    started: float = field(default_factory=time.monotonic)
    first_block: float | None = None  # seconds from the start

    def saw_block(self) -> None:
        """Note the time of the first block."""
        if self.first_block is None:
            self.first_block = time.monotonic() - self.started

    def failed(self, told: ApiError) -> None:
        """Note an error that the answer's status cannot tell any more."""
        self.failed_with = told.status

    @property
    def outcome(self) -> int:
        """The status that says how it went, for metrics and logs."""
        return CLIENT_GONE if self.client_gone or not self.status else self.failed_with or self.status

    def fields(self) -> dict[str, Any]:
        """For the log: what is set."""
        seconds = {"first_block_seconds": round(self.first_block, 4)} if self.first_block is not None else {}
        names = ("client", "user", "choices", "prompt_tokens", "completion_tokens")
        return {name: value for name in names if (value := getattr(self, name))} | seconds


def record_of(scope: Scope) -> RequestRecord:
    """The record that the edge put into a request's scope."""
    return cast(RequestRecord, scope[_PLACE])


def put_record(scope: Scope, record: RequestRecord) -> None:
    """For the edge."""
    scope[_PLACE] = record
