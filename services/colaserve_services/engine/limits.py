"""What an engine takes at most, and how busy it is."""

import logging
from dataclasses import dataclass, replace

from colaserve_services.errors import UsageError

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineLimits:
    """Bounds of one engine."""

    max_context: int = 8192  # latent positions of a session, prompt and generation together
    max_running: int = 32  # sessions that share forward passes; one more is refused
    kv_bytes: int = 2 << 30  # KV budget in bytes
    run_ahead: int = 2  # blocks that may wait unread before a session pauses
    share_prefixes: bool = True  # whether free KV pages keep leading blocks for sessions that begin with the same
    idle_seconds: float = 60.0  # that a session may have nothing to compute while newcomers lack its slot or its KV
    look_again_seconds: float = 5.0  # between two looks of an engine at fault whether it computes again
    prefill_chunk: int = 512  # latents of contexts in one pass; the prior takes fewer while a session samples

    def fitting(self, block_size: int, pages: int, page_bytes: int) -> "EngineLimits":
        """The same with whole blocks, and as long a context as fits so many pages of KV, one a block.

        Raises UsageError when not even a block fits.
        """
        asked = self.max_context // block_size
        if not asked:
            raise UsageError(f"--max-context: got {self.max_context}, less than one block of {block_size} latents")
        if not pages:
            raise UsageError(f"--kv-bytes: got {self.kv_bytes}, one block of latents needs {page_bytes}")
        if pages < asked:
            _log.warning("--kv-bytes fits contexts of %d latents, not %d", block_size * pages, self.max_context)
        # Within a block all positions see each other: none may be cut.
        chunk = max(block_size, self.prefill_chunk // block_size * block_size)
        kv_bytes = min(self.kv_bytes, pages * page_bytes)
        return replace(self, max_context=block_size * min(pages, asked), kv_bytes=kv_bytes, prefill_chunk=chunk)


@dataclass(frozen=True)
class Load:
    """How busy an engine is at this moment."""

    running: int
    kv_bytes_used: int
