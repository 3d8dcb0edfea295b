"""What leading blocks left behind, kept for the next session that begins with the same ones."""

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from colaserve_services.engine.failures import out_of_memory
from colaserve_services.engine.observer import EngineObserver

T = TypeVar("T")
_log = logging.getLogger(__name__)


class Cache(Protocol):
    """The part of a KV cache that prefixes need."""

    def nbytes_of(self, positions: int) -> int: ...
    def copy_of(self, stop: int) -> Any: ...
    def fill_from(self, other: Any, stop: int) -> None: ...


def chain_keys(blocks: Iterable[bytes], salt: str = "") -> list[bytes]:
    """One key for each block that stands for it and all blocks before it; other salts give other keys."""
    digest, keys = hashlib.sha256(hashlib.sha256(salt.encode()).digest()), []
    for block in blocks:
        digest.update(block)
        keys.append(digest.digest())
    return keys


@dataclass(frozen=True)
class _Entry(Generic[T]):
    keys: tuple[bytes, ...]
    value: T
    nbytes: int


class PrefixCache(Generic[T]):
    """Values of chains of blocks, found by any leading part; the least recently used go when the budget is spent.

    A budget of 0 keeps nothing. Not thread-safe: it belongs to the device thread.
    """

    def __init__(self, budget_bytes: int):
        self._budget = budget_bytes
        self._entries: OrderedDict[bytes, _Entry[T]] = OrderedDict()  # by the last key of the chain
        self._owners: dict[bytes, bytes] = {}  # any key -> the last key of an entry that holds it
        self.nbytes = 0

    @property
    def enabled(self) -> bool:
        return self._budget > 0

    def find(self, keys: Sequence[bytes]) -> tuple[int, T | None]:
        """How many leading blocks are known, and the value of a chain that begins with them."""
        for count in range(len(keys), 0, -1):
            owner = self._owners.get(keys[count - 1])
            if owner is not None:
                self._entries.move_to_end(owner)
                return count, self._entries[owner].value
        return 0, None

    def wants(self, keys: Sequence[bytes], nbytes: int) -> bool:
        """Whether `add` would keep something that is not known yet: ask before making the value."""
        return 0 < nbytes <= self._budget and len(keys) > 0 and keys[-1] not in self._owners

    def add(self, keys: Sequence[bytes], value: T, nbytes: int) -> None:
        """Keep a value; shorter chains that it continues are given up for it."""
        for key in keys:
            if key in self._entries:
                self._drop(key)
        self._entries[keys[-1]] = _Entry(tuple(keys), value, nbytes)
        self._owners |= dict.fromkeys(keys, keys[-1])
        self.nbytes += nbytes
        while self.nbytes > self._budget:
            self._drop(next(iter(self._entries)))

    def clear(self) -> None:
        """Keep nothing of what is there."""
        self._entries.clear()
        self._owners.clear()
        self.nbytes = 0

    def _drop(self, last: bytes) -> None:
        entry = self._entries.pop(last)
        self.nbytes -= entry.nbytes
        lost = [key for key in entry.keys if self._owners.get(key) == last]
        for key in lost:
            del self._owners[key]
        for other in self._entries.values() if lost else ():  # that begin alike
            if other.keys[0] == entry.keys[0]:
                for mine, its in zip(entry.keys, other.keys, strict=False):
                    if mine != its:
                        break
                    self._owners.setdefault(mine, other.keys[-1])


class Prefixes:
    """KV of leading blocks of one engine's sessions: copied out when they are complete, copied into later sessions."""

    def __init__(self, budget_bytes: int, block_size: int, observer: EngineObserver):
        self._cache: PrefixCache[tuple[Any, Any]] = PrefixCache(budget_bytes)
        self._block_size, self._observer = block_size, observer

    def keys(self, blocks: Iterable[bytes], salt: str) -> list[bytes]:
        """Keys of a session's leading blocks; none when nothing is kept."""
        return chain_keys(blocks, salt) if self._cache.enabled else []

    def restore(self, keys: Sequence[bytes], cache: Cache) -> tuple[int, Any]:
        """Fill a new session's cache as far as its leading blocks are known: their number, and what was kept beside."""
        count, held = self._cache.find(keys)
        if keys:
            self._observer.prefix_cache(count, len(keys) - count, self._cache.nbytes)
        if held is None:
            return 0, None
        cache.fill_from(held[0], count * self._block_size)
        return count, held[1]

    def remember(self, keys: Sequence[bytes], cache: Cache, beside: Any = None) -> None:
        """Keep a copy of a session's leading blocks."""
        positions = len(keys) * self._block_size
        nbytes = cache.nbytes_of(positions)
        if self._cache.wants(keys, nbytes):
            try:
                self._cache.add(keys, (cache.copy_of(positions), beside), nbytes)
            except Exception as error:
                if not out_of_memory(error):
                    raise
                # Sessions need it more.
                _log.warning("no memory left to keep prefixes in; all kept ones are given up")
                self.forget()
            self._observer.prefix_cache(0, 0, self._cache.nbytes)

    def forget(self) -> None:
        """Give up all that is kept."""
        self._cache.clear()
        self._observer.prefix_cache(0, 0, 0)
