"""What each role is made of. Torch is imported where a stage, or a checkpoint's files, are needed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colaserve_services.errors import UsageError
from colaserve_services.launch import card, ports, settings, threads
from colaserve_services.launch.observers import CoordinatorMetrics
from colaserve_services.launch.process import Host, in_thread, run
from colaserve_services.launch.settings import Params
from colaserve_services.rpc.connections import Connection, Replicas
from colaserve_services.rpc.local import LocalStub

if TYPE_CHECKING:
    from colaserve_services.coordinator import Coordinator, Stages
    from colaserve_services.launch.stages import RunningStages
    from colaserve_services.model.checkpoint import Checkpoint

PACKAGE = "colaserve.v1"


def run_stage(stage: str, params: Params) -> None:
    """One stage: "encoder", "prior" or "decoder"."""
    ports.check(params)
    model, limits = settings.model(params), settings.engine(params)
    server = settings.server(params)
    threads.settle(model.threads)

    async def assemble(host: Host) -> None:
        await host.open_ports(grpc=True)
        host.publish()
        checkpoint = await _checkpoint(model.directory)
        stages = await _stages(host, (stage,), model, limits, checkpoint)
        await host.serve_grpc(stages.services[stage], context_bytes=_context_bytes(params, checkpoint))
        await stages.warm_up()

    run(stage, settings.watch(params), server, settings.keys(params), assemble)


def run_coordinator(params: Params) -> None:
    """GenerationService and LatentService over stages elsewhere."""
    ports.check(params)
    directory, channel = settings.checkpoint(params), settings.channel(params)
    targets = {stage: settings.target(params, stage) for stage in ("encoder", "prior", "decoder")}

    async def assemble(host: Host) -> None:
        from colaserve_services.coordinator import Stages

        await host.open_ports(grpc=True)
        host.publish()
        checkpoint = await _checkpoint(directory)
        changed = asyncio.Event()
        replicas = {
            name: await _replicas(host, f"{name.title()}Service", target, channel, changed.set)
            for name, target in targets.items()
        }
        stages = Stages(
            replicas["encoder"],
            replicas["prior"],
            replicas["decoder"],
            changed,
            **{f"{stage}_target": target for stage, target in targets.items()},
        )
        coordinator = _coordinator(host, params, checkpoint, stages)
        await host.serve_grpc(*_coordinator_services(coordinator), context_bytes=_context_bytes(params, checkpoint))
        await _connect(host, coordinator)

    run("coordinator", settings.watch(params), settings.server(params), settings.keys(params), assemble)


def run_gateway(params: Params) -> None:
    """OpenAI's HTTP in front of coordinators elsewhere."""
    ports.check(params)
    channel, target = settings.channel(params), settings.target(params, "coordinator")
    server = settings.gateway_server(params)

    async def assemble(host: Host) -> None:
        await host.open_ports(grpc=False)
        coordinator = _connection(host, "GenerationService", target, channel)  # and LatentService, on the same channel
        await _gateway(host, params, coordinator.stub, coordinator.reached)

    run("gateway", settings.watch(params), server, None, assemble)


def run_all(params: Params) -> None:
    """Everything in this process: the stages are called without sockets, one gRPC port serves all five services."""
    ports.check(params)
    if settings.replicas(params):
        raise UsageError("--replicas: needs --split; without it all stages share one process")
    model, limits = settings.model(params), settings.engine(params)
    settings.channel(params)  # nothing is called elsewhere, yet what is wrong with it is said
    threads.settle(model.threads)

    async def assemble(host: Host) -> None:
        from colaserve_services.coordinator import Stages
        from colaserve_services.gateway.backend import coordinator_stub

        await host.open_ports(grpc=True)
        checkpoint = await _checkpoint(model.directory)
        host.description = card.description(model.directory)
        running = await _stages(host, ("encoder", "prior", "decoder"), model, limits, checkpoint)
        encoder, prior, decoder = (LocalStub(running.services[name]) for name in ("encoder", "prior", "decoder"))
        stages = Stages(encoder, prior, decoder)
        coordinator = _coordinator(host, params, checkpoint, stages)
        generation, latent = _coordinator_services(coordinator)
        services = generation, latent, *running.services.values()
        await host.serve_grpc(*services, context_bytes=_context_bytes(params, checkpoint))
        await running.warm_up()
        await _connect(host, coordinator)
        await _gateway(host, params, coordinator_stub(LocalStub(generation), LocalStub(latent)))

    run("colaserve", settings.watch(params), settings.server(params), settings.keys(params), assemble)


async def _checkpoint(directory: Path) -> Checkpoint:
    def read() -> Checkpoint:
        from colaserve_services.model.checkpoint import Checkpoint

        return Checkpoint.open(directory)

    return await in_thread(read)


def _context_bytes(params: Params, checkpoint: Checkpoint) -> int:
    """What the latents of the longest context take as float32."""
    return int(params["max_context"]) * checkpoint.shape.latent_dim * 4


