"""The three stages as the coordinator sees them, and what they say about themselves."""

import asyncio
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol

from colaserve.v1 import decoder_pb2, encoder_pb2, prior_pb2
from colaserve_services.errors import ModelMismatch

NAMES: Final = ("encoder", "prior", "decoder")
IN_PROCESS: Final = "in-process"
SHAPE: Final = ("latent_dim", "block_size", "vae_block_size", "patch_size", "vocab_size")
INFO_REQUESTS: Final[dict[str, Callable[[], Any]]] = {
    "encoder": encoder_pb2.EncoderServiceGetInfoRequest,
    "prior": prior_pb2.PriorServiceGetInfoRequest,
    "decoder": decoder_pb2.DecoderServiceGetInfoRequest,
}


class Replica(Protocol):
    """One replica of a stage. rpc.connections.Connection is one."""

    @property
    def address(self) -> str: ...
    @property
    def stub(self) -> Any: ...
    @property
    def serving(self) -> bool: ...
    @property
    def lives(self) -> int: ...


@dataclass(frozen=True)
class Local:
    """The one replica that is reached by a stub alone, as a stage in this process is."""

    stub: Any
    address: str = IN_PROCESS
    serving: bool = True
    lives: int = 0


class Stages:
    """The replicas of each stage and the addresses they reach. A stage is an iterable of replicas that is asked anew
    for every call, or one stub of grpc.aio, or something that can be called like one."""

    def __init__(
        self,
        encoder: Any,
        prior: Any,
        decoder: Any,
        changed: asyncio.Event | None = None,
        targets: Mapping[str, str] | None = None,
    ):
        """`changed` is set whenever a replica begins to serve. `targets`: the addresses of stages, by their names."""
        given = {"encoder": encoder, "prior": prior, "decoder": decoder}
        self.replicas: dict[str, Iterable[Replica]] = {
            name: stage if isinstance(stage, Iterable) else [Local(stage)] for name, stage in given.items()
        }
        self.changed = changed or asyncio.Event()
        self.shared = any(isinstance(stage, Iterable) for stage in given.values())  # other coordinators may call them
        self.targets = {**dict.fromkeys(NAMES, IN_PROCESS), **(targets or {})}


@dataclass(frozen=True)
class Model:
    """The model that the stages serve together."""

    space: str
    latent_dim: int  # d
    block_size: int  # B
    vae_block_size: int  # Bv
    patch_size: int  # P
    vocab_size: int
    parameters: int  # of all stages
    max_context: int  # latent positions, a multiple of B
    max_message_bytes: int
    has_variance: bool
    scaling_factor: float = 0.0  # of means, in normalising; 0: the encoder does not say
    prior_dtype: str = ""

    @property
    def block_tokens(self) -> int:
        """Tokens a block, B * P."""
        return self.block_size * self.patch_size

    def positions(self, tokens: int) -> int:
        """Latents that so many tokens have."""
        return -(-tokens // self.patch_size)

    def blocks(self, positions: int) -> int:
        """Blocks that so many latents need."""
        return -(-positions // self.block_size)

    def difference(self, info: Any) -> tuple[str, Any, Any] | None:
        """What a stage says otherwise of itself: name, its value, ours. One that says nothing (0 or "") agrees."""
        said = {"space": info.space, **{name: getattr(info.model, name) for name in SHAPE}}
        for name, theirs in said.items():
            if theirs and (ours := getattr(self, name)) and ours != theirs:
                return name, theirs, ours
        return None

    def within(self, infos: Iterable[Any], max_context: int, max_message_bytes: int) -> "Model":
        """The same with the least of these limits and those that the stages name."""
        infos = list(infos)
        context = _least(infos, "max_context", max_context)
        return replace(
            self,
            max_context=context // self.block_size * self.block_size,
            max_message_bytes=_least(infos, "max_message_bytes", max_message_bytes),
        )


def agree(infos: dict[str, Any], max_context: int, max_message_bytes: int) -> Model:
    """The model of stages that answered GetInfo so. Raises ModelMismatch naming the two that differ."""
    model = Model(
        space=infos["decoder"].space,
        **{name: getattr(infos["decoder"].model, name) for name in SHAPE},
        parameters=sum(info.model.parameters for info in infos.values()),
        max_context=max_context,
        max_message_bytes=max_message_bytes,
        has_variance=infos["encoder"].has_variance,
        scaling_factor=infos["encoder"].scaling_factor,
        prior_dtype=infos["prior"].server.dtype,
    )
    for stage in ("encoder", "prior"):
        if difference := model.difference(infos[stage]):
            name, theirs, ours = difference
            raise ModelMismatch(f"the stages serve different models: {name} is {theirs} at {stage}, {ours} at decoder")
    return model.within(infos.values(), max_context, max_message_bytes)


def _least(infos: Iterable[Any], name: str, ours: int) -> int:
    """The least of our limit and those of the stages that name one."""
    theirs = (getattr(info.limits, name) for info in infos)
    return min(ours, *(limit or ours for limit in theirs))
