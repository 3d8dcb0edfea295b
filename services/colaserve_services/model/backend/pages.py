"""Which pages of a pool are in use, by reference count, and which hold blocks that the next sequence may begin with."""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import islice, takewhile
from typing import Any, NamedTuple

from numpy.typing import NDArray


def chain_keys(content: NDArray[Any], blocks: int, salt: str = "") -> list[bytes]:
    """A key for each of an array's equal blocks that stands for it and those before; other salts give other keys."""
    digest, keys = hashlib.sha256(hashlib.sha256(salt.encode()).digest()), []
    for block in content.reshape(blocks, -1) if blocks else ():
        digest.update(block.data)
        keys.append(digest.digest())
    return keys


class _Known(NamedTuple):
    page: int
    beside: Any  # what else its owner found out about the block


class Pages:
    """The pages of one pool by number, each with the keys and values of one block, which several sequences may share.

    Blocks that are known by a key stay when no sequence uses them any more, until others need their pages: those found
    least recently go first, of a chain its end before its beginning. Not thread-safe: it belongs to the device thread;
    others may read its numbers.
    """

    def __init__(self, count: int):
        self.count = count
        self.held = 0  # pages that sequences use
        self._free = list(range(count - 1, -1, -1))
        self._uses = [0] * count
        self._known: OrderedDict[bytes, _Known] = OrderedDict()  # by key, the least recently found first
        self._kept: set[int] = set()  # pages of known blocks

    @property
    def available(self) -> int:
        """Pages that `reserve` can give."""
        return self.count - self.held

    @property
    def known(self) -> int:
        """Blocks that a sequence may begin with."""
        return len(self._known)

    def reserve(self, count: int) -> list[int] | None:
        """Pages for a sequence's next blocks, whatever they hold; None when there are not so many."""
        if count > self.available:
            return None
        if len(self._free) < count:
            unused = (key for key, known in self._known.items() if not self._uses[known.page])
            for key in list(islice(unused, count - len(self._free))):
                self._forget(key)
        pages = [self._free.pop() for _ in range(count)]
        self.share(pages)
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """One more sequence uses these pages."""
        for page in pages:
            self.held += not self._uses[page]
            self._uses[page] += 1

    def free(self, pages: Iterable[int]) -> None:
        """A sequence uses these pages no longer."""
        for page in pages:
            assert self._uses[page], "a page is given back as often as it was taken"
            self._uses[page] -= 1
            if not self._uses[page]:
                self.held -= 1
                if page not in self._kept:
                    self._free.append(page)

    def leading(self, keys: Sequence[bytes]) -> int:
        """How many of the leading blocks are known."""
        return sum(1 for _ in takewhile(self._known.__contains__, keys))

    def find(self, keys: Sequence[bytes]) -> tuple[list[int], list[Any]]:
        """Pages of the leading blocks that are known, which one more sequence uses now, and what was kept beside."""
        keys = keys[: self.leading(keys)]
        found = [self._known[key] for key in keys]
        for key in reversed(keys):
            self._known.move_to_end(key)
        self.share(known.page for known in found)
        return [known.page for known in found], [known.beside for known in found]

    def remember(self, keys: Sequence[bytes], pages: Sequence[int], beside: Sequence[Any] = ()) -> None:
        """Keep the complete leading blocks of a sequence for the next that begins with them."""
        for i in reversed(range(len(keys))):
            if keys[i] not in self._known:
                self._known[keys[i]] = _Known(pages[i], beside[i] if beside else None)
                self._kept.add(pages[i])
            self._known.move_to_end(keys[i])

    def forget(self) -> None:
        """Know no block any more."""
        for key in list(self._known):
            self._forget(key)

    def _forget(self, key: bytes) -> None:
        page = self._known.pop(key).page
        self._kept.discard(page)
        if not self._uses[page]:
            self._free.append(page)
