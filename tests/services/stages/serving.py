"""The three stages of a golden checkpoint behind one real gRPC server, and small helpers to call them."""

from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import torch

from colaserve.v1 import decoder_pb2_grpc, encoder_pb2_grpc, prior_pb2, prior_pb2_grpc, types_pb2
from colaserve_services.engine.limits import EngineLimits
from colaserve_services.launch.stages import RunningStages, load_stages
from colaserve_services.model.checkpoint import Checkpoint
from colaserve_services.rpc import arrays
from colaserve_services.rpc.metrics import Metrics
from tests.services.servers import served


@dataclass
class Served:
    stages: RunningStages
    metrics: Metrics
    space: str
    channel: grpc.aio.Channel
    limits: EngineLimits
    target: str
    encoder: Any = field(init=False)
    prior: Any = field(init=False)
    decoder: Any = field(init=False)

    def __post_init__(self) -> None:
        self.encoder = encoder_pb2_grpc.EncoderServiceStub(self.channel)
        self.prior = prior_pb2_grpc.PriorServiceStub(self.channel)
        self.decoder = decoder_pb2_grpc.DecoderServiceStub(self.channel)

    @property
    def shape(self):
        return self.stages.engines["prior"].shape

    def kv_bytes(self, stage: str) -> float:
        """The metric."""
        return self.metrics.registry.get_sample_value("colaserve_engine_kv_bytes", {"stage": stage})

    def blocks_written(self) -> float:
        """By the prior's engine, read or not."""
        labels = {"stage": "prior", "direction": "out"}
        return self.metrics.registry.get_sample_value("colaserve_engine_tokens_total", labels) / self.shape.block_size

    def latents(self, count: int, seed: int = 0, value: float | None = None):
        """Latents as a message: random, or all of one value."""
        values = torch.randn(count, self.shape.latent_dim, generator=torch.Generator().manual_seed(seed))
        if value is not None:
            values.fill_(value)
        return arrays.latents_to_message(values.numpy(), self.space)

    def run(
        self, known: int = 0, blocks: int = 2, steps: int = 2, value: float | None = None, **more: Any
    ) -> prior_pb2.SampleRequest:
        """A valid request."""
        more.setdefault("seed", {"base_seed": 1})
        return prior_pb2.SampleRequest(
            canvas={"latents": self.latents(known, value=value)}, max_blocks=blocks, sampler={"steps": steps}, **more
        )


@asynccontextmanager
async def serving(golden, limits=None, dtype="float32", network=lambda x: x, failing=lambda *_: None):
    torch.set_num_threads(1)
    limits = limits or EngineLimits(max_context=256)
    metrics, checkpoint = Metrics(), Checkpoint.open(golden.directory)
    compute = dict.fromkeys(("encoder", "prior", "decoder"), ("cpu", dtype))
    stages = load_stages(checkpoint, compute, limits, metrics, failing, network)
    options = [("grpc.max_receive_message_length", 64 << 20), ("grpc.max_send_message_length", 64 << 20)]
    try:
        async with served(*stages.services.values(), metrics=metrics, options=options) as it:
            yield Served(stages, metrics, checkpoint.space, it.channel, limits, f"127.0.0.1:{it.port}")
    finally:
        stages.stop()


def tensor_of(message: types_pb2.Tensor) -> torch.Tensor:
    """The rows of a message."""
    return torch.from_numpy(arrays.from_message(message, "rows", (None, None)))
