"""What each role is made of. Torch is imported where a stage, or a checkpoint's files, are needed."""

import asyncio
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import grpc

from colaserve.v1.decoder_pb2_grpc import DecoderServiceStub
from colaserve.v1.encoder_pb2_grpc import EncoderServiceStub
from colaserve.v1.generation_pb2 import GenerationServiceGetInfoRequest
from colaserve.v1.generation_pb2_grpc import GenerationServiceStub
from colaserve.v1.latent_service_pb2_grpc import LatentServiceStub
from colaserve.v1.prior_pb2_grpc import PriorServiceStub
from colaserve_services.coordinator import Coordinator, CoordinatorLimits, Defaults, Stages
from colaserve_services.coordinator.service import GenerationServicer, LatentServicer
from colaserve_services.engine.limits import EngineLimits
from colaserve_services.errors import CheckpointError, UsageError
from colaserve_services.gateway.backend import coordinator_stub
from colaserve_services.inference.open_inference_pb2_grpc import GRPCInferenceServiceStub
from colaserve_services.inference.service import InferenceServicer
from colaserve_services.launch import settings as of_roles
from colaserve_services.launch.options import STAGES
from colaserve_services.launch.process import Host, check_ports, description, in_thread, run
from colaserve_services.launch.settings import (
    CoordinatorSettings,
    GatewaySettings,
    StageSettings,
    UpSettings,
    check_tls,
)
from colaserve_services.launch.split import Child, Launcher, reachable, unless_one_ends
from colaserve_services.model.checkpoint import Checkpoint
from colaserve_services.model.generation_config import GenerationDefaults, read_generation_config
from colaserve_services.rpc.connections import Connection, Replicas
from colaserve_services.rpc.local import LocalStub
from colaserve_services.text import Tokenizer

if TYPE_CHECKING:
    from colaserve_services.launch.stages import RunningStages

PACKAGE = "colaserve.v1"
INFO_SECONDS = 0.5  # that the metrics of a gateway wait for a coordinator
COORDINATOR = (GenerationServiceStub, LatentServiceStub, GRPCInferenceServiceStub)
STUBS: dict[str, Callable[[Any], Any]] = {
    "EncoderService": EncoderServiceStub,
    "PriorService": PriorServiceStub,
    "DecoderService": DecoderServiceStub,
    "GenerationService": lambda channel: coordinator_stub(*(stub(channel) for stub in COORDINATOR)),
}


def run_stages(names: tuple[str, ...], settings: StageSettings) -> None:
    """Stages in one process: of "encoder", "prior" and "decoder"."""
    check_ports(settings)
    check_tls(settings)
    if others := [name for name in settings.device if name in STAGES and name not in names]:
        raise UsageError(f"--device: names {', '.join(others)}, and this is the {' and '.join(names)}")
    of_roles.settle_threads(settings.threads)
    if any(settings.device_of(name) != "cpu" for name in names):  # read when torch is imported
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

    async def assemble(host: Host) -> None:
        await host.open_ports(settings.server(settings.grpc_port))
        host.publish()
        checkpoint = await _checkpoint(settings)
        stages = await _stages(host, names, settings, checkpoint)
        await host.serve_grpc(*stages.services.values(), context_bytes=_context_bytes(settings, checkpoint))
        await stages.warm_up()

    run("+".join(names), settings, assemble)


def run_coordinator(settings: CoordinatorSettings) -> None:
    """GenerationService and LatentService over stages elsewhere."""
    check_ports(settings)
    targets = {stage: of_roles.target(getattr(settings, stage), stage) for stage in STAGES}

    async def assemble(host: Host) -> None:
        await host.open_ports(settings.server(settings.grpc_port))
        host.publish()
        checkpoint = await _checkpoint(settings)
        await _serve_text(host, settings, checkpoint, await _elsewhere(host, settings, targets))

    run("coordinator", settings, assemble)


