"""The sessions that an engine holds: it takes a newcomer at once or refuses it, since it has no queue."""

import math
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, Final, Generic, TypeVar

from colaserve_services.engine.limits import EngineLimits
from colaserve_services.engine.session import Session
from colaserve_services.errors import Overloaded, Unavailable
from colaserve_services.model.backend.pages import Pages

S = TypeVar("S", bound=Session[Any])

HOLDS_AT_LEAST: Final = 1.0  # seconds that a session keeps its KV though a newcomer lacks it
_MUCH_MORE: Final = 4  # times the KV of another: a session of that size is preempted for it
_PASSES: Final = 16  # newcomers that may take KV while a preempted session lacks it
_SHORTEST_HINT, _LONGEST_HINT = 0.1, 60.0  # seconds
_SMOOTHING = 0.1  # weight of a session that ended in the running mean of their durations


@dataclass(frozen=True)
class _Plan(Generic[S]):
    """How a newcomer gets in: who is evicted for it, and who is preempted. Or why it does not."""

    evicted: list[S] = field(default_factory=list)
    preempted: S | None = None
    refusal: str = ""  # "slots" or "kv"


class Sessions(Generic[S]):
    """Slots and KV pages of one engine. A preempted session keeps its slot and gets pages again when there are some.

    Newcomers are taken on their callers' threads; all else happens on the device thread."""

    def __init__(self, limits: EngineLimits, pages: Pages, refused: Callable[[str], None]):
        self._limits, self._pages, self._refused = limits, pages, refused
        self._lock = threading.Lock()
        self._held: list[S] = []  # in order of arrival
        self._mean_seconds = 1.0  # that sessions last

    @property
    def all(self) -> list[S]:
        """Those that are held now."""
        with self._lock:
            return [*self._held]

    def __len__(self) -> int:
        return len(self._held)

    def add(self, session: S, check: Callable[[], None]) -> None:
        """Take a newcomer, for which idle or large sessions may have to go; Overloaded when it does not fit.

        `check` may raise; nobody is added between that and this."""
        with self._lock:
            check()
            wanted = [each for each in self._held if each.wanted]
            plan = self._plan(session, wanted)
            hint = min(max(self._mean_seconds / max(len(wanted), 1), _SHORTEST_HINT), _LONGEST_HINT)
            if not plan.refusal:
                self._carry_out(plan)
                session.reserves = True
                self._held.append(session)
        if plan.refusal:
            self._refused(plan.refusal)
            lacking = "slot" if plan.refusal == "slots" else "KV memory"
            raise Overloaded(f"{len(wanted)} sessions run, and there is no {lacking} for another one", hint)

    def remove(self, session: S) -> None:
        """It has ended."""
        with self._lock:
            self._held.remove(session)
            if session.started is not None:
                lasted = time.monotonic() - session.started
                self._mean_seconds += _SMOOTHING * (lasted - self._mean_seconds)

    def reserve_again(self) -> None:
        """Let preempted sessions have pages again, as far as there are some, in order of arrival.

        One that others run beside gets them when there are more than it takes to start, so that it is not preempted
        again at once."""
        with self._lock:
            wanted = [each for each in self._held if each.wanted]
            free, runs = self._free(), any(session.reserves for session in wanted)
            for session in wanted:
                if not session.reserves and not session.holds_kv:
                    ahead = min(session.claim // _MUCH_MORE + 1, session.most - session.claim) if runs else 0
                    needed = self._needed(session)
                    if needed + ahead > free:
                        return
                    session.reserves, session.passed, runs = True, 0, True
                    free -= needed

    def awaits_other(self, session: S) -> bool:
        """Whether another's next passes compute the session's first leading block that is not known yet."""
        for other in (each for each in self.all if each.holds_kv and each.wanted and each.ready()):
            keys, at = session.keys, other.cached
            if other.keys[at : at + 1] == keys[at : at + 1]:  # so those before, which the other holds, are known
                at += self._pages.leading(keys[at:])
            if at < len(keys) and other.keys[at : at + 1] == keys[at : at + 1]:
                return True
        return False

    def to_preempt(self) -> S:
        """Who gives its pages back when a session that grows finds none: the youngest but for much smaller ones."""
        holding = [each for each in self.all if each.holds_kv]
        most = max(len(each.pages) for each in holding)
        return max((each for each in holding if _MUCH_MORE * len(each.pages) > most), key=lambda each: each.arrived)

    def _free(self) -> int:
        """Pages that nobody holds but who is about to give them back, or may take when it starts."""
        free = self._pages.available
        for session in self._held:
            if session.wanted and session.reserves:
                free -= 0 if session.holds_kv else self._needed(session)
            else:
                free += len(session.pages)
        return free

    def _needed(self, session: S) -> int:
        """Pages that it takes to start, without those that it shares with a session that came before it."""
        before = takewhile(lambda other: other is not session, self._held)
        shared = (_both_begin_with(session.keys, other.keys) for other in before if other.wanted and other.reserves)
        return session.claim - max(shared, default=0)

    def _plan(self, newcomer: S, wanted: list[S]) -> _Plan[S]:
        """Idle sessions are evicted first, and no more of them than it takes."""
        needed = self._needed(newcomer)
        kept_back = max((each.claim for each in wanted if each.passed >= _PASSES), default=0)
        free, slots, evicted = self._free() - kept_back, self._limits.max_running - len(wanted), list[S]()
        idle = iter(self._idle(wanted))
        while slots < 1 or free < needed:
            if (session := next(idle, None)) is None:
                break
            evicted.append(session)
            slots, free = slots + 1, free + len(session.pages)
        if slots < 1:
            return _Plan(refusal="slots")
        if free >= needed:
            return _Plan(evicted)
        preempted = self._to_preempt_for([each for each in wanted if each not in evicted], needed, free)
        return _Plan(evicted, preempted) if preempted else _Plan(refusal="kv")

    def _idle(self, wanted: list[S]) -> list[S]:
        """Sessions that have had nothing to compute for too long, the longest first: their reader is away, or sends
        nothing. Their caller may go on with another session."""
        since = time.monotonic() - self._limits.idle_seconds
        idle = [each for each in wanted if each.idle_since <= since and not each.ready()]
        return sorted(idle, key=lambda each: each.idle_since)

    def _to_preempt_for(self, running: list[S], needed: int, free: int) -> S | None:
        """A session that has held more than half of all pages, or many more than are needed, for a while."""
        latest = time.monotonic() - HOLDS_AT_LEAST
        for session in sorted(running, key=lambda each: len(each.pages), reverse=True):
            held = len(session.pages)
            large = held > needed and (held > self._pages.count / 2 or held >= _MUCH_MORE * needed)
            enough = session.reserves and free + held >= needed
            if large and enough and session.holds_since <= latest and session.preemptible():
                return session
        return None

    def _carry_out(self, plan: _Plan[S]) -> None:
        for session in plan.evicted:
            idle = self._limits.idle_seconds
            session.evict(Unavailable(f"nothing to compute for {idle:g} s while others wait"))
            self._refused("idle")
        for session in self._held:
            session.passed += session.wanted and not session.reserves
        if plan.preempted:
            plan.preempted.reserves, plan.preempted.idle_since = False, math.inf


def _both_begin_with(one: Sequence[bytes], other: Sequence[bytes]) -> int:
    """How many keys of two chains are the same: once they differ, they differ from there on."""
    return bisect_left(range(min(len(one), len(other))), True, key=lambda index: one[index] != other[index])
