"""The settings of each role: frozen dataclasses, made of sections, whose fields are its options (options.py)."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import click

from colaserve_services.errors import UsageError
from colaserve_services.launch import options
from colaserve_services.launch.hub import checkpoint_folder
from colaserve_services.launch.options import STAGES, option
from colaserve_services.rpc.auth import Keys, checked
from colaserve_services.rpc.settings import ChannelSettings, LogSettings, ServerSettings, Tls

DEMO = Path(__file__).parent.parent / "demo"
ROLE_KEY = "COLASERVE_ROLE_KEY"  # a variable alone, since a command line is seen by all
# How long OpenMP threads spin before they sleep, on machines that do other work too: long enough for the gaps between
# the operations of a step, short enough to leave the cores to others (docs/decisions.md, "Spin briefly").
BRIEF = {"GOMP_SPINCOUNT": "3000", "KMP_BLOCKTIME": "1"}
WAITING = (*BRIEF, "OMP_WAIT_POLICY")
TOKENIZER = ("TOKENIZERS_PARALLELISM", "false")  # many texts leave the other cores to those that compute
_ADDRESS = "host:port, dns:///host:port or a list with commas"


@dataclass(frozen=True, kw_only=True)
class Processes:
    """Processes"""

    split: bool = option(False, "Run each role in a process of its own; one that dies is started again.")
    replicas: Mapping[str, int] = option(
        dict,
        "With --split: processes of a stage, as in prior=2.",
        options.Parsed("STAGE=N,..", options.replicas),
        "1 each",
    )


@dataclass(frozen=True, kw_only=True)
class Model:
    """Model"""

    model: str = option(
        "",
        "Folder with cola_dlm/ and tokenizer.json, or OWNER/NAME[@REVISION] on the Hugging Face Hub.",
        options.MODEL,
        "the bundled checkpoint",
    )
    max_context: int = option(8192, "Latents of one session, prompt and generation together.", options.POSITIVE)

    def folder(self) -> Path:
        """The checkpoint's folder, fetched from the Hub if need be; blocks. Raises UsageError, Unavailable and
        CheckpointError."""
        if self.model:
            return checkpoint_folder(self.model)
        if not (DEMO / "tokenizer.json").is_file():
            raise UsageError(f"--model: this installation has no bundled checkpoint ({DEMO}); name one")
        return DEMO


@dataclass(frozen=True, kw_only=True)
class Compute:
    """Compute"""

    device: Mapping[str, str] = option(
        lambda: {"": "cpu"},
        "Where the networks run: cpu, cuda or cuda:N; of one stage as in prior=cuda:1. With a GPU, up runs the stages "
        "of each one in a process of their own.",
        options.Parsed("[STAGE=]DEVICE,..", options.devices),
        "cpu",
    )
    dtype: str = option(
        "auto",
        "Compute dtype; auto is float32 on a CPU and bfloat16 on CUDA. int8, on a CPU, and float8, on a GPU: the "
        "matrices of the prior's and the decoder's layers.",
        options.DTYPES,
    )
    threads: int | None = option(
        None, "CPU threads that compute in one process.", click.IntRange(1, 4096), "OMP_NUM_THREADS, else all cores"
    )

    def device_of(self, stage: str) -> str:
        """Where a stage computes."""
        return self.device.get(stage, self.device.get("", "cpu"))


@dataclass(frozen=True, kw_only=True)
class Engine:
    """Engine"""

    max_running: int = option(
        32,
        "Sessions of one stage that share forward passes; others wait in the coordinator.",
        options.POSITIVE,
    )
    kv_bytes: int = option(
        0, "Bytes of one stage's KV cache, or auto: what memory leaves after weights and the largest pass.",
        options.Parsed("BYTES", options.byte_budget), "auto",
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RunAhead:
    """Prior"""

    run_ahead: int = option(2, "Blocks that the prior writes before they are read.", options.POSITIVE)


@dataclass(frozen=True, kw_only=True)
class Idle:
    """Idle sessions"""

    idle_seconds: float = option(
        60.0,
        "A session with nothing to compute for so long, and a stream that was not read for so long, is evicted when "
        "others are queued.",
        options.SOME_SECONDS,
    )


@dataclass(frozen=True, kw_only=True)
class Stages:
    """Stages"""

    encoder: str = option("", f"Address of the encoder: {_ADDRESS}.", options.TRIMMED)
    prior: str = option("", f"Address of the prior: {_ADDRESS}.", options.TRIMMED)
    decoder: str = option("", f"Address of the decoder: {_ADDRESS}.", options.TRIMMED)


@dataclass(frozen=True, kw_only=True)
class Requests:
    """Requests"""

    defaults: Path | None = option(
        None,
        "JSON file of what requests leave unset, in the form of generation_config.json, which it overrules.",
        options.FILE,
    )
    served_model_name: str = option("", "Name clients ask for.", shown="the Hub's, else the folder's")
    max_generations: int = option(
        256, "Calls that the coordinator works on at once; twice as many may be queued.", options.POSITIVE
    )
    queue_seconds: float = option(30.0, "A call that was queued for so long is refused.", options.SECONDS)
    max_per_caller: int = option(
        0, "Calls of one caller (key, else address) at once, queued ones included; 0: no limit.", options.COUNT
    )


@dataclass(frozen=True, kw_only=True)
class Upstream:
    """Upstream"""

    coordinator: str = option("", f"Address of the coordinators: {_ADDRESS}.", options.TRIMMED)


@dataclass(frozen=True, kw_only=True)
class Http:
    """HTTP"""

    http_port: int = option(8000, "HTTP port; 0 takes a free one.", options.PORT)
    http_tls: Tls | None = option(
        None, "Folder with tls.crt and tls.key of the HTTP port; with ca.crt, clients must show a certificate of it.",
        options.TlsFolder(),
    )  # fmt: skip
    cors_origins: str = option("", "Browsers' origins that may call, with commas; * for all.", options.TRIMMED)
    allow_unknown_fields: bool = option(False, "Ignore JSON fields that nobody knows instead of refusing them.")
    request_seconds: float = option(600.0, "Longest deadline of an HTTP request.", options.SOME_SECONDS)


@dataclass(frozen=True, kw_only=True)
class Grpc:
    """gRPC"""

    grpc_port: int = option(50051, "gRPC port; 0 takes a free one.", options.PORT)


@dataclass(frozen=True, kw_only=True)
class Process:
    """Process"""

    host: str = option("127.0.0.1", "Address to listen on; 0.0.0.0 for all of IPv4.", options.TRIMMED)
    metrics_port: int = option(9090, "Prometheus port, which answers probes too; 0 takes a free one.", options.PORT)
    metrics_aliases: bool = option(False, "Also the vllm: names that inference gateways read.")
    tls: Tls | None = option(
        None,
        "Folder with tls.crt and tls.key of this process, for gRPC; with ca.crt, the other side of each connection "
        "must show a certificate of it.",
        options.TlsFolder(),
    )
    api_keys_file: Path | None = option(
        None, "File of bearer keys, KEY or NAME KEY a line; read again when it changes.", options.FILE
    )
    ports_file: Path | None = option(None, "Write the ports in use to this file, as JSON.", options.FILE)
    drain_seconds: float = option(
        2.0, "After SIGTERM: wait so long, not ready, until balancers look elsewhere.", options.SECONDS
    )
    grace_seconds: float = option(30.0, "After that: time for running calls to end.", options.SECONDS)
    log: LogSettings = option(
        LogSettings(),
        "Log lines: auto (text on a terminal, else JSON), json or text; from debug, info, warning or error on.",
        options.Parsed("FORMAT[:LEVEL]", options.log_settings),
        "auto:info",
    )
    otlp_endpoint: str | None = option(
        None,
        "Send OpenTelemetry traces to this OTLP/gRPC collector, http://host:4317; needs the trace extra.",
        options.TRIMMED,
    )

    @property
    def keys(self) -> Keys | None:
        """Who may call; None: everybody."""
        return Keys.load(self.api_keys_file, role_key())

    def server(self, grpc_port: int = 0) -> ServerSettings:
        """The gRPC server, and how it drains; without one, how the process does."""
        return ServerSettings(
            host=self.host,
            port=grpc_port,
            tls=self.tls and self.tls.of_server,
            role_key=role_key(),
            drain_seconds=self.drain_seconds,
            grace_seconds=self.grace_seconds,
        )

    @property
    def channel(self) -> ChannelSettings:
        """How other services are called."""
        return ChannelSettings(tls=self.tls, api_key=role_key())


@dataclass(frozen=True, kw_only=True)
class EncoderSettings(Model, Compute, Engine, Grpc, Process): ...


@dataclass(frozen=True, kw_only=True)
class DecoderSettings(Model, Compute, Engine, Idle, Grpc, Process): ...


@dataclass(frozen=True, kw_only=True)
class PriorSettings(Model, Compute, Engine, RunAhead, Idle, Grpc, Process): ...


@dataclass(frozen=True, kw_only=True)
class CoordinatorSettings(Stages, Model, Requests, Idle, Grpc, Process): ...


@dataclass(frozen=True, kw_only=True)
class GatewaySettings(Upstream, Http, Idle, Process): ...


@dataclass(frozen=True, kw_only=True)
class UpSettings(Processes, Model, Compute, Engine, RunAhead, Idle, Requests, Http, Grpc, Process):
    def __post_init__(self) -> None:
        if self.replicas and not self.split:
            raise UsageError("--replicas: needs --split; without it all stages share one process")
        apart = self.split or any(self.device_of(stage) != "cpu" for stage in STAGES)
        if apart and self.tls is not None and self.tls.ca is None:
            raise UsageError(
                "--tls: with --split or a GPU the folder needs ca.crt, for the processes to trust each other"
            )


ROLES: Mapping[str, type[Process]] = {
    "up": UpSettings,
    "encoder": EncoderSettings,
    "prior": PriorSettings,
    "decoder": DecoderSettings,
    "coordinator": CoordinatorSettings,
    "gateway": GatewaySettings,
}
StageSettings = EncoderSettings | PriorSettings | DecoderSettings | UpSettings


def role_key() -> str:
    """The key that roles show each other; empty: none."""
    return checked(os.environ[ROLE_KEY], ROLE_KEY) if os.environ.get(ROLE_KEY) else ""


def target(address: str, name: str) -> str:
    """The address given by --<name>; UsageError for none."""
    if not address:
        raise UsageError(f"--{name}: needed; {_ADDRESS}")
    return address


def check_tls(settings: Process) -> None:
    """Raise UsageError where --tls would not encrypt what this process serves: it has no certificate."""
    if settings.tls is not None and settings.tls.of_server is None:
        raise UsageError("--tls: the folder has ca.crt alone; this process needs tls.crt and tls.key, too")


def settle_threads(threads: int | None) -> None:
    """Let torch, not imported yet, use so many threads, that spin briefly; None leaves its choice, or OMP_NUM_THREADS.

    What the operator has set stays: any variable about waiting settles all of them.
    """
    os.environ.setdefault(*TOKENIZER)
    if not any(name in os.environ for name in WAITING):
        os.environ.update(BRIEF)
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)
