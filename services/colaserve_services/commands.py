"""The commands that serve: `up` and the roles. `COMMANDS` names them for the client's command line.

Importing this module imports neither torch nor a server.
"""

import sys
from collections.abc import Mapping
from typing import Any

import click

from colaserve_services.launch.options import STAGES, RoleCommand
from colaserve_services.launch.settings import ROLES, CoordinatorSettings, GatewaySettings, PriorSettings, UpSettings


def _up(settings: UpSettings, said: Mapping[str, str]) -> None:
    if settings.split:
        from colaserve_services.launch.split import run_split

        run_split(settings, said)
        return
    from colaserve_services.launch.roles import run_all, run_apart
    from colaserve_services.launch.split import groups

    devices = {stage: settings.device_of(stage) for stage in STAGES}
    if any(device != "cpu" for device in devices.values()):
        run_apart(settings, said, groups(devices))
    else:
        run_all(settings)


def _coordinator(settings: CoordinatorSettings, said: Mapping[str, str]) -> None:
    from colaserve_services.launch.roles import run_coordinator

    run_coordinator(settings)


def _gateway(settings: GatewaySettings, said: Mapping[str, str]) -> None:
    from colaserve_services.launch.roles import run_gateway

    run_gateway(settings)


def _stages(*names: str, text: str = "") -> click.Command:
    def work(settings: Any, said: Mapping[str, str]) -> None:
        from colaserve_services.launch.roles import run_stages

        run_stages(names, settings)

    settings = PriorSettings if len(names) > 1 else ROLES[names[0]]  # the prior's has all that the others have
    return RoleCommand("+".join(names), settings, work, text)


UP = """Serve a checkpoint: text, latents and OpenAI's API on one machine.

\b
colaserve up                                 # the bundled checkpoint, all in one process
colaserve up ByteDance-Seed/Cola-DLM         # one of the Hugging Face Hub, or a folder
colaserve up --split --replicas prior=2      # a process for every role, as in production
colaserve up --device cuda --dtype bfloat16

\b
Then:
colaserve generate "The capital of France is"
curl localhost:8000/v1/completions -d '{"prompt": "The capital of France is"}' -H 'content-type: application/json'

Ctrl-C stops it.
"""
COORDINATOR = """Serve text over stages that run elsewhere: no network runs here, only the tokenizer of --model.

\b
colaserve coordinator --model DIR --encoder enc:50051 --prior dns:///prior:50051 --decoder d1:50051,d2:50051

Several replicas of a stage share the load; when one fails its work moves to another.
"""
GATEWAY = """Serve OpenAI's HTTP API in front of coordinators that run elsewhere.

\b
colaserve gateway --coordinator dns:///coordinator:50051 --http-port 8000 --api-keys-file keys.txt
"""
OF_STAGES = {
    "encoder": """Serve the encoder alone: token ids to latents.

\b
colaserve encoder --model DIR --host 0.0.0.0 --grpc-port 50051
""",
    "prior": """Serve the prior alone: noise to latents, block by block. The stage that needs the most compute.

\b
colaserve prior --model DIR --device cuda:1 --max-running 64
""",
    "decoder": """Serve the decoder alone: latent blocks to token ids.

\b
colaserve decoder --model DIR --grpc-port 50053
""",
}
COMMANDS: dict[str, click.Command] = {
    "up": RoleCommand("up", UpSettings, _up, UP),
    **{stage: _stages(stage, text=OF_STAGES[stage]) for stage in STAGES},
    "coordinator": RoleCommand("coordinator", CoordinatorSettings, _coordinator, COORDINATOR),
    "gateway": RoleCommand("gateway", GatewaySettings, _gateway, GATEWAY),
}


def main() -> None:
    """`python -m colaserve_services.launch NAME ...`: one of these commands, or several stages as in encoder+prior."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    names = name.split("+")
    if name not in COMMANDS and not set(names) <= set(STAGES):
        raise SystemExit(f"usage: python -m colaserve_services.launch {{{','.join(COMMANDS)}}} ...")
    command = COMMANDS[name] if name in COMMANDS else _stages(*names)
    command.main(sys.argv[2:], prog_name=f"colaserve {name}")
