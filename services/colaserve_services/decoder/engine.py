"""The decoder's engine: latent blocks of many runs through one forward pass, then sampling."""

import math
import time
from collections import defaultdict, deque
from collections.abc import Collection, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from colaserve_services.bounds import TOP_LOGPROBS, check
from colaserve_services.engine.device import DeviceThread
from colaserve_services.engine.engine import Engine
from colaserve_services.engine.failures import NotFinite, check_finite
from colaserve_services.engine.limits import EngineLimits
from colaserve_services.engine.observer import EngineObserver
from colaserve_services.engine.session import Session, Timings
from colaserve_services.errors import InvalidRequest
from colaserve_services.model.backend import Pass, Row
from colaserve_services.model.backend.pages import chain_keys
from colaserve_services.model.backend.pick import Picked
from colaserve_services.model.config import ModelShape
from colaserve_services.model.layers import to_device
from colaserve_services.model.sampling import (
    Draw,
    SamplingSettings,
    listed,
    position_logprobs,
    probes,
    sample_blocks,
)
from colaserve_services.model.text_vae import TextVAEDecoder

_LOOKS = 3  # at most, that previews wait: between two looks the prior makes a step where it shares the device
_BESIDE_BLOCKS = 64  # rows of prefixes in a pass that answers blocks


@dataclass(frozen=True)
class DecodeJob:
    """What a caller asks for; see OpenDecode in decoder.proto for the meaning of each field."""

    prefix: Tensor  # (n, d) float32, n a multiple of B
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    history_ids: Sequence[int] = ()
    with_logits: bool = False
    top_logprobs: int = 0
    target_ids: Sequence[int] = ()
    max_latents: int = 0  # positions to reserve KV for; 0: max_context
    cache_salt: str = ""  # leading blocks are shared with runs of the same salt
    with_probes: bool = False
    logprob_ids: Sequence[int] = ()
    all_logprobs: bool = False
    logprobs_dtype: torch.dtype = torch.float32


class Pending(NamedTuple):
    """Latents to decode."""

    latents: Tensor  # (B, d)
    arrived: float
    provisional: bool  # whether they are a preview, which is answered and leaves no trace


class TokenProbes(NamedTuple):
    """How sure the decoder is of a block; see Probes in types.proto."""

    entropy: float
    end_probability: float


@dataclass(frozen=True)
class DecodedBlock:
    """B * P sampled ids with what was asked for about each."""

    index: int  # in the run, counted from the history
    provisional: bool
    token_ids: list[int]
    logprobs: list[float]
    top: list[tuple[list[int], list[float]]]
    logits: Tensor | None  # (B * P, vocab_size) float32, on the CPU
    target_logprobs: list[float]
    probes: TokenProbes | None
    position_logprobs: Tensor | None  # (B * P, logprob_ids or vocab_size), on the CPU
    timings: Timings

    def check_finite(self) -> None:
        """Raise `NotFinite` unless all numbers are; NaN among a position's logits makes its log-probabilities NaN."""
        top = (value for _, values in self.top for value in values)
        if not all(map(math.isfinite, chain(self.logprobs, self.target_logprobs, top, self.probes or ()))):
            raise NotFinite(f"the log-probabilities of block {self.index}: not finite")
        check_finite(f"the logits of block {self.index}", self.logits, self.position_logprobs)


