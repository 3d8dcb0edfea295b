"""What the processes of `up --split` are told: of its options, those on the command line that they know."""

from __future__ import annotations

import secrets
from typing import Any

import click
from click.core import ParameterSource

from colaserve_services.errors import UsageError
from colaserve_services.launch import card, ports, settings
from colaserve_services.launch.options import COORDINATOR, GATEWAY, GROUPS, STAGE
from colaserve_services.launch.settings import STAGES, Params
from colaserve_services.launch.split import SplitSettings

NOT_PASSED = {"ports_file"}
COORDINATORS = {"grpc_port", "metrics_port"}  # the others take free ones; the gateway tells metrics over HTTP too
PER_CLIENT = {  # limits at the gateway only, and their variables: to the others it is one client
    "max_calls_per_client": "COLASERVE_MAX_CALLS_PER_CLIENT",
    "max_rate_per_client": "COLASERVE_MAX_RATE_PER_CLIENT",
}
EDGE_ONLY = {"api_keys", "api_keys_file"}  # clients do not reach the stages; keys go by the environment


def split_settings(context: click.Context, params: Params) -> SplitSettings:
    """Raise UsageError for what cannot be split."""
    ports.check(params)
    replicas = settings.replicas(params)
    directory = settings.checkpoint(params)  # a missing bundled one is told once, here
    if params["tls_cert"] is not None and params["tls_ca"] is None:
        raise UsageError("--tls-ca: needed with --tls-cert and --split, for the roles to trust each other")
    if params["health_port"] is not None:
        raise UsageError("--health-port: not with --split, where every role has a health service of its own")
    if params["upstream_key"]:
        raise UsageError("--upstream-key: not with --split, where the roles' keys are drawn anew at each start")
    channel = settings.channel(params)
    given = {name for name in params if context.get_parameter_source(name) == ParameterSource.COMMANDLINE} - EDGE_ONLY
    inner = given - PER_CLIENT.keys()
    arguments = {stage: _arguments(STAGE, params, inner - COORDINATORS) for stage in STAGES}
    arguments["coordinator"] = _arguments(COORDINATOR, params, inner)
    arguments["gateway"] = _arguments(GATEWAY, params, given - COORDINATORS)
    return SplitSettings(
        arguments=arguments,
        environment=_environment(params),
        stop_seconds=params["drain_seconds"] + params["grace_seconds"],
        watch=settings.watch(params),
        channel=channel,
        description=card.description(directory),
        replicas=replicas,
    )


def _environment(params: Params) -> dict[str, dict[str, str]]:
    """What each role finds in its environment beside what is there."""
    unlimited, keys = dict.fromkeys(PER_CLIENT.values(), "0"), _keys(params)
    inner = {role: {**unlimited, **keys.get(role, {})} for role in (*STAGES, "coordinator")}
    return {**inner, "gateway": keys.get("gateway", {})}


def _keys(params: Params) -> dict[str, dict[str, str]]:
    """The clients' keys for both edges; where there are any, the gateway gets one of its own for the coordinator."""
    if settings.keys(params) is None:
        return {}
    file, own = params["api_keys_file"], secrets.token_urlsafe(32)
    clients = {"COLASERVE_API_KEYS": params["api_keys"]}
    if file is not None:
        clients["COLASERVE_API_KEYS_FILE"] = str(file)
    both = ",".join(filter(None, (params["api_keys"], f"gateway {own}")))
    return {
        "gateway": {**clients, "COLASERVE_UPSTREAM_KEY": own},
        "coordinator": {**clients, "COLASERVE_API_KEYS": both},
    }


def _arguments(groups: tuple[str, ...], params: Params, given: set[str]) -> list[str]:
    found = []
    for option in (option for group in groups for option in GROUPS[group]):
        if option.name in given - NOT_PASSED:
            found += _written(option, params[option.name])
    return found


def _written(option: click.Option, value: Any) -> list[str]:
    if option.is_flag:
        return [option.opts[0]] if value else []
    return [f"{option.opts[0]}={value}"]
