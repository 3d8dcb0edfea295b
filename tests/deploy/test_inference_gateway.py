"""The component for inference gateways: its pool, its route and its picker name things that exist."""

import re

import yaml

from colaserve_services.rpc.metrics import Aliases, Metrics
from tests.deploy.conftest import KUBERNETES, container_of

PICKER = KUBERNETES / "components" / "inference-gateway" / "endpoint-picker.yaml"


def test_the_pool_holds_the_gateways_pods_under_the_label_that_the_picker_reads(rendered):
    picker = yaml.safe_load(PICKER.read_text(encoding="utf-8"))
    [engine] = next(one["parameters"]["engineConfigs"] for one in picker["plugins"] if "parameters" in one)
    for pool in rendered.kind("InferencePool"):
        gateway = rendered.deployments()["gateway"]
        labels = gateway["spec"]["template"]["metadata"]["labels"]
        assert pool["spec"]["selector"]["matchLabels"].items() <= labels.items()
        assert labels["llm-d.ai/engine-type"] == engine["name"] == "colaserve"
        ports = [port["containerPort"] for port in container_of(gateway)["ports"] if port["name"] == "http"]
        assert [port["number"] for port in pool["spec"]["targetPorts"]] == ports
        assert rendered.settings()["COLASERVE_METRICS_ALIASES"] == "true"
        [route] = rendered.kind("HTTPRoute")
        assert route["spec"]["rules"][0]["backendRefs"][0]["name"] == pool["metadata"]["name"]


def test_the_picker_names_plugins_that_it_has_and_metrics_that_a_gateway_has():
    picker = yaml.safe_load(PICKER.read_text(encoding="utf-8"))
    declared = {one["type"] for one in picker["plugins"]}
    used = {one["pluginRef"] for profile in picker["schedulingProfiles"] for one in profile["plugins"]}
    for source in picker["dataLayer"]["sources"]:
        used |= {source["pluginRef"], *(one["pluginRef"] for one in source["extractors"])}
    assert used == declared
    metrics = Metrics()
    labels = {name: set(names) for name, _, names, _ in metrics.table}
    labels |= {family.name: set() for family in Aliases(metrics).collect()}
    [engine] = next(one["parameters"]["engineConfigs"] for one in picker["plugins"] if "parameters" in one)
    for spec in (value for name, value in engine.items() if name.endswith("Spec")):
        name, chosen = re.fullmatch(r"([\w:]+)(?:{(.*)})?", spec).groups()
        assert {one.partition("=")[0] for one in (chosen or "").split(",") if one} == labels[name]