class DecoderSession(Session[DecodedBlock]):
    """A run being decoded. `decode` takes its blocks in order."""

    def __init__(self, engine: "DecoderEngine", job: DecodeJob, deadline: float | None):
        self._engine, self.job = engine, job
        self.capacity = job.max_latents or engine.limits.max_context
        B = engine.shape.block_size
        blocks = self.capacity // B
        super().__init__(
            claim=min(len(job.prefix) // B + 1, blocks), most=blocks, deadline=deadline, on_read=engine.wake
        )
        self.pending: deque[Pending] = deque()  # what to decode, in order
        self.seen = set(job.history_ids)
        self.sampled = len(job.history_ids)
        self.previews = False  # whether it asked for one last
        self.accepted = len(job.prefix)  # latent positions taken in so far
        self.prefix = list(job.prefix.split(B)) if len(job.prefix) else []  # to be in the cache before the next block
        self._taken: list[Tensor] = []  # blocks behind them that are in it
        self.blocks = 0  # in the cache
        if engine.limits.share_prefixes:
            self.keys = chain_keys(job.prefix.numpy(), len(self.prefix), job.cache_salt)

    async def decode(self, latents: Tensor) -> DecodedBlock:
        """Decode the next block, (B, d) float32. Raises `InvalidRequest` when it exceeds the reservation."""
        [block] = await self._decoded([latents], "block")
        return block

    async def preview(self, latents: Tensor) -> list[DecodedBlock]:
        """As `decode`, of each of the given previews of the next block, (n * B, d) float32. They leave no trace."""
        return await self._decoded(latents.split(self._engine.shape.block_size), "preview")

    async def _decoded(self, blocks: Sequence[Tensor], name: str) -> list[DecodedBlock]:
        B, d, provisional = self._engine.shape.block_size, self._engine.shape.latent_dim, name == "preview"
        for latents in blocks:
            if latents.shape != (B, d):
                raise InvalidRequest(name, f"got shape {list(latents.shape)}, expected {[B, d]}")
        if self.accepted + B > self.capacity:
            raise InvalidRequest(name, f"position {self.accepted} is beyond the {self.capacity} latents reserved")
        self.accepted += 0 if provisional else B
        self.previews = provisional
        self.pending += [Pending(latents, time.monotonic(), provisional) for latents in blocks]
        self._engine.wake()
        answers = [await self.outbox.get() for _ in blocks]
        assert None not in answers, "this outbox only fails or gives blocks"
        return answers  # type: ignore[return-value]

    def targets(self, count: int) -> Sequence[int]:
        """Those of the next block of so many ids."""
        begin = self.sampled - len(self.job.history_ids)
        return self.job.target_ids[begin : begin + count]

    @property
    def cached(self) -> int:
        return self.blocks

    def begin(self) -> None:
        self._engine.observer.tokens(len(self.job.prefix), 0)

    def start(self, known: int, beside: Sequence[Any]) -> None:
        self.blocks = known

    def lacking(self) -> int:
        return max(self.blocks, len(self.prefix)) + self.answerable - len(self.pages)

    @property
    def answerable(self) -> int:
        """What the pass that has taken the prefix in may answer: a block, or as many previews as it may have pages."""
        return min(len(self.pending), self.most - max(self.blocks, len(self.prefix)))

    def preemptible(self) -> bool:
        return len(self._taken) > 0 or not self.ready()

    def preempt(self) -> None:
        self.prefix, self._taken, self.blocks = self.prefix + self._taken, [], 0
        self.claim = min(len(self.prefix) + 1, self.most)

    def ready(self) -> bool:
        return not self.finished and (self.remaining() > 0 or len(self.pending) > 0)

    def awaits_preview(self) -> bool:
        """Whether it has nothing else to compute."""
        return not self.remaining() and self.pending[0].provisional

    def remaining(self) -> int:
        """Blocks of the prefix that are not in the cache."""
        return max(0, len(self.prefix) - self.blocks)

    def advance(self, scheduled: "_ScheduledSession") -> None:
        """What a pass took of it is in the cache. The next blocks are written over previews."""
        self.blocks += len(scheduled.rows_of) - len(scheduled.answered)
        if scheduled.answered and not scheduled.answered[0].provisional:
            self.blocks += 1
            self._taken.append(scheduled.answered[0].latents)


@dataclass(frozen=True)
class _ScheduledSession:
    """What one session sends through a pass: blocks of its prefix, then, once that is in, its next block, or previews
    of that: each as if it were the only one, on the page of the block or, if there are more, of one to come."""

    session: DecoderSession
    rows_of: list[Row]
    answered: list[Pending]
    rows: int  # positions

    @classmethod
    def of(cls, session: DecoderSession, count: int) -> "_ScheduledSession":
        blocks, first = session.prefix[session.blocks : session.blocks + count], session.blocks
        rows = [Row(session.pages, first + i, latents, wanted=False) for i, latents in enumerate(blocks)]
        answered = list(session.pending)[: session.answerable] if count == session.remaining() else []
        at, pages = first + count, session.pages
        for i, each in enumerate(answered):
            rows.append(Row(pages[:at] + pages[at + i : at + i + 1] if i else pages, at, each.latents))
        return cls(session, rows, answered, sum(len(row.inputs) for row in rows if row.inputs is not None))


_Answer = tuple[Tensor, ...]  # of a block: logits (B * P, V), ids, log-probabilities, probes, and what is listed


class DecoderEngine(Engine[DecoderSession, _ScheduledSession]):
    """Continuous batching over decode streams."""

    def __init__(
        self,
        model: TextVAEDecoder,
        shape: ModelShape,
        device: DeviceThread,
        limits: EngineLimits,
        observer: EngineObserver | None = None,
        picked: Picked | None = None,
        end_ids: Collection[int] = (),
    ):
        """`end_ids`: those that end a text, for probes."""
        super().__init__("decoder", model, shape, device, limits, observer, picked)
        self._end_ids = torch.tensor(sorted(end_ids), dtype=torch.int64)
        self._ids = shape.block_size * shape.patch_size  # of a block
        self._held = 0  # looks in a row that left previews for the next

    def session(self, job: DecodeJob, *, deadline: float | None = None) -> AbstractAsyncContextManager[DecoderSession]:
        """Hold a session while inside the context. Raises `InvalidRequest` at once, `Overloaded` on entering."""
        check_job(job, self.shape, self.limits)
        return self._admitted(DecoderSession(self, job, deadline))

    def next_deadline(self) -> float | None:
        return time.monotonic() if self._held and self._look_again is None else super().next_deadline()

    def _ready(self) -> list[DecoderSession]:
        """While nothing but previews is waited for, and not all that may come are there, they are left for later looks,
        so that those of several sessions share a pass, or that of a block."""
        ready = super()._ready()
        lack = 0 < len(ready) < sum(session.previews for session in self._sessions.all)
        hold = lack and self._held < _LOOKS and all(session.awaits_preview() for session in ready)
        self._held = self._held + 1 if hold else 0
        return [] if hold else ready

    def _begin(self, scheduled: list[_ScheduledSession]) -> Pass:
        """The heartbeat: prefixes and blocks through the decoder, then ids for the blocks."""
        answered = [each.session for each in scheduled for _ in each.answered]
        draws = [Draw(each.job.sampling, each.seen, each.sampled // self._ids) for each in answered]

        def then(logits: Tensor) -> Sequence[Tensor]:
            return *sample_blocks(logits, draws), self._probes(logits, answered), *self._listed(logits, answered)

        return self.backend.run(self.backend.plan([row for each in scheduled for row in each.rows_of]), then)

    def _probes(self, logits: Tensor, answered: list[DecoderSession]) -> Tensor:
        """(K, 2), of those that want them."""
        found = logits.new_zeros(len(answered), 2)
        wanted = [i for i, session in enumerate(answered) if session.job.with_probes]
        if wanted:
            index = to_device(torch.tensor(wanted), logits.device)
            end_ids = to_device(self._end_ids, logits.device)  # on the stream that reads them
            found.index_copy_(0, index, probes(logits.index_select(0, index), end_ids))
        return found

    def _listed(self, logits: Tensor, answered: list[DecoderSession]) -> Sequence[Tensor]:
        """Log-probabilities of targets and of the most likely ids, and these ids; nothing where nobody asks. Who asks
        for equally many shares a call, since among equal ones which come first depends on how many are asked for."""
        asking = defaultdict[int, list[int]](list)
        for i, session in enumerate(answered):
            if session.job.top_logprobs or session.targets(self._ids):
                asking[min(session.job.top_logprobs, logits.shape[-1])].append(i)
        if not asking:
            return ()
        values = logits.new_zeros(*logits.shape[:2], 1 + max(asking))
        ids = torch.zeros(*logits.shape[:2], max(asking), dtype=torch.int64, device=logits.device)
        for count, members in asking.items():
            index = to_device(torch.tensor(members), logits.device)
            targets = torch.zeros(len(members), self._ids, dtype=torch.int64)
            for row, i in zip(targets, members, strict=True):
                own = answered[i].targets(self._ids)
                row[: len(own)] = torch.tensor(own, dtype=torch.int64)
            some, likely = listed(logits.index_select(0, index), count, to_device(targets, logits.device))
            values[index, :, : 1 + count], ids[index, :, :count] = some, likely
        return values, ids

    def _results(self, scheduled: list[_ScheduledSession], found: Sequence[Any]) -> list[list[_Answer]]:
        answers = iter(found)
        every = [[next(answers) for _ in each.rows_of] for each in scheduled]
        return [[answer for answer in some if answer is not None] for some in every]

    def _take(self, scheduled: _ScheduledSession, result: list[_Answer]) -> None:
        scheduled.session.advance(scheduled)
        for answer in result:
            self._answer(scheduled.session, *answer)

    def _schedule(self, ready: list[DecoderSession]) -> list[_ScheduledSession]:
        B, scheduled = self.shape.block_size, []
        capacity = self.limits.prefill_chunk / B  # blocks that see none before them
        if not all(session.remaining() for session in ready):  # some blocks are waited for
            capacity = min(capacity, _BESIDE_BLOCKS / B)
        for session in ready:
            cost = self.backend.cost(session.blocks)
            count = min(session.remaining(), max(1, int(capacity / cost))) if capacity > 0 else 0
            capacity -= count * cost
            found = _ScheduledSession.of(session, count)
            if found.rows_of:
                scheduled.append(found)
        return scheduled

    def _answer(
        self, session: DecoderSession, logits: Tensor, drawn: Tensor, logprobs: Tensor, probed: Tensor, *lists: Tensor
    ) -> None:
        """Hand one block's ids over, with what was asked for beside them."""
        job, ids, count = session.job, drawn.tolist(), len(drawn)
        _, arrived, provisional = session.pending.popleft()
        targets, top = len(session.targets(count)), job.top_logprobs
        values, likely = (each.tolist() for each in lists) if targets or top else ((), ())
        looked_up = job.all_logprobs or len(job.logprob_ids) > 0
        wanted = None if job.all_logprobs else job.logprob_ids
        block = DecodedBlock(
            index=session.sampled // count,
            provisional=provisional,
            token_ids=ids,
            logprobs=logprobs.tolist(),
            top=[(best[:top], some[1 : 1 + top]) for best, some in zip(likely, values, strict=True)] if top else [],
            logits=logits.to("cpu", copy=True) if job.with_logits else None,
            target_logprobs=[some[0] for some in values[:targets]],
            probes=TokenProbes(*probed.tolist()) if job.with_probes else None,
            position_logprobs=(
                position_logprobs(logits.log_softmax(dim=-1), wanted, job.logprobs_dtype) if looked_up else None
            ),
            timings=session.timings(arrived),
        )
        block.check_finite()
        if not provisional:
            self.observer.block(time.monotonic() - arrived, first=session.sampled == len(job.history_ids))
            self.observer.tokens(0, self.shape.block_size)
            session.seen.update(ids)
            session.sampled += count
        session.outbox.put(block)


def check_job(job: DecodeJob, shape: ModelShape, limits: EngineLimits) -> None:
    """Raise `InvalidRequest` naming the field of a job that this model and these limits cannot do."""
    B, d, P = shape.block_size, shape.latent_dim, shape.patch_size
    if job.prefix.ndim != 2 or job.prefix.shape[1] != d or len(job.prefix) % B:
        raise InvalidRequest(
            "open.prefix", f"got shape {list(job.prefix.shape)}, expected (n, {d}), n a multiple of {B}"
        )
    reserved = job.max_latents or limits.max_context
    if reserved % B or not len(job.prefix) <= reserved <= limits.max_context:
        raise InvalidRequest(
            "open.max_latents",
            f"got {job.max_latents}, expected a multiple of {B} from the prefix's {len(job.prefix)} to "
            f"max_context, {limits.max_context}",
        )
    if len(job.history_ids) % (B * P):
        raise InvalidRequest(
            "open.history_ids", f"got {len(job.history_ids)} ids, expected a multiple of {B * P} (whole blocks)"
        )
    if len(job.history_ids) > limits.max_context * P:
        raise InvalidRequest(
            "open.history_ids", f"got {len(job.history_ids)} ids, at most {limits.max_context * P} fit (max_context)"
        )
    check(TOP_LOGPROBS, "open.top_logprobs", job.top_logprobs)
    if len(job.target_ids) > (reserved - len(job.prefix)) * P:
        raise InvalidRequest(
            "open.target_ids",
            f"got {len(job.target_ids)} ids, expected at most the {(reserved - len(job.prefix)) * P} of this stream",
        )
    if job.all_logprobs and len(job.logprob_ids):
        raise InvalidRequest("open.all_logprobs", "got logprob_ids too, expected one of both")
    if len(job.logprob_ids) > shape.vocab_size:
        raise InvalidRequest(
            "open.logprob_ids", f"got {len(job.logprob_ids)} ids, expected at most {shape.vocab_size} (the vocabulary)"
        )
    for name in ("history_ids", "target_ids", "logprob_ids"):
        check_ids(f"open.{name}", getattr(job, name), shape.vocab_size)


def check_ids(field_name: str, ids: Any, vocab_size: int) -> None:
    """Raise `InvalidRequest` naming the first id outside the vocabulary."""
    for position, token in enumerate(ids):
        if not 0 <= token < vocab_size:
            raise InvalidRequest(field_name, f"id {token} at position {position}; expected 0 to {vocab_size - 1}")
