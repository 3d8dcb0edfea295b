"""Messages to a prompt. The model knows no roles: a chat is a text that ends where the answer begins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from colaserve_services.gateway.schemas import Message, parts

FRAME_PLACE: Final = "{prompt}"
_SPEAKERS: Final = {"system": "System", "developer": "System", "user": "User", "assistant": "Assistant"}
_ANSWER: Final = "Assistant:"


def chat_prompt(messages: Sequence[Message], frame: str) -> str:
    """One message of an unnamed user: its text, in the checkpoint's frame if there is one. Others: a transcript."""
    first = messages[0]
    if len(messages) == 1 and first.role == "user" and first.name is None:
        text = parts(first.content)
        return frame.replace(FRAME_PLACE, text) if frame else text
    return transcript(messages)


def transcript(messages: Sequence[Message]) -> str:
    """ "User: ...", "Assistant: ..." line by line; the last line is "Assistant:", without a space after it."""
    return "\n".join([*map(_line, messages), _ANSWER])


def _line(message: Message) -> str:
    speaker, text = _SPEAKERS[message.role], parts(message.content)
    tag = f"{speaker} ({message.name}):" if message.name else f"{speaker}:"
    space = "" if text[:1].isspace() else " "  # an answer of this model begins with its own space
    return f"{tag}{space}{text}"
