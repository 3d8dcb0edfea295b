"""The encoder's engine: sequences of many calls through one forward pass, long ones in chunks of blocks."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from colaserve_services.engine.device import DeviceThread
from colaserve_services.engine.engine import Engine
from colaserve_services.engine.failures import check_finite, check_latents
from colaserve_services.engine.limits import EngineLimits
from colaserve_services.engine.observer import EngineObserver
from colaserve_services.engine.session import Session, Timings
from colaserve_services.errors import InvalidRequest
from colaserve_services.model.attention import RaggedAttention, Segment
from colaserve_services.model.config import ModelShape
from colaserve_services.model.kv_cache import KVCache, KVShape
from colaserve_services.model.text_vae import TextVAEEncoder

MAX_SEQUENCES = 256

Posterior = tuple[Tensor, Tensor | None]  # mean and log variance of some rows


@dataclass(frozen=True)
class Encoded:
    """Normalised posterior mean and log variance of one sequence, (ceil(L / P), d) float32, on the CPU."""

    latents: Tensor
    log_variance: Tensor | None


class _Sequence:
    """One sequence of a call, padded to whole blocks. It needs a cache when it takes more than one chunk, or when its
    leading blocks are kept."""

    def __init__(self, engine: "EncoderEngine", ids: Sequence[int]):
        P, block = engine.shape.patch_size, engine.shape.patch_size * engine.shape.block_size
        self.ids = torch.tensor([*ids, *[engine.pad_id] * (-len(ids) % block)])
        self.rows = len(self.ids) // P  # latents, padding included
        self.length = -(-len(ids) // P)
        limits = engine.limits
        cached = self.rows > limits.prefill_chunk or limits.prefix_cache_bytes > 0
        self.kv_bytes = engine.kv_shape.nbytes(self.rows) if cached else 0
        self.cache: KVCache | None = None
        self.keys: list[bytes] = []
        self.position = 0
        self.parts: list[Posterior] = []

    def posterior(self) -> Posterior:
        """Of all rows."""
        means, logvars = zip(*self.parts, strict=True)
        return torch.cat(means), None if logvars[0] is None else torch.cat(logvars)


class EncoderSession(Session[Encoded]):
    """One call. Its sequences are encoded in their order, so only one of them is in its middle at a time."""

    def __init__(
        self,
        engine: "EncoderEngine",
        sequences: list[_Sequence],
        with_variance: bool,
        cache_salt: str,
        deadline: float | None,
    ):
        self._engine, self._with_variance, self._salt = engine, with_variance, cache_salt
        self._left = sequences[::-1]  # the next one last
        kv_bytes = [sequence.kv_bytes for sequence in sequences]
        beside = engine.kv_shape.nbytes(engine.limits.prefill_chunk)  # short ones in the pass that ends a long one
        most = min(max(kv_bytes) + beside, engine.limits.kv_bytes)
        super().__init__(kv_bytes=min(sum(kv_bytes), most), deadline=deadline, on_read=engine.wake)

    def free(self) -> None:
        self._left.clear()

    def ready(self) -> bool:
        return not self.finished

    def remaining(self) -> int:
        return sum(sequence.rows - sequence.position for sequence in self._left)

    def next_rows(self, capacity: int) -> list[tuple[_Sequence, int]]:
        """Whole sequences that fit one pass together, or the next chunk of a long one."""
        pieces: list[tuple[_Sequence, int]] = []
        for sequence in self._left[::-1]:
            if not sequence.parts and sequence.cache is None:
                self._begin(sequence)
            rows = min(sequence.rows - sequence.position, self._engine.limits.prefill_chunk)
            if rows > capacity:
                break
            if rows:
                pieces.append((sequence, rows))
                capacity -= rows
        if not pieces:
            self._hand_over_completed()
        return pieces

    def _begin(self, sequence: _Sequence) -> None:
        """Take over the leading blocks that were encoded before: their latents' bytes are then the same, too."""
        self._engine.observer.tokens(sequence.length, 0)
        if not sequence.kv_bytes:
            return
        B, P, prefixes = self._engine.shape.block_size, self._engine.shape.patch_size, self._engine.prefixes
        sequence.cache = KVCache(self._engine.kv_shape, sequence.rows)
        blocks = (block.numpy().tobytes() for block in sequence.ids.split(B * P))
        sequence.keys = prefixes.keys(blocks, self._salt)
        count, posterior = prefixes.restore(sequence.keys, sequence.cache)
        if count:
            mean, logvar = posterior
            sequence.parts.append((mean[: count * B], None if logvar is None else logvar[: count * B]))
            sequence.position = count * B

    def take(self, parts: Sequence[tuple[_Sequence, Tensor, Tensor | None]]) -> None:
        """The posteriors of the rows that `next_rows` named."""
        for sequence, mean, logvar in parts:
            check_finite("the posterior", mean, logvar)
            sequence.parts.append((mean, logvar))
            sequence.position += len(mean)
        self._hand_over_completed()

    def _hand_over_completed(self) -> None:
        while self._left and self._left[-1].position == self._left[-1].rows:
            self.outbox.put(self._encoded(self._left.pop()))
        if not self._left:
            self.outbox.close()
            self.finished = True

    def _encoded(self, sequence: _Sequence) -> Encoded:
        mean, logvar = sequence.posterior()
        if sequence.cache is not None:
            self._engine.prefixes.remember(sequence.keys, sequence.cache, (mean, logvar))
        latents = self._engine.model.normalise(mean)[: sequence.length].to("cpu", torch.float32, copy=True)
        check_latents("the latents", latents)
        wanted = logvar[: sequence.length] if logvar is not None and self._with_variance else None
        return Encoded(latents, None if wanted is None else wanted.to("cpu", copy=True))


