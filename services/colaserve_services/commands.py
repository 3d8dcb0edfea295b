"""The commands that serve: `up` and the roles. `COMMANDS` names them for the client's command line.

Importing this module imports neither torch nor a server.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import click

from colaserve_services.errors import ColaserveError, UsageError
from colaserve_services.launch.options import COORDINATOR, GATEWAY, STAGE, UP, GroupedCommand, options


class _Misuse(click.ClickException):
    exit_code = 2


def run_or_explain(work: Callable[[], None]) -> None:
    """Do the work; an error that is the operator's becomes one line and exit code 1 (2: the options do not fit)."""
    try:
        work()
    except ColaserveError as error:
        raise (_Misuse if isinstance(error, UsageError) else click.ClickException)(str(error)) from error


@click.command(cls=GroupedCommand)
@options(*UP)
@click.pass_context
def up(context: click.Context, **params: Any) -> None:
    """Serve a checkpoint: text, latents and OpenAI's API on one machine.

    \b
    colaserve up                                 # the bundled checkpoint, all in one process
    colaserve up --model ~/models/Cola-DLM       # another one, fetched with `colaserve pull`
    colaserve up --split --replicas prior=2      # a process for every role, as in production
    colaserve up --device cuda --dtype bfloat16

    \b
    Then:
    colaserve generate "The capital of France is"
    curl localhost:8000/v1/completions -d '{"prompt": "The capital of France is"}' -H 'content-type: application/json'

    Ctrl-C stops it.
    """

    def work() -> None:
        if params["split"]:
            from colaserve_services.launch.split import run_split
            from colaserve_services.launch.split_settings import split_settings

            run_split(split_settings(context, params))
        else:
            from colaserve_services.launch.roles import run_all

            run_all(params)

    run_or_explain(work)


def _stage_command(stage: str, text: str) -> click.Command:
    def role(**params: Any) -> None:
        def work() -> None:
            from colaserve_services.launch.roles import run_stage

            run_stage(stage, params)

        run_or_explain(work)

    command: click.Command = click.command(stage, cls=GroupedCommand, help=text)(options(*STAGE)(role))
    return command


encoder = _stage_command(
    "encoder",
    """Serve the encoder alone: token ids to latents.

    \b
    colaserve encoder --model DIR --host 0.0.0.0 --grpc-port 50051
    """,
)
prior = _stage_command(
    "prior",
    """Serve the prior alone: noise to latents, block by block. The stage that needs the most compute.

    \b
    colaserve prior --model DIR --device cuda --kv-bytes 8589934592
    """,
)
decoder = _stage_command(
    "decoder",
    """Serve the decoder alone: latent blocks to token ids.

    \b
    colaserve decoder --model DIR --grpc-port 50053
    """,
)


@click.command(cls=GroupedCommand)
@options(*COORDINATOR)
def coordinator(**params: Any) -> None:
    """Serve text over stages that run elsewhere. Runs no network; reads the tokenizer and the defaults of --model.

    \b
    colaserve coordinator --model DIR --encoder enc:50051 --prior dns:///prior:50051 --decoder d1:50051,d2:50051

    Several replicas of a stage share the load; when one fails its work moves to another.
    """

    def work() -> None:
        from colaserve_services.launch.roles import run_coordinator

        run_coordinator(params)

    run_or_explain(work)


@click.command(cls=GroupedCommand)
@options(*GATEWAY)
def gateway(**params: Any) -> None:
    """Serve OpenAI's HTTP API in front of coordinators that run elsewhere.

    \b
    colaserve gateway --coordinator dns:///coordinator:50051 --http-port 8000 --api-keys-file keys.txt
    """

    def work() -> None:
        from colaserve_services.launch.roles import run_gateway

        run_gateway(params)

    run_or_explain(work)


COMMANDS: dict[str, click.Command] = {
    "up": up,
    "encoder": encoder,
    "prior": prior,
    "decoder": decoder,
    "coordinator": coordinator,
    "gateway": gateway,
}


def main() -> None:
    """`python -m colaserve_services.launch NAME ...`: one of these commands."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in COMMANDS:
        raise SystemExit(f"usage: python -m colaserve_services.launch {{{','.join(COMMANDS)}}} ...")
    COMMANDS[name].main(sys.argv[2:], prog_name=f"colaserve {name}")
