"""docs/reference/configuration.md, out of the options: `scripts/generate-config-docs`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import click

from colaserve_client.fields import Field, flat_fields
from colaserve_client.settings import GenerationRequest, NoiseSeed, Sampler, Sampling
from colaserve_services.launch.options import sections_of
from colaserve_services.launch.settings import ROLES
from colaserve_services.rpc.metrics import Metrics

HEAD = """# Configuration

<!-- Made by scripts/generate-config-docs from services/colaserve_services/launch/settings.py. Change it there. -->

Every option of `colaserve up` and of the roles is also an environment variable. The command line wins over the
variable, the variable over the default. `colaserve <role> --help` shows the same.

What a request leaves unset is what the file of `--defaults` says, else (at a stage that is called directly, too) the
checkpoint's `generation_config.json`, else the default in "Settings of requests" below. Both files are JSON objects of
these settings, such as `{"steps": 8, "guidance_scale": 3}`, and may have a `chat_frame`, the frame of one chat message
with `{prompt}` in it.

A folder of `--tls` or `--http-tls` holds `tls.crt` and `tls.key`, as a Secret of Kubernetes does, and may hold
`ca.crt`: then TLS is mutual, that is, this process shows its certificate to the services that it calls, too, and both
sides verify each other by that authority. Certificates name the hosts that are called; servers read renewed ones again.
Without `ca.crt` callers need no certificate, and called services are verified by gRPC's own authorities
(`GRPC_DEFAULT_SSL_ROOTS_FILE_PATH`). With `ca.crt` alone a coordinator or a gateway verifies the services that it
calls, and has no certificate of its own.

## Which role takes what

"""

TAIL = """
## Beside the options

| Variable | Meaning |
|---|---|
| `COLASERVE_ROLE_KEY` | Key that roles show each other where there is `--api-keys-file`. `up --split` draws one. |
| `OMP_NUM_THREADS` | Threads of one process when `--threads` is not given. |
| `OMP_WAIT_POLICY`, `GOMP_SPINCOUNT`, `KMP_BLOCKTIME` | How OpenMP threads wait, see below. |
| `HF_ENDPOINT`, `HF_TOKEN` | Hub and token of `colaserve pull`. |
| `http_proxy` and its like | Services ignore them; `pull` and the client use them, but not on this machine. |

Threads spin only briefly while they wait (`GOMP_SPINCOUNT=3000`, `KMP_BLOCKTIME=1`), unless one of the variables above
is set: threads that spin long take the cores from other processes, threads that sleep at once wake up late. Under
`up --split` each stage may use all cores when neither `--threads` nor `OMP_NUM_THREADS` says otherwise. The stages
listen on 127.0.0.1 and on free ports, and clients' keys are asked for at the coordinator and the gateway only.
`--grpc-port` and `--metrics-port` are the coordinator's; the gateway's metrics are at its HTTP port, the stages' on
free ports, which the first lines and `--ports-file` name.

## Signals and exit codes

SIGTERM drains: health turns to NOT_SERVING, `--drain-seconds` pass, new calls are refused, running ones have
`--grace-seconds` to end; exit code 0. SIGHUP does the same, unless it was ignored at the start, as by nohup. SIGINT
(Ctrl-C) does the same without the wait. A second signal ends at once. Exit code 1: what was asked for cannot be served
(a damaged checkpoint, a stage that cannot be reached). 2: the options do not fit this machine or each other (taken
ports, all of which are named; no such device). Both are the same in one process and under `--split`. 70: the device
thread died, or one step on the device lasted longer than 60 s and 20 times the longest so far (the first step of a
shape: 10 minutes); the last line says which.

Under `up --split` a process that ends while it starts ends all others. Later one that dies, or whose health says for
a minute that it is not alive, is started again on the same ports, at once and then after pauses that double from 1 to
60 s. Its streams go on with another replica (`--replicas prior=2`), or with the new process when it serves in time.

With `--log json` everything is one JSON object a line: the log, the progress of reading weights, the line that
says ready (with `addresses`), and the error that ends the process. gRPC's own lines are then left out, unless
`GRPC_VERBOSITY` is set. Standard output or error that takes no more, a full disk say, stops nothing.

## Health

gRPC health (`grpc.health.v1`) on the gRPC port: the name "" and the name of each service are SERVING when the role is
ready (the coordinator: while its stages are); the name `liveness` is SERVING as long as the process answers and can
compute, whatever its load (an engine that fails at a step and then at its own warm-up row too is neither ready nor
alive, until it computes that row again). `GET /ready` and `GET /live` on the metrics port answer the same with 200 or
503, without TLS and keys, for probes. The gateway has `/ready` and `/health` on its HTTP port.

## Metrics

Of every role at its `--metrics-port`, of the gateway at its HTTP port too. `stage` is encoder, prior, decoder or
coordinator; a role has the values of what it does. `process_` metrics tell CPU seconds, memory and open files.

"""


def document() -> str:
    """The whole page."""
    requests = flat_fields(GenerationRequest, NoiseSeed, Sampler, Sampling)
    parts = _roles(), _groups(), ["## Settings of requests", "", *settings_of_requests(requests), ""]
    return HEAD + "\n".join("\n".join(part) + "\n" for part in parts) + TAIL + "\n".join(_metrics()) + "\n"


def settings_of_requests(table: Mapping[str, Field]) -> Iterator[str]:
    """A row for each field of the table."""
    yield "| Setting | Default | Meaning |"
    yield "|---|---|---|"
    for name, field in table.items():
        yield f"| `{name}` | {'' if field.default is None else field.default} | {field.help} |"


def _roles() -> Iterator[str]:
    yield "| Role | Options |"
    yield "|---|---|"
    for role, settings in ROLES.items():
        yield f"| `{role}` | {', '.join(sections_of(settings))} |"


def _metrics() -> Iterator[str]:
    yield "| Metric | Kind | Labels | Meaning |"
    yield "|---|---|---|---|"
    for name, kind, labels, text in Metrics().table:
        yield f"| `{name}` | {kind} | {', '.join(labels)} | {text} |"


def _groups() -> Iterator[str]:
    sections = {title: options for settings in ROLES.values() for title, options in sections_of(settings).items()}
    for title, options in sections.items():
        yield f"## {title}\n"
        yield "| Option | Variable | Default | Meaning |"
        yield "|---|---|---|---|"
        yield from map(_row, options)
        yield ""


def _row(option: click.Option) -> str:
    text = (option.help or "").replace("|", "\\|")
    return f"| `{option.opts[0]}{_values(option)}` | `{option.envvar}` | {_default(option)} | {text} |"


def _values(option: click.Option) -> str:
    kind = option.type
    if option.is_flag:
        return ""
    if isinstance(kind, click.Choice):
        return f" {{{','.join(map(str, kind.choices))}}}"
    if isinstance(kind, click.Path):
        return " PATH" if kind.file_okay else " DIR"
    return {"integer range": " N", "float range": " X", "text": " TEXT"}.get(kind.name, f" {kind.name}")


def _default(option: click.Option) -> str:
    if isinstance(option.show_default, str):
        return option.show_default
    if option.is_flag:
        return "off"
    return f"`{option.default}`" if option.show_default else ""


if __name__ == "__main__":
    print(document(), end="")
