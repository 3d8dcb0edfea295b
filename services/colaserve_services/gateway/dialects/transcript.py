"""Messages to a prompt. The model knows no roles: a chat is a text that ends where the answer begins."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

from colaserve_services.gateway.dialects.fields import TextPart

FRAME_PLACE: Final = "{prompt}"
_SPEAKERS: Final = {"system": "System", "developer": "System", "user": "User", "assistant": "Assistant"}


class Turn(NamedTuple):
    """What one speaker says. `name` distinguishes speakers of one role."""

    role: str
    text: str
    name: str | None = None


def text_of(content: str | Iterable[TextPart]) -> str:
    """A content's text: parts are joined as they are."""
    return content if isinstance(content, str) else "".join(part.text for part in content)


def chat_prompt(turns: Sequence[Turn], frame: str) -> str:
    """One message of an unnamed user: its text, in the checkpoint's frame if there is one. Others: a transcript."""
    first = turns[0]
    if len(turns) == 1 and first.role == "user" and first.name is None:
        return frame.replace(FRAME_PLACE, first.text) if frame else first.text
    return "\n".join([*map(_line, turns), "Assistant:"])  # without a space after it: the answer begins with one


def _line(turn: Turn) -> str:
    speaker = _SPEAKERS[turn.role]
    tag = f"{speaker} ({turn.name}):" if turn.name else f"{speaker}:"
    space = "" if turn.text[:1].isspace() else " "
    return f"{tag}{space}{turn.text}"