async def _stages(
    host: Host, names: tuple[str, ...], model: settings.ModelSettings, limits: Any, checkpoint: Checkpoint
) -> RunningStages:
    loop, at_fault = asyncio.get_running_loop(), set[str]()

    async def tell(stage: str, failing: bool) -> None:
        (at_fault.add if failing else at_fault.discard)(stage)
        await host.failing(bool(at_fault))

    def failing(stage: str, failing: bool) -> None:
        with suppress(RuntimeError):  # the loop is closed: the process ends
            loop.call_soon_threadsafe(lambda: asyncio.ensure_future(tell(stage, failing)))

    def load() -> RunningStages:
        from colaserve_services.launch.stages import load_stages

        return load_stages(names, checkpoint, model, limits, host.settings.max_message_bytes, host.metrics, failing)

    stages = await in_thread(load)
    host.stack.callback(stages.stop)
    return stages


def _coordinator(host: Host, params: Params, checkpoint: Checkpoint, stages: Stages) -> Coordinator:
    from colaserve_services.coordinator import Coordinator, CoordinatorLimits, Defaults
    from colaserve_services.text import Tokenizer

    limits = CoordinatorLimits(
        max_context=params["max_context"],
        max_message_bytes=params["max_message_bytes"],
        max_running=params["max_generations"],
        max_waiting=params["max_queued"],
        queue_seconds=params["queue_seconds"],
        max_per_key=params["max_per_key"],
        attempts=params["attempts"],
        idle_seconds=params["idle_seconds"],
    )
    tokenizer = Tokenizer.open(checkpoint.tokenizer_path, checkpoint.shape.vocab_size, checkpoint.defaults)
    own = {**checkpoint.defaults.requests, "chat_frame": checkpoint.defaults.chat_frame}
    defaults = Defaults.of(**(own | settings.request_defaults(params)))
    name = params["served_model_name"] or checkpoint.name
    observer = CoordinatorMetrics(host.metrics)
    about = card.description(checkpoint.directory)
    return Coordinator(stages, tokenizer, defaults, limits, observer, name, checkpoint.space, about)


def _coordinator_services(coordinator: Coordinator) -> tuple[object, object]:
    from colaserve_services.coordinator.service import GenerationServicer, LatentServicer

    return GenerationServicer(coordinator), LatentServicer(coordinator)


async def _connect(host: Host, coordinator: Coordinator) -> None:
    """Wait for the stages; from then on health follows theirs."""
    await coordinator.connect()
    watch = asyncio.ensure_future(coordinator.watch(host.follow))
    host.stack.callback(watch.cancel)


def _connection(host: Host, service: str, target: str, channel: Any) -> Connection:
    """To a service elsewhere; closed at the end."""
    connection = Connection(_stub_class(service), target, channel, f"{PACKAGE}.{service}")
    host.stack.push_async_callback(connection.close)
    connection.follow()
    return connection


async def _replicas(
    host: Host, service: str, target: str, channel: Any, began_to_serve: Callable[[], None]
) -> Replicas:
    """The replicas of a service elsewhere; closed at the end."""
    replicas = Replicas(_stub_class(service), target, channel, f"{PACKAGE}.{service}", began_to_serve)
    host.stack.push_async_callback(replicas.close)
    await replicas.find()
    replicas.follow()
    return replicas


def _stub_class(service: str) -> Any:
    from colaserve.v1 import (
        decoder_pb2_grpc,
        encoder_pb2_grpc,
        generation_pb2_grpc,
        latent_service_pb2_grpc,
        prior_pb2_grpc,
    )
    from colaserve_services.gateway.backend import coordinator_stub

    def coordinator(channel: Any) -> Any:
        return coordinator_stub(
            generation_pb2_grpc.GenerationServiceStub(channel), latent_service_pb2_grpc.LatentServiceStub(channel)
        )

    return {
        "EncoderService": encoder_pb2_grpc.EncoderServiceStub,
        "PriorService": prior_pb2_grpc.PriorServiceStub,
        "DecoderService": decoder_pb2_grpc.DecoderServiceStub,
        "GenerationService": coordinator,
    }[service]


async def _gateway(host: Host, params: Params, stub: Any, reach: Any = None) -> None:
    from colaserve_services.gateway.app import create_app
    from colaserve_services.gateway.server import serve
    from colaserve_services.gateway.settings import Bounds, GatewaySettings

    bounds = replace(
        Bounds(),
        body_bytes=params["max_body_bytes"],
        request_seconds=params["request_seconds"],
        unread_seconds=params["idle_seconds"],
        choices=params["max_choices"],
    )
    gateway = GatewaySettings(
        keys=settings.keys(params),
        admission=settings.admission(params),
        cors_origins=tuple(origin for origin in params["cors_origins"].split(",") if origin),
        allow_unknown_fields=params["allow_unknown_fields"],
        bounds=bounds,
    )
    tls = settings.http_tls(params)
    app = create_app(stub, gateway, host.metrics, reach)
    host.serve_http(await serve(app, params["host"], params["http_port"], tls), "https" if tls else "http")