def run_apart(settings: UpSettings, said: Mapping[str, str], groups: Sequence[tuple[str, ...]]) -> None:
    """Coordinator and gateway in this process, each group of stages in another. With a GPU: the thread that launches
    its kernels then shares a Python interpreter with no other role."""
    check_ports(settings)
    check_tls(settings)
    launcher = Launcher(settings, said)
    os.environ[of_roles.ROLE_KEY] = launcher.key

    async def assemble(host: Host) -> None:
        await host.open_ports(settings.server(settings.grpc_port))
        checkpoint = await _checkpoint(settings)
        host.description = description(checkpoint.directory)
        children = [launcher.stages(group) for group in groups]
        for child in children:
            child.arguments.append(f"--model={checkpoint.directory}")
            host.stack.push_async_callback(child.stop, signal.SIGTERM)
        await unless_one_ends(children, _start(children))
        for child in children:
            host.stack.callback(asyncio.ensure_future(child.keep_running()).cancel)
        by_group = zip(children, groups, strict=True)
        targets = {stage: reachable(child.addresses["grpc"]) for child, stages in by_group for stage in stages}
        servicers = await _serve_text(host, settings, checkpoint, await _elsewhere(host, settings, targets))
        await _gateway(host, settings, coordinator_stub(*map(LocalStub, servicers)))
        for child in children:
            host.addresses |= {f"{child.name} {kind}": address for kind, address in child.addresses.items()}

    run("colaserve", settings, assemble)


async def _start(children: Sequence[Child]) -> None:
    """Start processes and return when all serve."""
    await asyncio.gather(*(child.start() for child in children))
    await asyncio.gather(*(child.serving() for child in children))


async def _elsewhere(host: Host, settings: CoordinatorSettings | UpSettings, targets: Mapping[str, str]) -> Stages:
    """Stages in other processes."""
    changed, found = asyncio.Event(), {}
    for name, target in targets.items():
        service = f"{name.title()}Service"
        found[name] = Replicas(STUBS[service], target, settings.channel, f"{PACKAGE}.{service}", changed.set)
        host.stack.push_async_callback(found[name].close)
        await found[name].find()
        found[name].follow()
    return Stages(**found, changed=changed, targets=targets)


async def _serve_text(
    host: Host, settings: CoordinatorSettings | UpSettings, checkpoint: Checkpoint, stages: Stages
) -> tuple[object, ...]:
    """The services of a coordinator over stages elsewhere, once these are there."""
    coordinator = _coordinator(host, settings, checkpoint, stages)
    servicers = _servicers(coordinator, host)
    await host.serve_grpc(*servicers, context_bytes=_context_bytes(settings, checkpoint))
    await _connect(host, coordinator)
    return servicers


def run_gateway(settings: GatewaySettings) -> None:
    """OpenAI's HTTP in front of coordinators elsewhere."""
    check_ports(settings)
    coordinators, service = of_roles.target(settings.coordinator, "coordinator"), "GenerationService"

    async def assemble(host: Host) -> None:
        await host.open_ports(None)
        # the other services, too, on the same channel
        coordinator = Connection(STUBS[service], coordinators, settings.channel, f"{PACKAGE}.{service}")
        host.stack.push_async_callback(coordinator.close)
        coordinator.follow()
        host.metrics.coordinator = _asking(coordinator)
        await _gateway(host, settings, coordinator.stub, coordinator.reached)

    run("gateway", settings, assemble)


def run_all(settings: UpSettings) -> None:
    """Everything in this process: the stages are called without sockets, one gRPC port serves all six services."""
    check_ports(settings)
    check_tls(settings)
    of_roles.settle_threads(settings.threads)

    async def assemble(host: Host) -> None:
        await host.open_ports(settings.server(settings.grpc_port))
        checkpoint = await _checkpoint(settings)
        host.description = description(checkpoint.directory)
        running = await _stages(host, STAGES, settings, checkpoint)
        encoder, prior, decoder = (LocalStub(running.services[name]) for name in STAGES)
        stages = Stages(encoder, prior, decoder)
        coordinator = _coordinator(host, settings, checkpoint, stages)
        servicers = _servicers(coordinator, host)
        services = *servicers, *running.services.values()
        await host.serve_grpc(*services, context_bytes=_context_bytes(settings, checkpoint))
        await running.warm_up()
        await _connect(host, coordinator)
        await _gateway(host, settings, coordinator_stub(*map(LocalStub, servicers)))

    run("colaserve", settings, assemble)


async def _checkpoint(settings: of_roles.Model) -> Checkpoint:
    return await in_thread(lambda: Checkpoint.open(settings.folder()))


def _asking(coordinator: Connection) -> Callable[[], Any]:
    """Asks a coordinator for its GetInfo, from another thread; None when it is silent."""
    loop = asyncio.get_running_loop()

    async def info() -> Any:
        stub: Any = coordinator.stub
        return await stub.GetInfo(GenerationServiceGetInfoRequest(), timeout=INFO_SECONDS)

    def ask() -> Any:
        try:
            return asyncio.run_coroutine_threadsafe(info(), loop).result(2 * INFO_SECONDS)
        except (grpc.RpcError, TimeoutError):
            return None

    return ask


