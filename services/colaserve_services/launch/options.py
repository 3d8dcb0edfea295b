"""Every option of every role, once. A role's command takes whole groups of them; docs/configuration.md is made of this.

An option is also the environment variable COLASERVE_<NAME>; the command line wins.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import click

from colaserve_client.cli.types import Number, Text, Trimmed, TrimmedPath

F = TypeVar("F", bound=Callable[..., Any])


PORT = click.IntRange(0, 65535)
TRIMMED = Trimmed()
FILE = TrimmedPath(path_type=Path, dir_okay=False)
POSITIVE = click.IntRange(1, 2**32 - 1)  # what a uint32 of the wire contract holds
COUNT = click.IntRange(0, 2**32 - 1)
BYTES = click.IntRange(1, 2**63 - 1)
CHANNEL = click.IntRange(1, 2**31 - 1)  # what an option of a gRPC channel holds
MOST_SECONDS = 2_000_000.0  # 23 days; in milliseconds still an option of a gRPC channel
SECONDS = Number(0, MOST_SECONDS)
DEMO = Path(__file__).parent.parent / "demo"


def _option(name: str, default: Any, text: str, kind: Any = None, **more: Any) -> click.Option:
    variable = "COLASERVE_" + name.lstrip("-").upper().replace("-", "_")
    more.setdefault("show_default", default is not None)
    if kind is None and not more.get("is_flag"):
        kind = Text()
    return click.Option([name], default=default, help=text, type=kind, envvar=variable, show_envvar=True, **more)


GROUPS: dict[str, list[click.Option]] = {
    "Processes": [
        _option(
            "--split", False, "One process a role instead of one for all; one that dies is started again.",
            is_flag=True,
        ),
        _option(
            "--replicas", "", "With --split: processes of a stage, as in prior=2,decoder=2 [1 each].",
            show_default=False,
        ),
    ],
    "Model": [
        _option(
            "--model", DEMO, "Folder with cola_dlm/ and tokenizer.json.", click.Path(path_type=Path),
            show_default="the bundled checkpoint",
        ),
        _option("--max-context", 8192, "Latents of one session, prompt and generation together.", POSITIVE),
    ],
    "Compute": [
        _option("--device", "cpu", "Where the networks run: cpu, cuda or cuda:N."),
        _option(
            "--dtype", "auto", "Compute dtype; auto is float32 on a CPU and bfloat16 on CUDA.",
            click.Choice(["auto", "float32", "bfloat16"]),
        ),
        _option(
            "--threads", None, "CPU threads that compute in one process [OMP_NUM_THREADS, else all cores].",
            click.IntRange(1, 4096),
        ),
    ],
    "Engine": [
        _option("--max-running", 32, "Sessions of one stage that share forward passes.", POSITIVE),
        _option("--max-waiting", 256, "Sessions of one stage that may wait; one more is refused.", COUNT),
        _option(
            "--max-waiting-work", float(1 << 24),
            "Work, in latents * steps * passes, of the sessions of one stage that may wait; more is refused. No "
            "session counts for more than half of it.",
            Number(1),
        ),
        _option("--kv-bytes", 2 << 30, "Byte budget of one stage's KV cache.", BYTES),
        _option(
            "--prefix-cache-bytes", 256 << 20,
            "Bytes, beside --kv-bytes, in which one stage keeps the KV of leading blocks for sessions that begin "
            "with them; 0: off.",
            click.IntRange(0, 2**63 - 1),
        ),
        _option("--run-ahead", 2, "Blocks that the prior writes before they are read.", POSITIVE),
        _option(
            "--prefill-chunk", 512,
            "Latents of contexts, or of sequences to encode, that one forward pass takes, in whole blocks. While "
            "sessions sample, the prior takes fewer.",
            POSITIVE,
        ),
    ],
    "Idle sessions": [
        _option(
            "--idle-seconds", 60.0,
            "A session that has had nothing to compute for so long (its reader is away, its caller silent), and a "
            "stream of text or latents that was not read for so long, ends while others wait.",
            Number(0, MOST_SECONDS, min_open=True),
        ),
    ],
    "Server": [
        _option("--host", "127.0.0.1", "Address to listen on; 0.0.0.0 for all of IPv4.", TRIMMED),
        _option("--max-message-bytes", 64 << 20, "Longest gRPC message; requests have 16 MiB at most.", CHANNEL),
        _option("--max-calls", 1024, "Calls that one process serves at once; 0: no limit.", COUNT),
        _option(
            "--max-calls-per-client", 0,
            "Calls of one client (key, else address) at once; 0: no limit. With up --split the gateway's alone.", COUNT,
        ),
        _option(
            "--max-rate-per-client", 0.0,
            "Calls a second that one client may start; 0: no limit. With up --split the gateway's alone.", SECONDS,
        ),
        _option("--keepalive-seconds", 30.0, "A silent connection is probed this often.", Number(1, MOST_SECONDS)),
        _option(
            "--drain-seconds", 2.0, "After SIGTERM: wait so long, not ready, until balancers look elsewhere.",
            SECONDS,
        ),
        _option("--grace-seconds", 30.0, "After that: time for running calls to end.", SECONDS),
        _option("--ports-file", None, "Write the ports in use to this file, as JSON.", FILE),
    ],
    "gRPC server": [
        _option("--grpc-port", 50051, "gRPC port; 0 takes a free one.", PORT),
        _option(
            "--health-port", None,
            "One more port for the health service alone, without TLS and keys, for probes that know neither.", PORT,
        ),
        _option("--max-concurrent-streams", 1000, "Calls on one gRPC connection.", CHANNEL),
        _option(
            "--max-connection-age", 300.0,
            "Seconds until clients connect anew, and so find new replicas; 0: never.", SECONDS,
        ),
        _option("--tls-cert", None, "PEM certificate chain of this server; read again when it changes.", FILE),
        _option("--tls-key", None, "PEM key of --tls-cert.", FILE),
        _option("--tls-client-ca", None, "PEM authority; clients must show a certificate of it.", FILE),
    ],
    "Keys": [
        _option(
            "--api-keys-file", None, "File of bearer keys, KEY or NAME KEY a line; read again when it changes.",
            FILE,
        ),
        _option(
            "--api-keys", "", "Bearer keys with commas. Better the variable: a command line is seen by all.",
            show_default=False,
        ),
    ],
    "Calling other services": [
        _option("--tls-ca", None, "PEM authority that signed the servers' certificates; switches TLS on.", FILE),
        _option("--tls-client-cert", None, "PEM certificate shown to servers.", FILE),
        _option("--tls-client-key", None, "PEM key of --tls-client-cert.", FILE),
        _option(
            "--tls-server-name", "", "Name in the servers' certificates, when it is not their address.", TRIMMED,
            show_default=False,
        ),
        _option("--upstream-key", "", "Bearer key for the servers. Better the variable.", show_default=False),
    ],
    "Stages": [
        _option(
            f"--{stage}", None, f"Address of the {stage}: host:port, dns:///host:port or a list with commas.", TRIMMED
        )
        for stage in ("encoder", "prior", "decoder")
    ],
    "Coordinator": [
        _option("--served-model-name", "", "Name clients ask for [the model folder's].", show_default=False),
        _option("--max-generations", 256, "Calls that the coordinator works on at once.", POSITIVE),
        _option("--max-queued", 512, "Calls that may wait for that; one more is refused.", COUNT),
        _option("--queue-seconds", 30.0, "A call that waited so long is refused.", SECONDS),
        _option(
            "--max-per-key", 0, "Calls of one key, else address, at once, waiting ones included; 0: no limit.", COUNT
        ),
        _option("--attempts", 8, "Failures of one stage in a row until a call is given up.", POSITIVE),
    ],
    "Defaults of requests": [
        _option("--max-new-tokens", None, "Tokens to write [generation_config.json, else 32].", POSITIVE),
        _option("--steps", None, "Steps of the sampler, 1 to 1000 [16].", POSITIVE),
        _option("--guidance-scale", None, "Classifier-free guidance, 0 to 1000; 1: off [7].", Number()),
        _option("--solver", None, "Integration rule [euler].", click.Choice(["euler", "ab2", "heun"])),
        _option("--guidance-start", None, "Guidance is on from this time on, 1 to 0 [1].", Number()),
        _option("--guidance-end", None, "Guidance is off at and below this time [0].", Number()),
        _option("--resamples", None, "Times each step runs, 1 to 100 [1].", POSITIVE),
        _option("--temperature", None, "Of the token draws, 0 to 100 [0].", Number()),
        _option("--top-k", None, "Keep the k most likely tokens; 0: all [50].", COUNT),
        _option("--top-p", None, "Keep tokens up to this probability, above 0 to 1 [0.9].", Number()),
        _option("--repetition-penalty", None, "Of tokens of earlier blocks, above 0 [1.1].", Number()),
        _option("--chat-frame", None, 'Frame of one chat message, with the place "{prompt}".'),
    ],
    "Upstream": [
        _option(
            "--coordinator", None, "Address of the coordinators: host:port, dns:///host:port or a list with commas.",
            TRIMMED,
        ),
    ],
    "Gateway": [
        _option("--http-port", 8000, "HTTP port; 0 takes a free one.", PORT),
        _option("--http-tls-cert", None, "PEM certificate chain of the HTTP port.", FILE),
        _option("--http-tls-key", None, "PEM key of --http-tls-cert.", FILE),
        _option(
            "--http-tls-client-ca", None, "PEM authority; HTTP clients, probes too, must show a certificate of it.",
            FILE,
        ),
        _option("--cors-origins", "", "Browsers' origins that may call; * for all.", TRIMMED, show_default=False),
        _option(
            "--allow-unknown-fields", False, "Ignore JSON fields that nobody knows instead of refusing them.",
            is_flag=True,
        ),
        _option("--max-body-bytes", 4 << 20, "Longest HTTP request.", BYTES),
        _option("--max-choices", 128, "Prompts times n of one HTTP request.", POSITIVE),
        _option("--request-seconds", 600.0, "Longest deadline of an HTTP request.", Number(0.1, MOST_SECONDS)),
    ],
    "Watching": [
        _option("--metrics-port", 9090, "Prometheus port; 0 takes a free one.", PORT),
        _option(
            "--metrics-aliases", False, "Also the vllm: names that inference gateways read.", is_flag=True
        ),
        _option(
            "--log-format", "auto", "auto is text on a terminal and JSON elsewhere.",
            click.Choice(["auto", "json", "text"]),
        ),
        _option(
            "--log-level", "info", "Least level of log lines.", click.Choice(["debug", "info", "warning", "error"])
        ),
        _option(
            "--otlp-endpoint", None,
            "Send OpenTelemetry traces to this OTLP/gRPC collector, http://host:4317; needs the trace extra.", TRIMMED,
        ),
    ],
}  # fmt: skip


STAGE = ("Model", "Compute", "Engine", "Idle sessions", "Server", "gRPC server", "Keys", "Watching")
COORDINATOR = (
    "Stages", "Model", "Coordinator", "Idle sessions", "Defaults of requests", "Server", "gRPC server", "Keys",
    "Calling other services", "Watching",
)  # fmt: skip
GATEWAY = ("Upstream", "Gateway", "Idle sessions", "Server", "Keys", "Calling other services", "Watching")
UP = (
    "Processes", "Model", "Compute", "Engine", "Idle sessions", "Coordinator", "Defaults of requests", "Gateway",
    "Server", "gRPC server", "Keys", "Calling other services", "Watching",
)  # fmt: skip


def _given(args: list[str], option: str) -> str | None:
    """The value of an option on a command line that was not parsed yet."""
    values = [value for name, value in itertools.pairwise([*args, ""]) if name == option]
    values += [arg.removeprefix(f"{option}=") for arg in args if arg.startswith(f"{option}=")]
    return values[-1] if values else None


def options(*names: str) -> Callable[[F], F]:
    """Decorator: the options of these groups, in their order."""

    def decorate(function: F) -> F:
        chosen = [option for name in names for option in GROUPS[name]]
        function.__click_params__ = chosen[::-1] + getattr(function, "__click_params__", [])  # type: ignore[attr-defined]
        return function

    return decorate


class GroupedCommand(click.Command):
    """A command whose help shows its options group by group, examples as they are written. With --log-format json the
    error that ends it is JSON too."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Refuse what is no option, or none of its values."""
        with self._errors(_given(args, "--log-format") or os.environ.get("COLASERVE_LOG_FORMAT")):
            return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run it."""
        with self._errors(ctx.params.get("log_format")):
            return super().invoke(ctx)

    def _errors(self, log_format: str | None) -> AbstractContextManager[None]:
        if log_format != "json":
            return nullcontext()
        from colaserve_services.launch.announcements import errors_as_json

        return errors_as_json("colaserve" if self.name == "up" else self.name or "")

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """One section a group, in the order of the options; what belongs to none comes first."""
        group_of = {option.name: name for name, known in GROUPS.items() for option in known}
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                sections.setdefault(group_of.get(parameter.name, "Options"), []).append(record)
        for name in sorted(sections, key=lambda name: name != "Options"):
            with formatter.section(name):
                formatter.write_dl(sections[name])
