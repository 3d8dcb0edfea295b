"""The three stages as the coordinator sees them, and what they say about themselves."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any, Final

from colaserve.v1 import decoder_pb2, encoder_pb2, prior_pb2, types_pb2
from colaserve_services.errors import ModelMismatch

NAMES: Final = ("encoder", "prior", "decoder")
IN_PROCESS: Final = "in-process"
_INFO_REQUESTS: Final[dict[str, Callable[[], Any]]] = {
    "encoder": encoder_pb2.EncoderServiceGetInfoRequest,
    "prior": prior_pb2.PriorServiceGetInfoRequest,
    "decoder": decoder_pb2.DecoderServiceGetInfoRequest,
}


@dataclass(frozen=True)
class Stages:
    """Stubs of grpc.aio, or look-alikes with their call surface, and the addresses they reach."""

    encoder: Any
    prior: Any
    decoder: Any
    encoder_target: str = IN_PROCESS
    prior_target: str = IN_PROCESS
    decoder_target: str = IN_PROCESS

    def info(self, stage: str, timeout: float) -> Awaitable[Any]:
        """The stage's answer to GetInfo."""
        stub = getattr(self, stage)
        answer: Awaitable[Any] = stub.GetInfo(_INFO_REQUESTS[stage](), timeout=timeout)
        return answer

    def target(self, stage: str) -> str:
        """The address that a stage is reached at."""
        return str(getattr(self, f"{stage}_target"))


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

    def within(self, infos: dict[str, Any], max_context: int, max_message_bytes: int) -> Model:
        """The same with the least of these limits and those that the stages tell."""
        context = _least(infos, "max_context", max_context)
        return replace(
            self,
            max_context=context // self.block_size * self.block_size,
            max_message_bytes=_least(infos, "max_message_bytes", max_message_bytes),
        )

    def shape(self) -> types_pb2.ModelShape:
        """As a message."""
        names = ("latent_dim", "block_size", "vae_block_size", "patch_size", "vocab_size", "parameters")
        return types_pb2.ModelShape(**{name: getattr(self, name) for name in names})


def agree(infos: dict[str, Any], max_context: int, max_message_bytes: int) -> Model:
    """The model of stages that answered GetInfo so. Raises ModelMismatch naming the two that differ."""
    _check_same(infos, "space", lambda info: info.space)
    for name in ("latent_dim", "block_size", "vae_block_size", "patch_size", "vocab_size"):
        _check_same(infos, name, lambda info, name=name: getattr(info.model, name))  # type: ignore[misc]
    shape = infos["decoder"].model
    return Model(
        space=infos["decoder"].space,
        latent_dim=shape.latent_dim,
        block_size=shape.block_size,
        vae_block_size=shape.vae_block_size,
        patch_size=shape.patch_size,
        vocab_size=shape.vocab_size,
        parameters=sum(info.model.parameters for info in infos.values()),
        max_context=max_context,
        max_message_bytes=max_message_bytes,
        has_variance=infos["encoder"].has_variance,
    ).within(infos, max_context, max_message_bytes)


def _least(infos: dict[str, Any], name: str, ours: int) -> int:
    """The least of our limit and those of the stages that tell one."""
    theirs = (getattr(info.limits, name) for info in infos.values())
    return min(ours, *(limit or ours for limit in theirs))


def _check_same(infos: dict[str, Any], name: str, read: Callable[[Any], Any]) -> None:
    """A stage that says nothing about it (0 or "") agrees with all."""
    first = "decoder"
    for stage in ("encoder", "prior"):
        ours, theirs = read(infos[first]), read(infos[stage])
        if ours and theirs and ours != theirs:
            raise ModelMismatch(f"the stages serve different models: {name} is {theirs} at {stage}, {ours} at {first}")
