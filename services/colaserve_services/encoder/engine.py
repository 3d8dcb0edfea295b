"""The encoder's engine: sequences of many calls through one forward pass, long ones in chunks of blocks."""

import asyncio
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from colaserve_services.engine.device import DeviceThread
from colaserve_services.engine.engine import Engine
from colaserve_services.engine.failures import check_finite, check_latents
from colaserve_services.engine.limits import EngineLimits
from colaserve_services.engine.observer import EngineObserver
from colaserve_services.engine.session import Session, Timings
from colaserve_services.errors import InvalidRequest
from colaserve_services.model.backend import Pass, Row
from colaserve_services.model.backend.pages import chain_keys
from colaserve_services.model.backend.pick import Picked
from colaserve_services.model.config import ModelShape
from colaserve_services.model.text_vae import TextVAEEncoder

MAX_SEQUENCES = 256
_FOUND = 64  # blocks that were encoded before and are taken over in the time of encoding one

Posterior = tuple[Tensor, Tensor | None]  # mean and log variance of some rows


@dataclass(frozen=True)
class Encoded:
    """Normalised posterior mean and log variance of one sequence, (ceil(L / P), d) float32, on the CPU."""

    latents: Tensor
    log_variance: Tensor | None


class _Sequence:
    """One sequence of a call, padded to whole blocks."""

    def __init__(self, engine: "EncoderEngine", ids: NDArray[np.int64], salt: str):
        P, block = engine.shape.patch_size, engine.shape.patch_size * engine.shape.block_size
        padded = np.pad(ids, (0, -len(ids) % block), constant_values=engine.pad_id)
        self.blocks = torch.from_numpy(padded).view(-1, block)
        self.length = -(-len(ids) // P)
        self.keys = chain_keys(padded, len(self.blocks), salt) if engine.limits.share_prefixes else []
        self.pages = array("i")  # one a block, from its first pass on
        self.parts: list[Posterior] = []  # of the blocks that are encoded

    @property
    def remaining(self) -> int:
        """Blocks that are not encoded."""
        return len(self.blocks) - len(self.parts)


class EncoderSession(Session[Encoded]):
    """One call. Its sequences are encoded in their order, so only one of them is in its middle at a time; that one
    holds its pages until it is through, so the next one waits for pages no longer than that."""

    def __init__(
        self, engine: "EncoderEngine", sequences: list[_Sequence], with_variance: bool, deadline: float | None
    ):
        self._engine, self._with_variance = engine, with_variance
        self._left = sequences[::-1]  # the next one last
        super().__init__(claim=0, most=0, deadline=deadline, on_read=engine.wake)

    def free(self) -> list[int]:
        pages = [page for sequence in self._left for page in sequence.pages]
        self._left.clear()
        return pages

    def ready(self) -> bool:
        return not self.finished

    def remaining(self) -> int:
        return sum(sequence.remaining for sequence in self._left)

    def next_blocks(self, capacity: float) -> tuple[list[tuple[_Sequence, int]] | None, float]:
        """Whole sequences that one pass takes together, or the next chunk of a long one; None when they lack pages.
        None are begun behind one whose leading blocks another call is about to have encoded. And the capacity left."""
        pieces: list[tuple[_Sequence, int]] = []
        whole = self._engine.most_blocks
        for sequence in self._left[::-1]:
            if not sequence.pages:
                if capacity <= 0 or self._engine.awaits(sequence.keys, self):
                    break
                if not self._begin(sequence):
                    return pieces or None, capacity
                capacity -= len(sequence.parts) / _FOUND
            cost = min(self._engine.backend.cost(len(sequence.parts)), whole)
            count = min(sequence.remaining, int(whole / cost))
            if count * cost > capacity:
                break
            if count:
                pieces.append((sequence, count))
                capacity -= count * cost
        if not pieces:
            self._hand_over_completed()
        return pieces, capacity

    @property
    def under_way(self) -> _Sequence | None:
        """The sequence in whose middle it is."""
        return self._left[-1] if self._left and self._left[-1].pages else None

    def _begin(self, sequence: _Sequence) -> bool:
        """Take over the leading blocks that were encoded before, whose latents' bytes are then the same, too."""
        pages = self._engine.backend.pages
        found, beside = pages.find(sequence.keys)
        others = pages.reserve(len(sequence.blocks) - len(found))
        if others is None:
            pages.free(found)
            return False
        sequence.pages.extend(found + others)
        sequence.parts += beside
        self._engine.observer.tokens(sequence.length, 0)
        self._engine.looked_up(sequence.keys, len(found))
        return True

    def take(self, parts: Sequence[tuple[_Sequence, list[Posterior]]]) -> None:
        """The posteriors of the blocks that `next_blocks` named."""
        for sequence, posteriors in parts:
            means, logvars = zip(*posteriors, strict=True)
            check_finite("the posterior", torch.cat(means), None if logvars[0] is None else torch.cat(logvars))
            sequence.parts += posteriors
        self._hand_over_completed()

    def _hand_over_completed(self) -> None:
        while self._left and self._left[-1].pages and not self._left[-1].remaining:
            sequence = self._left.pop()
            try:
                self.outbox.put(self._encoded(sequence))
            finally:
                self._engine.backend.pages.free(sequence.pages)
        if not self._left:
            self.outbox.close()
            self.finished = True

    def _encoded(self, sequence: _Sequence) -> Encoded:
        self._engine.remember(sequence.keys, sequence.pages, sequence.parts)
        means, logvars = zip(*sequence.parts, strict=True)
        latents = self._engine.model.normalise(torch.cat(means))[: sequence.length].to("cpu", torch.float32, copy=True)
        check_latents("the latents", latents)
        if not self._with_variance:
            return Encoded(latents, None)
        return Encoded(latents, torch.cat(logvars)[: sequence.length].to("cpu", copy=True))


@dataclass(frozen=True)
class _ScheduledSession:
    """The next blocks of one call."""

    session: EncoderSession
    pieces: list[tuple[_Sequence, int]]
    rows: int  # positions


class EncoderEngine(Engine[EncoderSession, _ScheduledSession]):
    """Batches sequences; results do not depend on what they are batched with."""

    def __init__(
        self,
        model: TextVAEEncoder,
        shape: ModelShape,
        device: DeviceThread,
        limits: EngineLimits,
        pad_id: int,
        observer: EngineObserver | None = None,
        picked: Picked | None = None,
    ):
        super().__init__("encoder", model, shape, device, limits, observer, picked)
        self.pad_id = pad_id
        self.most_blocks = self.limits.prefill_chunk // shape.block_size  # of a pass, where they see few before them
        self.has_variance, self.scaling_factor = model.config.use_variation, model.config.scaling_factor

    async def encode(
        self,
        sequences: Sequence[Sequence[int]],
        *,
        with_variance: bool = False,
        cache_salt: str = "",
        deadline: float | None = None,
    ) -> tuple[list[Encoded], Timings]:
        """Encode 1 to 256 sequences of token ids. Raises `InvalidRequest`, `Overloaded`, `DeadlineExceeded`."""
        arrived, padded = time.monotonic(), []
        self._check_call(sequences, with_variance)
        for number, ids in enumerate(sequences):
            padded.append(_Sequence(self, self._checked(number, ids), cache_salt))
            await asyncio.sleep(0)  # 256 long sequences take their time; other tasks run between them
        session = EncoderSession(self, padded, with_variance, deadline)
        async with self._admitted(session):
            results = []
            while (result := await session.outbox.get()) is not None:
                results.append(result)
        return results, session.timings(arrived)

    def _check_call(self, sequences: Sequence[Sequence[int]], with_variance: bool) -> None:
        if not 1 <= len(sequences) <= MAX_SEQUENCES:
            raise InvalidRequest("sequences", f"got {len(sequences)} sequences, expected 1 to {MAX_SEQUENCES}")
        if with_variance and not self.has_variance:
            raise InvalidRequest("with_variance", "this checkpoint has no variance (use_variation is false)")

    def _checked(self, number: int, ids: Sequence[int]) -> NDArray[np.int64]:
        longest, vocabulary = self.limits.max_context * self.shape.patch_size, self.shape.vocab_size
        if not 1 <= len(ids) <= longest:
            raise InvalidRequest(
                f"sequences[{number}]", f"got {len(ids)} tokens, expected 1 to {longest} (max_context)"
            )
        found = np.array(ids, np.int64)  # of a message's ids a copy of their memory
        if found.max() >= vocabulary or found.min() < 0:
            what = f"got an id of {found.max()}, expected 0 to {vocabulary - 1}"
            raise InvalidRequest(f"sequences[{number}].ids", what)
        return found

    def awaits(self, keys: Sequence[bytes], session: EncoderSession) -> bool:
        """Whether another session's next passes compute the first leading block that is not known yet."""
        first = self.backend.pages.leading(keys)
        others = (each.under_way for each in self._sessions.all if each is not session)
        begun = [other.keys[first : first + 1] for other in others if other is not None]
        return first < len(keys) and [keys[first]] in begun

    def _schedule(self, ready: list[EncoderSession]) -> list[_ScheduledSession]:
        capacity, scheduled, lacking = float(self.most_blocks), list[_ScheduledSession](), False
        for session in ready:
            if lacking and session.under_way is None:  # it leaves another the pages that it lacks
                continue
            pieces: list[tuple[_Sequence, int]] | None = []
            with self._alone(session):
                pieces, capacity = session.next_blocks(capacity)
            lacking = lacking or pieces is None
            if pieces:
                rows = sum(count for _, count in pieces) * self.shape.block_size
                scheduled.append(_ScheduledSession(session, pieces, rows))
        return scheduled

    def _begin(self, scheduled: list[_ScheduledSession]) -> Pass:
        """The heartbeat: the next blocks of as many sequences as one pass takes."""
        rows = [
            Row(sequence.pages, number, sequence.blocks[number])
            for each in scheduled
            for sequence, count in each.pieces
            for number in range(len(sequence.parts), len(sequence.parts) + count)
        ]
        return self.backend.run(self.backend.plan(rows))

    def _results(
        self, scheduled: list[_ScheduledSession], found: Sequence[Posterior]
    ) -> list[list[tuple[_Sequence, list[Posterior]]]]:
        """The posteriors of each sequence's blocks."""
        rest = iter(found)
        return [[(sequence, list(islice(rest, count))) for sequence, count in each.pieces] for each in scheduled]

    def _take(self, scheduled: _ScheduledSession, result: list[tuple[_Sequence, list[Posterior]]]) -> None:
        scheduled.session.take(result)
