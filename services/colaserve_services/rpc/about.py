"""What a stage says about itself (GetInfo), and the conversions that the three stage services share. No torch."""

import time
from dataclasses import dataclass, field
from typing import Any

from colaserve.v1 import types_pb2
from colaserve_services import __version__


@dataclass(frozen=True)
class Identity:
    """Of the process that answers."""

    space: str  # fingerprint of the latent space
    weights: str = ""  # of the stage's own folder
    device: str = ""
    dtype: str = ""
    max_message_bytes: int = 0
    backend: str = ""  # what computes, and why
    ready_at: float = field(default_factory=time.monotonic)  # time.monotonic seconds


def info(engine: Any, identity: Identity) -> dict[str, Any]:
    """The fields that every stage's GetInfo response has: model, space, weights, limits, server.

    Raises Unavailable while the engine is at fault: a coordinator then knows that the runs that broke may be why.
    """
    engine.check_computes()
    limits, load = engine.limits, engine.load()
    return {
        "model": shape_message(engine.shape),
        "space": identity.space,
        "weights": identity.weights,
        "limits": types_pb2.Limits(
            max_context=limits.max_context,
            max_message_bytes=identity.max_message_bytes,
            max_running=limits.max_running,
            kv_bytes=limits.kv_bytes,
            run_ahead=limits.run_ahead,
            kv_blocks=engine.kv_blocks,
        ),
        "server": types_pb2.ServerInfo(
            version=__version__,
            device=identity.device,
            dtype=identity.dtype,
            backend=identity.backend,
            running=load.running,
            kv_bytes_used=load.kv_bytes_used,
            uptime_seconds=time.monotonic() - identity.ready_at,
        ),
    }


def shape_message(shape: Any) -> types_pb2.ModelShape:
    """A model.config.ModelShape as a message."""
    names = ("latent_dim", "block_size", "vae_block_size", "patch_size", "vocab_size", "parameters")
    return types_pb2.ModelShape(**{name: getattr(shape, name) for name in names})


def timing(timings: Any) -> types_pb2.Timing:
    """An engine's Timings as a message."""
    return types_pb2.Timing(queue_us=timings.queue_us, compute_us=timings.compute_us)


def deadline(context: Any) -> float | None:
    """The call's deadline in time.monotonic() seconds; None without one."""
    remaining = context.time_remaining()
    return None if remaining is None else time.monotonic() + remaining
