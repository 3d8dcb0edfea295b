"""What an engine takes at most, and how busy it is."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class EngineLimits:
    """Bounds of one engine."""

    max_context: int = 8192  # latent positions of a session, prompt and generation together
    max_running: int = 32  # sessions that share forward passes
    max_waiting: int = 256  # sessions that may wait; one more is refused
    kv_bytes: int = 2 << 30  # KV budget in bytes
    run_ahead: int = 2  # blocks that may wait unread before a session pauses
    prefix_cache_bytes: int = 256 << 20  # for KV of identical leading blocks, beside kv_bytes; 0 switches it off
    idle_seconds: float = 60.0  # that a running session may have nothing to compute while others wait
    chunk: int = 512  # latents of context that one forward pass takes while no session is sampling

    def in_chunks_of(self, block_size: int) -> "EngineLimits":
        """The same with chunks of whole blocks: within a block all positions see each other, so none may be cut."""
        return replace(self, chunk=max(block_size, self.chunk // block_size * block_size))


@dataclass(frozen=True)
class Load:
    """How busy an engine is at this moment."""

    running: int
    waiting: int
    kv_bytes_used: int
