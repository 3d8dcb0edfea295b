"""Text out of token ids as they come, never half a character.

For any ids the pieces joined are what the `tokenizers` library decodes from all ids at once, special tokens included;
those of ids after others are what these add to the others' text.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Protocol

IdToToken = Callable[[int], str | None]
Decode = Callable[[Sequence[int]], str]

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class Detokenizer(Protocol):
    """Turns ids into text incrementally. One generation each."""

    def push(self, token_id: int) -> str:
        """The text that is certain now; "" while a character is not complete."""

    def flush(self) -> str:
        """The rest; incomplete bytes become U+FFFD. Nothing may be pushed afterwards."""


class ByteLevelDetokenizer:
    """For byte-level BPE: each token is some bytes, the text is their UTF-8 decoding. Constant work a token."""

    def __init__(self, id_to_token: IdToToken):
        self._id_to_token = id_to_token
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """See Detokenizer."""
        return self._decoder.decode(token_bytes(self._id_to_token(token_id) or ""))

    def flush(self) -> str:
        """See Detokenizer."""
        return self._decoder.decode(b"", final=True)


class WholeDetokenizer:
    """For any decoder of the library: decodes all ids again for each token, so its work grows with the square.

    Held back until later ids settle it: a trailing run of byte-fallback tokens, trailing U+FFFD, and whatever the next
    decoding no longer begins with. `after`: the ids before the text, on which its first space may depend.
    """

    def __init__(self, id_to_token: IdToToken, decode: Decode, after: Sequence[int] = ()):
        self._id_to_token, self._decode = id_to_token, decode
        self._ids = list(after)
        self._sent = decode(self._ids).rstrip(_REPLACEMENT)

    def push(self, token_id: int) -> str:
        """See Detokenizer."""
        self._ids.append(token_id)
        return self._send(_common_prefix(self._decode(self._settled()).rstrip(_REPLACEMENT), self._decode(self._ids)))

    def flush(self) -> str:
        """See Detokenizer."""
        return self._send(self._decode(self._ids))

    def _settled(self) -> list[int]:
        count = len(self._ids)
        while count and _BYTE_TOKEN.fullmatch(self._id_to_token(self._ids[count - 1]) or ""):
            count -= 1
        return self._ids[:count]

    def _send(self, text: str) -> str:
        if not text.startswith(self._sent):
            return ""
        new, self._sent = text[len(self._sent) :], text
        return new


def token_bytes(token: str) -> bytes:
    """The bytes that a byte-level token stands for; a token with a character outside of the byte alphabet (an added
    token with a space, say) stands for its own UTF-8."""
    alphabet = byte_of_character()
    try:
        return bytes(alphabet[character] for character in token)
    except KeyError:
        return token.encode()


@cache
def byte_of_character() -> dict[str, int]:
    """The alphabet of byte-level BPE: printable Latin-1 characters are their own byte, U+0100 on are the others."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def join(detokenizer: Detokenizer, ids: Iterable[int]) -> str:
    """The whole text of ids."""
    return "".join([*(detokenizer.push(id_) for id_ in ids), detokenizer.flush()])


def _common_prefix(a: str, b: str) -> str:
    for index, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return a[:index]
    return a[: len(b)]
