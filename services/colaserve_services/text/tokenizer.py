"""The checkpoint's tokenizer: text to ids and back, with its special ids (which pad and which end the text); the
released config files do not name these."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import tokenizers
from tokenizers.decoders import ByteLevel

from colaserve_services.errors import CheckpointError, InvalidRequest
from colaserve_services.stand_ins import stand_in
from colaserve_services.text.detokenizer import Detokenizer

RELEASE_VOCAB_SIZE: Final = 100_278
PAD, END_OF_TEXT, IM_END = "<|pad|>", "<|endoftext|>", "<|im_end|>"
RELEASE_IDS: Final = {PAD: 100_277, END_OF_TEXT: 100_257, IM_END: 100_265}
_SEEN = 16  # ids before a text that may change how it begins


@dataclass(frozen=True)
class SpecialIds:
    """`pad` fills, the others end the text; an end id that is None does not exist here."""

    pad: int
    end_of_text: int | None = None
    im_end: int | None = None
    more_ends: tuple[int, ...] = ()

    @property
    def end(self) -> frozenset[int]:
        """The ids that end a text."""
        return frozenset(id_ for id_ in (self.end_of_text, self.im_end, *self.more_ends) if id_ is not None)

    @classmethod
    def find(
        cls,
        token_to_id: Callable[[str], int | None],
        vocab_size: int,
        *,
        pad: int | None = None,
        end_of_text: int | Sequence[int] | None = None,
        im_end: int | None = None,
    ) -> "SpecialIds":
        """Given ids first (generation_config.json's), then the release's when the vocabulary has its size, then a
        look into the tokenizer. Raises CheckpointError for a missing pad or an id outside the vocabulary."""

        def choose(given: int | None, token: str) -> int | None:
            if given is not None:
                return _inside(given, token, vocab_size)
            if vocab_size == RELEASE_VOCAB_SIZE:
                return RELEASE_IDS[token]
            found = token_to_id(token)
            return None if found is None else _inside(found, token, vocab_size)

        pad_id = choose(pad, PAD)
        if pad_id is None:
            raise CheckpointError(
                f"tokenizer.json: has no {PAD!r} token; name the id as pad_token_id in generation_config.json"
            )
        ends = [end_of_text] if isinstance(end_of_text, int) else list(end_of_text or ())
        more = tuple(_inside(id_, END_OF_TEXT, vocab_size) for id_ in ends[1:])
        return cls(pad_id, choose(ends[0] if ends else None, END_OF_TEXT), choose(im_end, IM_END), more)


def _inside(id_: int, token: str, vocab_size: int) -> int:
    if not 0 <= id_ < vocab_size:
        raise CheckpointError(f"tokenizer: id {id_} of {token!r} is outside of the model's vocabulary of {vocab_size}")
    return id_


class Tokenizer:
    """Encodes a text as it is: no template, no start id; the text of a special token becomes its id. Thread-safe."""

    def __init__(self, library: tokenizers.Tokenizer, vocab_size: int, special: SpecialIds):
        self._library = library
        self._byte_level = isinstance(library.decoder, ByteLevel)
        self._longest = 0  # bytes of the longest token; 0: not known
        if self._byte_level and library.normalizer is None:
            # Characters of the byte alphabet are one byte each, in added tokens up to four.
            added = (len(token.content.encode()) for token in library.get_added_tokens_decoder().values())
            self._longest = max(*added, *map(len, library.get_vocab(with_added_tokens=False)), 1, 1)
        self._texts: dict[int, str] = {}  # of ids by themselves that were asked for; at most the vocabulary
        self.vocab_size, self.special = vocab_size, special

    @classmethod
    def open(cls, path: Path, vocab_size: int | None = None, defaults: Any = None) -> "Tokenizer":
        """Read tokenizer.json. `vocab_size` is the model's (None: one more than the largest id of the tokenizer);
        `defaults` may have pad_token_id, eos_token_id and im_end_token_id, each None where not given,
        and eos_token_id several.

        Raises CheckpointError, one line, when the file is missing, is none, or no pad id is to be found."""
        library = _read(path)
        size = vocab_size or 1 + max(library.get_vocab(with_added_tokens=True).values(), default=-1)
        special = SpecialIds.find(
            library.token_to_id,
            size,
            pad=getattr(defaults, "pad_token_id", None),
            end_of_text=getattr(defaults, "eos_token_id", None),
            im_end=getattr(defaults, "im_end_token_id", None),
        )
        return cls(library, size, special)

    def encode(self, text: str, field: str = "text") -> Sequence[int]:
        """Ids of a text. Raises InvalidRequest for text that needs an id the model has not."""
        [ids] = self.encode_all([text], [field])
        return ids

    def encode_all(self, texts: Sequence[str], fields: Sequence[str]) -> list[Sequence[int]]:
        """Ids of texts, as `encode`. Other threads run meanwhile (the library's call for one text holds the GIL)."""
        encodings = self._library.encode_batch(list(texts), add_special_tokens=False)
        return [self.checked(encoding.ids, field) for encoding, field in zip(encodings, fields, strict=True)]

    def fewest_tokens(self, text: str) -> int:
        """A number of tokens that the text has at least, found without tokenizing it."""
        return -(-len(text.encode()) // self._longest) if self._longest else 0

    def checked(self, ids: Sequence[int], field: str) -> Sequence[int]:
        """The ids, each inside the vocabulary; else InvalidRequest."""
        numbers = np.array(ids, np.int64)  # of a message's ids a copy of their memory
        outside = np.flatnonzero((numbers < 0) | (numbers >= self.vocab_size))
        if len(outside):
            what = f"token id {numbers[outside[0]]} at {outside[0]} is outside of the vocabulary"
            raise InvalidRequest(field, f"{what}, expected 0 to {self.vocab_size - 1}")
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens included; bytes that are no UTF-8 read as U+FFFD."""
        text: str = self._library.decode(list(ids), skip_special_tokens=False)
        return text

    def detokenizer(self, after: Sequence[int] = ()) -> Detokenizer:
        """A fresh incremental decoder of what follows the ids `after`."""
        return Detokenizer(self._library, () if self._byte_level else after[-_SEEN:])

    def token_text(self, token_id: int, before: int | None = None) -> str:
        """The text of one id after another one (None: at the beginning), as a space may depend on that; bytes that are
        no complete character read as U+FFFD."""
        if self._byte_level or before is None:
            text = self._texts.get(token_id)
            if text is None:
                text = self._texts[token_id] = self.decode([token_id])
            return text
        start, both = self.decode([before]), self.decode([before, token_id])
        return both[len(start) :] if both.startswith(start) else self.decode([token_id])

    def token_texts(self, ids: Sequence[int]) -> list[str]:
        """The text of each of a text's ids."""
        return [self.token_text(id_, before) for before, id_ in zip([None, *ids], ids, strict=False)]

    def shown(self, ids: Sequence[int]) -> dict[str, Any]:
        """A text's ids, the text, and that of each of them, as answers have them."""
        return {"text": self.decode(ids), "token_ids": ids, "tokens": self.token_texts(ids)}

    def offsets(self, ids: Sequence[int]) -> list[int]:
        """Where each of a text's ids begins, in characters; a part of a character begins where that does."""
        detokenizer, offsets, length = self.detokenizer(), [], 0
        for id_ in ids:
            offsets.append(length)
            length += len(detokenizer.push(id_))
        return offsets

    def before_end(self, ids: Sequence[int]) -> list[int]:
        """The ids before the first end or pad id."""
        ends = self.special.end | {self.special.pad}
        return list(ids[: next((index for index, id_ in enumerate(ids) if id_ in ends), len(ids))])


def _read(path: Path) -> tokenizers.Tokenizer:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; a checkpoint needs its tokenizer.json")
    try:
        library = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        if found := stand_in(path):
            raise CheckpointError(f"{path}: is {found}") from error
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path}: is no tokenizer that the tokenizers library can read: {reason}") from error
    library.no_truncation()  # a training script's settings, saved with the tokenizer, would cut and pad prompts
    library.no_padding()
    return library
