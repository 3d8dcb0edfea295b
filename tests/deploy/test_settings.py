"""The manifests set only what the roles know."""

import re

import click
import pytest
import yaml

from colaserve_services.launch import settings as launch_settings
from colaserve_services.launch.options import sections_of
from colaserve_services.launch.settings import ROLES as SETTINGS
from colaserve_services.pull import pull
from tests.deploy.conftest import DEPLOY, KUBERNETES, ROLES, container_of

OPENTELEMETRY = {"OTEL_TRACES_SAMPLER", "OTEL_TRACES_SAMPLER_ARG"}  # read by its SDK


def known(role):
    """Environment variable to option."""
    return {option.envvar: option for section in sections_of(SETTINGS[role]).values() for option in section}


ALL = {variable: option for role in ROLES for variable, option in known(role).items()}


def takes(option, value):
    """The value as the command line would read it; raises click.BadParameter."""
    context = click.Context(click.Command("role"))
    if isinstance(option.type, click.Path):  # which is in the pod and not here
        return value
    return option.type.convert(value, option, context)


def test_every_shared_setting_is_an_option_of_some_role_and_its_value_fits(rendered):
    for name, value in rendered.settings().items():
        assert name in ALL, name
        takes(ALL[name], value)


def test_every_variable_of_a_role_is_an_option_of_that_role_and_its_value_fits(rendered):
    for role, deployment in rendered.deployments().items():
        assert container_of(deployment)["args"] == [role]
        for variable in container_of(deployment).get("env", ()):
            if variable["name"] in OPENTELEMETRY:
                continue
            assert variable["name"] in known(role), f"{role}: {variable['name']}"
            if "value" in variable:
                takes(known(role)[variable["name"]], variable["value"])


def test_every_file_that_a_role_reads_is_mounted(rendered):
    for role, deployment in rendered.deployments().items():
        mounts = [mount["mountPath"] for mount in container_of(deployment)["volumeMounts"]]
        volumes = {volume["name"] for volume in deployment["spec"]["template"]["spec"]["volumes"]}
        assert {mount["name"] for mount in container_of(deployment)["volumeMounts"]} <= volumes
        for name, value in rendered.environment(role).items():
            if value and value.startswith("/"):
                assert any(f"{value}/".startswith(f"{mount}/") for mount in mounts), f"{role}: {name}={value}"


def test_init_containers_call_a_command_with_options_that_it_has(rendered):
    for role, deployment in rendered.deployments().items():
        for container in deployment["spec"]["template"]["spec"].get("initContainers", ()):
            name, *arguments = container["args"]
            assert name == "pull"
            directory = pull.make_context(name, arguments).params["directory"]
            assert str(directory) == rendered.environment(role)["COLASERVE_MODEL"]


def test_a_role_serves_on_the_ports_that_its_probes_services_and_monitors_name(rendered):
    for role, deployment in rendered.deployments().items():
        environment, container = rendered.environment(role), container_of(deployment)
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        for name, port in ports.items():
            variable = f"COLASERVE_{name.upper()}_PORT"
            served = environment.get(variable, known(role)[variable].default)
            assert int(served) == port, f"{role}: {name}"
        for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert container[kind]["httpGet"]["port"] in ports, role


def test_kubernetes_waits_for_the_longest_stream(rendered):
    for role, deployment in rendered.deployments().items():
        environment, spec = rendered.environment(role), deployment["spec"]["template"]["spec"]
        pre_stop = container_of(deployment)["lifecycle"]["preStop"]["sleep"]["seconds"]
        drain, grace = (float(environment[f"COLASERVE_{name}_SECONDS"]) for name in ("DRAIN", "GRACE"))
        assert spec["terminationGracePeriodSeconds"] >= pre_stop + drain + grace + 10, role


def test_no_stream_of_production_is_longer_than_the_grace(rendered):
    if "Certificate" not in {found["kind"] for found in rendered.objects}:
        pytest.skip("not for production")
    settings = rendered.settings()
    assert float(settings["COLASERVE_GRACE_SECONDS"]) >= float(settings["COLASERVE_REQUEST_SECONDS"])


def test_the_compose_file_gives_each_role_options_that_it_has():
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))["services"]
    assert set(services) == {*ROLES, "prometheus"}
    for role in ROLES:
        first, *arguments = services[role]["command"]
        assert first == role
        flags = {flag for option in known(role).values() for flag in option.opts}
        assert {argument.split("=")[0] for argument in arguments if argument.startswith("--")} <= flags
        for name, value in services[role]["environment"].items():
            if name in launch_settings.WAITING:
                assert value == launch_settings.BRIEF[name]  # as under `up --split`
                continue
            assert name in known(role), f"{role}: {name}"
            filled = re.sub(r"\$\{\w+:-(.*?)\}", r"\1", value)
            takes(known(role)[name], filled)


def test_compose_waits_longer_than_a_drain_takes():
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))["services"]
    drain, grace = (ALL[f"COLASERVE_{name}_SECONDS"].default for name in ("DRAIN", "GRACE"))
    for role in ROLES:
        assert float(services[role]["stop_grace_period"].removesuffix("s")) >= drain + grace + 5


def test_no_variable_in_deploy_is_unknown():
    allowed = {*ALL, "COLASERVE_MODEL_DIR"}  # read by compose.yaml itself
    for path in sorted(DEPLOY.rglob("*")):
        if path.suffix in {".yaml", ".py"} or path.name.startswith("Containerfile"):
            used = set(re.findall(r"\bCOLASERVE_[A-Z_]+\b", path.read_text(encoding="utf-8")))
            assert used <= allowed, path
    assert KUBERNETES.is_dir()
