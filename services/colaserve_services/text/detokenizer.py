"""Text out of token ids as they come, never half a character."""

import re
from collections.abc import Iterable, Sequence

import tokenizers
from tokenizers.decoders import DecodeStream

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_MOST_HELD = 64  # ids without a whole character; the library decodes all of them again for each one more


class Detokenizer:
    """Turns the ids of one generation into text: the pieces joined are what the `tokenizers` library decodes from all
    ids at once, special tokens included. `before`: the ids before the text, on which its first space may depend.

    The library's DecodeStream gives text that ends in a whole character. Two things it does not do: a run of
    byte-fallback tokens, which a later byte may turn into U+FFFD as a whole, is kept from it until the run ends; and it
    does not give what is held when the text is over.
    """

    def __init__(self, library: tokenizers.Tokenizer, before: Sequence[int] = ()):
        self._library = library
        whole = list(before)
        while whole and self._decode(whole).endswith("\N{REPLACEMENT CHARACTER}"):
            whole.pop()
        self._stream, self._last = DecodeStream(whole), whole  # the ids of the last text that was certain
        self._held: list[int] = []  # those after them
        self._run: list[int] = []  # those that the library has not seen

    def push(self, token_id: int) -> str:
        """The text that is certain now; "" while a character is not complete."""
        self._held.append(token_id)
        self._run.append(token_id)
        if _BYTE_TOKEN.fullmatch(self._library.id_to_token(token_id) or ""):
            return ""
        text: str | None = self._stream.step(self._library, self._run)
        self._run = []
        if text is None and len(self._held) < _MOST_HELD:
            return ""
        if text is None:
            text, self._stream, self._held = self.flush(), DecodeStream([]), []
        self._last, self._held = self._held, []
        return text

    def flush(self) -> str:
        """The rest; incomplete bytes become U+FFFD. Nothing may be pushed afterwards."""
        return self.peek(())

    def peek(self, token_ids: Sequence[int]) -> str:
        """The rest if the text ended with these ids, none of which is taken in; incomplete bytes become U+FFFD."""
        return self._decode([*self._last, *self._held, *token_ids]).removeprefix(self._decode(self._last))

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self._library.decode(ids, skip_special_tokens=False)
        return text


def join(detokenizer: Detokenizer, ids: Iterable[int]) -> str:
    """The whole text of ids."""
    return "".join([*(detokenizer.push(id_) for id_ in ids), detokenizer.flush()])
