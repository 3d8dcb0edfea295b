"""Objects of operators, for which the schema checker has no schema: their fields, as the references name them.

cert-manager.io/v1, gateway.networking.k8s.io/v1, monitoring.coreos.com/v1 and keda.sh/v1alpha1, as far as they are used
here.
"""

import pytest

TEXT, NUMBER, FLAG, NAMES = str, int, bool, [str]
REFERENCE = {"name": TEXT, "kind": TEXT, "group": TEXT}
RULE = {"alert": TEXT, "expr": TEXT, "for": TEXT, "labels": {"*": TEXT}, "annotations": {"*": TEXT}}
SCALE_DOWN = {
    "stabilizationWindowSeconds": NUMBER,
    "policies": [{"type": TEXT, "value": NUMBER, "periodSeconds": NUMBER}],
}
SPECS = {
    "Issuer": {"selfSigned": {}, "ca": {"secretName": TEXT}},
    "Certificate": {
        "secretName": TEXT,
        "issuerRef": REFERENCE,
        "isCA": FLAG,
        "commonName": TEXT,
        "dnsNames": NAMES,
        "usages": NAMES,
        "duration": TEXT,
        "renewBefore": TEXT,
        "privateKey": {"algorithm": TEXT, "size": NUMBER, "rotationPolicy": TEXT},
    },
    "PodMonitor": {
        "jobLabel": TEXT,
        "selector": {"matchLabels": {"*": TEXT}},
        "podMetricsEndpoints": [
            {
                "port": TEXT,
                "path": TEXT,
                "interval": TEXT,
                "scrapeTimeout": TEXT,
                "relabelings": [{"sourceLabels": NAMES, "targetLabel": TEXT, "action": TEXT}],
            }
        ],
    },
    "PrometheusRule": {"groups": [{"name": TEXT, "rules": [RULE]}]},
    "HTTPRoute": {
        "parentRefs": [{"name": TEXT, "namespace": TEXT}],
        "hostnames": NAMES,
        "rules": [
            {
                "matches": [{"path": {"type": TEXT, "value": TEXT}}],
                "timeouts": {"request": TEXT, "backendRequest": TEXT},
                "backendRefs": [{"name": TEXT, "port": NUMBER}],
            }
        ],
    },
    "BackendTLSPolicy": {
        "targetRefs": [REFERENCE],
        "validation": {"hostname": TEXT, "caCertificateRefs": [REFERENCE]},
    },
    "ScaledObject": {
        "scaleTargetRef": {"name": TEXT},
        "minReplicaCount": NUMBER,
        "maxReplicaCount": NUMBER,
        "pollingInterval": NUMBER,
        "cooldownPeriod": NUMBER,
        "fallback": {"failureThreshold": NUMBER, "replicas": NUMBER},
        "advanced": {"horizontalPodAutoscalerConfig": {"behavior": {"scaleDown": SCALE_DOWN}}},
        "triggers": [
            {"type": TEXT, "metricType": TEXT, "metadata": {"serverAddress": TEXT, "query": TEXT, "threshold": TEXT}}
        ],
    },
}
USAGES = {"server auth", "client auth"}


def check(value, shape, where):
    if isinstance(shape, type):
        assert type(value) is shape, f"{where}: {value!r} is no {shape.__name__}"
    elif isinstance(shape, list):
        assert isinstance(value, list), where
        for index, item in enumerate(value):
            check(item, shape[0], f"{where}[{index}]")
    else:
        assert isinstance(value, dict), where
        for name, item in value.items():
            assert name in shape or "*" in shape, f"{where}.{name}: no such field"
            check(item, shape.get(name, shape.get("*")), f"{where}.{name}")


def test_their_fields_exist_and_hold_the_right_kind_of_value(rendered):
    found = [(kind, each) for kind in SPECS for each in rendered.kind(kind)]
    for kind, each in found:
        check(each["spec"], SPECS[kind], f"{kind} {each['metadata']['name']}")
    assert len(found) == sum(each["kind"] in SPECS for each in rendered.objects)


def test_every_kind_is_either_kubernetes_own_or_listed_here(rendered):
    for found in rendered.objects:
        group = found["apiVersion"].partition("/")[0]
        own = "." not in group or (group.endswith(".k8s.io") and group != "gateway.networking.k8s.io")
        assert own == (found["kind"] not in SPECS), found["kind"]


def test_certificates_are_for_what_their_role_does(rendered):
    for found in rendered.kind("Certificate"):
        usages = set(found["spec"].get("usages", ()))
        assert usages <= USAGES
        if found["metadata"]["name"] in {"colaserve-coordinator", "colaserve-gateway"}:
            assert usages == USAGES


def test_the_check_sees_a_misspelt_field():
    with pytest.raises(AssertionError, match="no such field"):
        check({"secretname": "x"}, SPECS["Certificate"], "here")