@dataclass(frozen=True)
class _ScheduledSession:
    """The next rows of one call."""

    session: EncoderSession
    pieces: list[tuple[_Sequence, int]]

    @property
    def rows(self) -> int:
        return sum(rows for _, rows in self.pieces)


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
    ):
        config = model.config
        self.kv_shape = KVShape(model.num_layers, config.num_heads, config.head_dim, model.dtype, model.device)
        super().__init__(shape.block_size, self.kv_shape.nbytes, device, limits, observer)
        self.model, self.shape, self.pad_id = model, shape, pad_id
        self.has_variance = config.use_variation

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
            self._check(number, ids)
            padded.append(_Sequence(self, ids))
            await asyncio.sleep(0)  # 256 long sequences take their time; other tasks run between them
        session = EncoderSession(self, padded, with_variance, cache_salt, deadline)
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

    def _check(self, number: int, ids: Sequence[int]) -> None:
        longest, vocabulary = self.limits.max_context * self.shape.patch_size, self.shape.vocab_size
        if not 1 <= len(ids) <= longest:
            raise InvalidRequest(
                f"sequences[{number}]", f"got {len(ids)} tokens, expected 1 to {longest} (max_context)"
            )
        if max(ids) >= vocabulary or min(ids) < 0:
            raise InvalidRequest(f"sequences[{number}].ids", f"got an id of {max(ids)}, expected 0 to {vocabulary - 1}")

    def _schedule(self, ready: list[EncoderSession]) -> list[_ScheduledSession]:
        capacity, scheduled = self.limits.prefill_chunk, []
        for session in ready:
            with self._alone(session):  # the device may lack the memory
                if pieces := session.next_rows(capacity):
                    scheduled.append(_ScheduledSession(session, pieces))
                    capacity -= scheduled[-1].rows
        return scheduled

    def _compute(self, scheduled: list[_ScheduledSession]) -> list[list[tuple[_Sequence, Tensor, Tensor | None]]]:
        """The heartbeat: the next rows of as many sequences as one pass takes; the posterior of each."""
        P = self.shape.patch_size
        pieces = [(sequence, sequence.position, rows) for each in scheduled for sequence, rows in each.pieces]
        ids = torch.cat([sequence.ids[start * P : (start + rows) * P] for sequence, start, rows in pieces])
        positions = torch.cat([torch.arange(start, start + rows) for _, start, rows in pieces])
        mean, logvar = self._posterior(
            ids, positions, [Segment(rows, start, sequence.cache) for sequence, start, rows in pieces]
        )
        counts = [rows for _, _, rows in pieces]
        logvars = [None] * len(counts) if logvar is None else logvar.split(counts)
        found = iter(zip(mean.split(counts), logvars, strict=True))
        return [[(sequence, *next(found)) for sequence, _ in each.pieces] for each in scheduled]

    def _posterior(self, ids: Tensor, positions: Tensor, segments: list[Segment]) -> Posterior:
        rows, model = len(positions), self.model
        if extra := model.padding(rows):
            ids, positions = F.pad(ids, (0, extra * self.shape.patch_size)), F.pad(positions, (0, extra))
            segments = [*segments, Segment(extra)]
        attend = RaggedAttention(segments, model.config.block_size, model.device)
        mean, logvar = model(ids.to(model.device), positions.to(model.device), attend)
        return mean[:rows], None if logvar is None else logvar[:rows]

    def _take(self, scheduled: _ScheduledSession, result: list[tuple[_Sequence, Tensor, Tensor | None]]) -> None:
        scheduled.session.take(result)

    def _warm_up_row(self) -> Posterior:
        B, P = self.shape.block_size, self.shape.patch_size
        return self._posterior(torch.zeros(B * P, dtype=torch.int64), torch.arange(B), [Segment(B)])
