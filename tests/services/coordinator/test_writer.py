"""Whatever the borders of tokens and blocks, what is written is a function of the ids alone."""

from hypothesis import example, given, settings
from hypothesis import strategies as st

from colaserve.v1 import types_pb2
from colaserve_services.coordinator.writer import Writer

STOP, LENGTH = types_pb2.FINISH_REASON_STOP, types_pb2.FINISH_REASON_LENGTH
TEXTS = ["", "a", "b", "ab", "ba", "aab"]  # text of each id; id 6 ends
END = 6


class Spelling:
    """A detokenizer that holds the latest id's text back, as half a character would be."""

    def __init__(self) -> None:
        self._held = ""

    def push(self, token_id: int) -> str:
        out, self._held = self._held, ""
        if token_id == 5:
            self._held = TEXTS[5]
            return out
        return out + TEXTS[token_id]

    def flush(self) -> str:
        out, self._held = self._held, ""
        return out


def expected(ids: list[int], stops: list[str], budget: int) -> tuple[str, int, object]:
    """(text, tokens, reason), the plain way."""
    ended = END in ids[:budget]
    kept = ids[: ids.index(END)] if ended else ids[:budget]
    text = "".join(TEXTS[id_] for id_ in kept)
    start, stop = min(((text.find(stop), len(stop), stop) for stop in stops if stop in text), default=(0, 0, ""))[::2]
    if not stop:
        return text, len(kept), STOP if ended else LENGTH
    return text[:start], count_until(kept, start + len(stop)), STOP


def count_until(ids: list[int], end: int) -> int:
    """Tokens up to and with the first one with which the text, as the detokenizer gives it, reaches `end`."""
    spelling, length = Spelling(), 0
    for index, id_ in enumerate(ids):
        length += len(spelling.push(id_))
        if length >= end:
            return index + 1
    return len(ids)


ids_of_run = st.lists(st.integers(0, 6), min_size=1, max_size=16)
stop_strings = st.lists(st.text(alphabet="ab", min_size=1, max_size=5), max_size=3)


@settings(max_examples=250)
@given(ids_of_run, stop_strings, st.integers(1, 5), st.integers(0, 3))
@example([1, 2, 1, 1], ["b", "abaab"], 4, 0)
@example([1, 2], ["a", "ab"], 1, 0)
def test_text_tokens_and_reason_are_those_of_the_whole_run(ids, stops, block, redecoded):
    budget = len(ids)
    padded = [*[END] * redecoded, *ids, *[1] * block]  # an end among the redecoded ids ends nothing
    writer, text, tokens = Writer(Spelling(), stops, frozenset({END}), budget, redecoded), "", []
    start = 0
    while not writer.finish_reason:
        piece = writer.append(padded[start : start + block])
        text, tokens, start = text + piece.text, tokens + piece.tokens, start + block
    wanted_text, wanted_count, reason = expected(ids, stops, budget)
    assert text == wanted_text
    assert [token.id for token in tokens] == ids[:wanted_count]
    assert (writer.sent, writer.finish_reason) == (wanted_count, reason)
