"""Objects of operators, for which the schema checker has no schema: their fields, as the references name them.

cert-manager.io/v1, gateway.networking.k8s.io/v1, monitoring.coreos.com/v1 and keda.sh/v1alpha1, as far as they are used
here; inference.networking.k8s.io/v1 whole, in inference_pool.json.
"""

import json
import re
from pathlib import Path

import jsonschema
import yaml

from colaserve_services.rpc.metrics import Aliases, Metrics
from tests.deploy.conftest import KUBERNETES, container_of

POOL = json.loads(Path(__file__).with_name("inference_pool.json").read_text(encoding="utf-8"))

FIELDS = {  # path and type of every field; * is any name
    "Issuer": {"ca.secretName str"},
    "Certificate": {
        *(f"{name} str" for name in ("secretName", "commonName", "duration", "renewBefore", "dnsNames", "usages")),
        *(f"issuerRef.{name} str" for name in ("name", "kind", "group")),
        "isCA bool",
        *("privateKey.algorithm str", "privateKey.rotationPolicy str", "privateKey.size int"),
    },
    "PodMonitor": {
        *("jobLabel str", "selector.matchLabels.* str"),
        *(f"podMetricsEndpoints.{name} str" for name in ("port", "path", "interval", "scrapeTimeout")),
        *(f"podMetricsEndpoints.relabelings.{name} str" for name in ("sourceLabels", "targetLabel", "action")),
    },
    "PrometheusRule": {
        "groups.name str",
        *(f"groups.rules.{name} str" for name in ("alert", "expr", "for", "labels.*", "annotations.*")),
    },
    "HTTPRoute": {
        *("parentRefs.name str", "parentRefs.namespace str", "hostnames str"),
        *(f"rules.matches.path.{name} str" for name in ("type", "value")),
        *(f"rules.timeouts.{name} str" for name in ("request", "backendRequest")),
        *("rules.backendRefs.name str", "rules.backendRefs.port int"),
        *("rules.backendRefs.group str", "rules.backendRefs.kind str"),
    },
    "BackendTLSPolicy": {
        *(f"{refs}.{name} str" for refs in ("targetRefs", "validation.caCertificateRefs")
          for name in ("name", "kind", "group")),
        "validation.hostname str",
    },
    "ScaledObject": {
        "scaleTargetRef.name str",
        *(f"{name} int" for name in ("minReplicaCount", "maxReplicaCount", "pollingInterval", "cooldownPeriod")),
        *("fallback.failureThreshold int", "fallback.replicas int"),
        *(f"advanced.horizontalPodAutoscalerConfig.behavior.scaleDown.{name}"
          for name in ("stabilizationWindowSeconds int", "policies.type str", "policies.value int",
                       "policies.periodSeconds int")),
        *(f"triggers.{name} str" for name in ("type", "metricType")),
        *(f"triggers.metadata.{name} str" for name in ("serverAddress", "query", "threshold")),
    },
}  # fmt: skip
USAGES = {"server auth", "client auth"}


def fields(value, path=""):
    """Path and type of every field; a list is what its items are."""
    if isinstance(value, dict):
        named = "*" if path.endswith(("abels.", "annotations.")) else None
        for name, each in value.items():
            yield from fields(each, f"{path}{named or name}.")
    elif isinstance(value, list):
        for each in value:
            yield from fields(each, path)
    else:
        yield f"{path.removesuffix('.')} {type(value).__name__}"


def test_their_fields_exist_and_hold_the_right_kind_of_value(rendered):
    for kind, known in FIELDS.items():
        for each in rendered.kind(kind):
            assert set(fields(each["spec"])) <= known, each["metadata"]["name"]


def test_every_kind_is_either_kubernetes_own_or_listed_here(rendered):
    for found in rendered.objects:
        group = found["apiVersion"].partition("/")[0]
        extensions = ("gateway.networking.k8s.io", "inference.networking.k8s.io")
        own = "." not in group or (group.endswith(".k8s.io") and group not in extensions)
        assert own == (found["kind"] not in {*FIELDS, "InferencePool"}), found["kind"]


def test_certificates_are_for_what_their_role_does(rendered):
    for found in rendered.kind("Certificate"):
        usages = set(found["spec"].get("usages", ()))
        assert usages <= USAGES
        if found["metadata"]["name"] in {"colaserve-coordinator", "colaserve-gateway"}:
            assert usages == USAGES


def test_a_pool_is_valid_by_its_published_schema(rendered):
    for found in rendered.kind("InferencePool"):
        assert found["apiVersion"] == "inference.networking.k8s.io/v1"
        jsonschema.validate(found["spec"], POOL)


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
