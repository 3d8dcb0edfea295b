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
from colaserve_services.engine.prefix_cache import Prefixes
from colaserve_services.engine.session import Session
from colaserve_services.engine.timings import Timings
from colaserve_services.errors import InvalidRequest
from colaserve_services.model.attention import RaggedAttention, Segment
from colaserve_services.model.config import ModelShape
from colaserve_services.model.kv_cache import KVCache, KVShape
from colaserve_services.model.text_vae import TextVAEEncoder

MAX_SEQUENCES = 256


@dataclass(frozen=True)
class Encoded:
    """Normalised posterior mean and log variance of one sequence, (ceil(L / P), d) float32, on the CPU."""

    latents: Tensor
    log_variance: Tensor | None


class EncoderSession(Session[Encoded]):
    """One sequence. It needs a cache when it takes more than one chunk, or when its leading blocks are kept."""

    def __init__(self, engine: "EncoderEngine", ids: Sequence[int], with_variance: bool, deadline: float | None):
        self._engine, self._with_variance = engine, with_variance
        P, block = engine.shape.patch_size, engine.shape.patch_size * engine.shape.block_size
        padding = [engine.pad_id] * (-len(ids) % block)
        self.ids = torch.tensor([*ids, *padding])
        self.rows = len(self.ids) // P  # latents, padding included
        self.length = -(-len(ids) // P)
        self._cached = self.rows > engine.limits.prefill_chunk or engine.limits.prefix_cache_bytes > 0
        super().__init__(
            kv_bytes=engine.kv_shape.nbytes(self.rows) if self._cached else 0,
            work=self.rows,
            deadline=deadline,
            on_read=engine.wake,
        )
        self.position = 0
        self._parts: list[tuple[Tensor, Tensor | None]] = []

    def start(self) -> None:
        self.cache = KVCache(self._engine.kv_shape, self.rows) if self._cached else None
        self._engine.observer.tokens(self.length, 0)
        if self.cache is not None:
            self._restore(self.cache)

    def _restore(self, cache: KVCache) -> None:
        """Take over the leading blocks that were encoded before: their latents' bytes are then the same, too."""
        B, P, prefixes = self._engine.shape.block_size, self._engine.shape.patch_size, self._engine.prefixes
        self._keys = prefixes.keys(block.numpy().tobytes() for block in self.ids.split(B * P))
        count, posterior = prefixes.restore(self._keys, cache)
        if count:
            mean, logvar = posterior
            self.take(mean[: count * B], None if logvar is None else logvar[: count * B])

    def free(self) -> None:
        self.cache = None

    def ready(self) -> bool:
        return not self.finished

    def remaining(self) -> int:
        return self.rows - self.position

    def take(self, mean: Tensor, logvar: Tensor | None) -> None:
        """The posterior of the next rows."""
        check_finite("the posterior", mean, logvar)
        self._parts.append((mean, logvar))
        self.position += len(mean)
        if self.position == self.rows:
            self._finish()

    def _finish(self) -> None:
        means, logvars = zip(*self._parts, strict=True)
        mean, logvar = torch.cat(means), None if logvars[0] is None else torch.cat(logvars)
        if self.cache is not None:
            self._engine.prefixes.remember(self._keys, self.cache, (mean, logvar))
        latents = self._engine.model.normalise(mean)[: self.length].to("cpu", torch.float32, copy=True)
        check_latents("the latents", latents)
        variance = logvar[: self.length].to("cpu", copy=True) if logvar is not None and self._with_variance else None
        self.outbox.put(Encoded(latents, variance))
        self.outbox.close()
        self.finished = True


@dataclass(frozen=True)
class _Turn:
    """The next rows of one sequence."""

    session: EncoderSession
    rows: int


class EncoderEngine(Engine[EncoderSession, _Turn]):
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
        limits = limits.fitting(shape.block_size, self.kv_shape.nbytes)
        super().__init__(device, limits, observer or EngineObserver())
        self.model, self.shape, self.pad_id = model, shape, pad_id
        self.has_variance = config.use_variation
        self.prefixes = Prefixes(limits.prefix_cache_bytes, shape.block_size, self.observer)

    async def encode(
        self, sequences: Sequence[Sequence[int]], *, with_variance: bool = False, deadline: float | None = None
    ) -> tuple[list[Encoded], Timings]:
        """Encode 1 to 256 sequences of token ids. Raises `InvalidRequest`, `Overloaded`, `DeadlineExceeded`."""
        arrived, sessions = time.monotonic(), []
        self._check_call(sequences, with_variance)
        for number, ids in enumerate(sequences):
            self._check(number, ids)
            sessions.append(EncoderSession(self, ids, with_variance, deadline))
            await asyncio.sleep(0)  # 256 long sequences take their time; others have a turn between them
        async with self._all_admitted(sessions):
            results = [result for session in sessions if (result := await session.outbox.get()) is not None]
        started = min(session.started or arrived for session in sessions)
        now = time.monotonic()
        return results, Timings(int((started - arrived) * 1e6), int((now - started) * 1e6))

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

    def _turns(self, ready: list[EncoderSession]) -> list[_Turn]:
        """Whole sequences that fit one chunk together, or the next chunk of a long one."""
        room, turns = self.limits.prefill_chunk, []
        for session in ready:
            rows = min(session.remaining(), self.limits.prefill_chunk)
            if rows <= room:
                turns.append(_Turn(session, rows))
                room -= rows
        return turns

    def _compute(self, turns: list[_Turn]) -> list[tuple[Tensor, Tensor | None]]:
        """The heartbeat: the next rows of as many sequences as one pass takes; the posterior of each."""
        P = self.shape.patch_size
        pieces = [(turn.session, turn.session.position, turn.rows) for turn in turns]
        ids = torch.cat([session.ids[start * P : (start + rows) * P] for session, start, rows in pieces])
        positions = torch.cat([torch.arange(start, start + rows) for _, start, rows in pieces])
        mean, logvar = self._posterior(
            ids, positions, [Segment(rows, start, session.cache) for session, start, rows in pieces]
        )
        counts = [turn.rows for turn in turns]
        logvars = [None] * len(turns) if logvar is None else logvar.split(counts)
        return list(zip(mean.split(counts), logvars, strict=True))

    def _posterior(self, ids: Tensor, positions: Tensor, segments: list[Segment]) -> tuple[Tensor, Tensor | None]:
        rows, model = len(positions), self.model
        if extra := model.padding(rows):
            ids, positions = F.pad(ids, (0, extra * self.shape.patch_size)), F.pad(positions, (0, extra))
            segments = [*segments, Segment(extra)]
        attend = RaggedAttention(segments, model.config.block_size, model.device)
        mean, logvar = model(ids.to(model.device), positions.to(model.device), attend)
        return mean[:rows], None if logvar is None else logvar[:rows]

    def _take(self, turn: _Turn, result: tuple[Tensor, Tensor | None]) -> None:
        turn.session.take(*result)

    def _warm_up_row(self) -> tuple[Tensor | None, ...]:
        B, P = self.shape.block_size, self.shape.patch_size
        return self._posterior(torch.zeros(B * P, dtype=torch.int64), torch.arange(B), [Segment(B)])