def _context_bytes(settings: of_roles.Model, checkpoint: Checkpoint) -> int:
    """What the latents of the longest context take as float32."""
    return settings.max_context * checkpoint.shape.latent_dim * 4


async def _stages(
    host: Host, names: tuple[str, ...], settings: StageSettings, checkpoint: Checkpoint
) -> "RunningStages":
    loop, at_fault = asyncio.get_running_loop(), set[str]()

    async def tell(stage: str, failing: bool) -> None:
        (at_fault.add if failing else at_fault.discard)(stage)
        await host.failing(bool(at_fault))

    def failing(stage: str, failing: bool) -> None:
        with suppress(RuntimeError):  # the loop is closed: the process ends
            loop.call_soon_threadsafe(lambda: asyncio.ensure_future(tell(stage, failing)))

    def load() -> "RunningStages":
        from colaserve_services.launch.stages import load_stages

        given = (each.name for each in fields(EngineLimits) if hasattr(settings, each.name))
        limits = EngineLimits(**{name: getattr(settings, name) for name in given})
        compute = {stage: (settings.device_of(stage), settings.dtype) for stage in names}
        return load_stages(checkpoint, compute, limits, host.metrics, failing)

    stages = await in_thread(load)
    host.stack.callback(stages.stop)
    return stages


def _coordinator(
    host: Host, settings: CoordinatorSettings | UpSettings, checkpoint: Checkpoint, stages: Stages
) -> Coordinator:
    limits = CoordinatorLimits(
        max_context=settings.max_context,
        max_running=settings.max_generations,
        max_waiting=2 * settings.max_generations,
        queue_seconds=settings.queue_seconds,
        max_per_key=settings.max_per_caller,
        idle_seconds=settings.idle_seconds,
    )
    tokenizer = Tokenizer.open(checkpoint.tokenizer_path, checkpoint.shape.vocab_size, checkpoint.defaults)
    own, path = checkpoint.defaults, settings.defaults
    try:
        file = GenerationDefaults() if path is None else read_generation_config(path)
    except CheckpointError as error:
        raise UsageError(f"--defaults: {error}") from error
    for name in ("pad_token_id", "eos_token_id", "im_end_token_id"):  # the stages need them too
        if getattr(file, name) is not None:
            raise UsageError(f"--defaults: {path}: {name} belongs into the checkpoint's generation_config.json")
    defaults = Defaults.of(file.chat_frame or own.chat_frame, **{**own.requests, **file.requests})
    name = settings.served_model_name or checkpoint.name
    about = description(checkpoint.directory)
    return Coordinator(stages, tokenizer, defaults, limits, host.metrics, name, checkpoint.space, about)


def _servicers(coordinator: Coordinator, host: Host) -> tuple[object, ...]:
    """The services of a coordinator, in the order of COORDINATOR."""
    inference = InferenceServicer(coordinator, host.is_ready)
    return GenerationServicer(coordinator), LatentServicer(coordinator), inference


async def _connect(host: Host, coordinator: Coordinator) -> None:
    """Wait for the stages; from then on health follows theirs."""
    await coordinator.connect()
    watch = asyncio.ensure_future(coordinator.watch(host.follow))
    host.stack.callback(watch.cancel)


async def _gateway(host: Host, settings: GatewaySettings | UpSettings, stub: Any, reach: Any = None) -> None:
    from colaserve_services.gateway import settings as gateway
    from colaserve_services.gateway.app import create_app
    from colaserve_services.gateway.server import serve

    made = gateway.GatewaySettings(
        keys=settings.keys,
        cors_origins=tuple(origin for origin in settings.cors_origins.split(",") if origin),
        allow_unknown_fields=settings.allow_unknown_fields,
        bounds=gateway.Bounds(request_seconds=settings.request_seconds, unread_seconds=settings.idle_seconds),
    )
    app = create_app(stub, made, host.metrics, reach)
    tls = settings.http_tls and settings.http_tls.of_server
    if settings.http_tls is not None and tls is None:
        raise UsageError("--http-tls: the folder has no tls.crt and tls.key")
    host.serve_http(await serve(app, settings.host, settings.http_port, tls), "https" if tls else "http")
