"""Messages to a prompt. The model knows no roles: a chat is a text that ends where the answer begins."""

from collections.abc import Iterable, Sequence
from typing import Any, Final, NamedTuple, Protocol


class Part(Protocol):
    """A part of a content."""

    text: str


FRAME_PLACE: Final = "{prompt}"
_SPEAKERS: Final = {"system": "System", "developer": "System", "user": "User", "assistant": "Assistant"}


class Turn(NamedTuple):
    """What one speaker says. `name` distinguishes speakers of one role."""

    role: str
    text: str
    name: str | None = None


def turns_of(messages: Iterable[Any]) -> list[Turn]:
    """Messages of any dialect, which have a role, a content and perhaps a name."""
    return [Turn(one.role, text_of(one.content), getattr(one, "name", None)) for one in messages]


def text_of(content: str | Iterable[Part]) -> str:
    """A content's text: parts are joined as they are."""
    return content if isinstance(content, str) else "".join(part.text for part in content)


def chat_prompt(turns: Sequence[Turn], frame: str, *, prefilled: bool = False) -> str:
    """One message of an unnamed user: its text, in the checkpoint's frame if there is one. Others: a transcript.
    `prefilled`: the last turn is the beginning of the answer."""
    first = turns[0]
    if len(turns) == 1 and first.role == "user" and first.name is None:
        return frame.replace(FRAME_PLACE, first.text) if frame else first.text
    answer = () if prefilled else ("Assistant:",)  # without a space after it: the answer begins with one
    return "\n".join([*map(_line, turns), *answer])


def _line(turn: Turn) -> str:
    speaker = _SPEAKERS[turn.role]
    tag = f"{speaker} ({turn.name}):" if turn.name else f"{speaker}:"
    space = "" if turn.text[:1].isspace() else " "
    return f"{tag}{space}{turn.text}"
