"""Which ids pad and which end the text; the released config files do not say."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from colaserve_services.errors import CheckpointError

RELEASE_VOCAB_SIZE: Final = 100_278
PAD, END_OF_TEXT, IM_END = "<|pad|>", "<|endoftext|>", "<|im_end|>"
RELEASE_IDS: Final = {PAD: 100_277, END_OF_TEXT: 100_257, IM_END: 100_265}


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
