"""Properties of the rendered overlays that schemas do not know."""

from tests.deploy.conftest import ROLES, STAGES, container_of


def pods(deployment):
    return deployment["spec"]["template"]["spec"]


def test_every_role_has_a_deployment_a_service_an_account_and_a_disruption_budget(rendered):
    for kind in ("Deployment", "Service", "ServiceAccount", "PodDisruptionBudget"):
        assert {found["metadata"]["name"] for found in rendered.kind(kind)} == {f"colaserve-{role}" for role in ROLES}


def test_pods_run_without_rights_tokens_or_a_writable_root(rendered):
    for deployment in rendered.deployments().values():
        spec = pods(deployment)
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in [*spec["containers"], *spec.get("initContainers", ())]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert ":" in container["image"]
            assert {"cpu", "memory"} <= set(container["resources"]["limits"])


def test_the_stages_and_the_coordinator_are_reached_by_headless_services(rendered):
    headless = {
        service["metadata"]["name"]
        for service in rendered.kind("Service")
        if service["spec"].get("clusterIP") == "None"
    }
    assert headless == {f"colaserve-{role}" for role in (*STAGES, "coordinator")}


def test_services_and_budgets_select_the_pods_of_their_role(rendered):
    for deployment in rendered.deployments().values():
        name, labels = deployment["metadata"]["name"], deployment["spec"]["template"]["metadata"]["labels"]
        selectors = [
            found["spec"]["selector"] for found in rendered.kind("Service") if found["metadata"]["name"] == name
        ]
        budgets = [found for found in rendered.kind("PodDisruptionBudget") if found["metadata"]["name"] == name]
        selectors += [budget["spec"]["selector"]["matchLabels"] for budget in budgets]
        assert len(selectors) == 2
        for selector in selectors:
            assert selector.items() <= labels.items()
            assert selector["app.kubernetes.io/component"] == labels["app.kubernetes.io/component"]
        for spread in pods(deployment)["topologySpreadConstraints"]:
            assert spread["labelSelector"]["matchLabels"].items() <= labels.items()
            assert spread["matchLabelKeys"] == ["app.kubernetes.io/component"]


def test_only_who_must_talk_may_talk(rendered):
    labels = {
        role: deployment["spec"]["template"]["metadata"]["labels"]
        for role, deployment in rendered.deployments().items()
    }
    policies = [found["spec"] for found in rendered.kind("NetworkPolicy")]
    pairs = [(source, target, port) for source in ROLES for target in ROLES for port in (8000, 9090, 50051, 50052)]
    leaves = {it for it in pairs if passes(policies, "egress", "to", labels[it[0]], labels[it[1]], it[2])}
    enters = {it for it in pairs if passes(policies, "ingress", "from", labels[it[1]], labels[it[0]], it[2])}
    assert leaves == enters == {("gateway", "coordinator", 50051), *(("coordinator", stage, 50051) for stage in STAGES)}


def passes(policies, direction, side, own, other, port):
    """Whether a pod with labels `own` may talk that way with a pod of the same namespace with labels `other`."""
    mine = [policy for policy in policies if selects(policy["podSelector"], own)]
    assert any(direction.title() in policy["policyTypes"] for policy in mine), "some policy isolates every pod"
    return any(
        any("podSelector" in peer and "namespaceSelector" not in peer and selects(peer["podSelector"], other)
            for peer in rule[side])
        and any(it["port"] == port and it["protocol"] == "TCP" for it in rule["ports"])
        for policy in mine
        for rule in policy.get(direction, ())
    )  # fmt: skip


def selects(selector, labels):
    expressions = selector.get("matchExpressions", ())
    assert all(expression["operator"] == "In" for expression in expressions)
    return selector.get("matchLabels", {}).items() <= labels.items() and all(
        labels.get(expression["key"]) in expression["values"] for expression in expressions
    )


def test_traces_leave_where_a_collector_is_named(rendered):
    for role in ROLES:
        endpoint = rendered.environment(role).get("COLASERVE_OTLP_ENDPOINT")
        policies = [it for it in rendered.kind("NetworkPolicy") if it["metadata"]["name"] == "colaserve-tracing"]
        assert bool(endpoint) == bool(policies)
        for policy in policies:
            (rule,) = policy["spec"]["egress"]
            port, (peer,) = rule["ports"][0]["port"], rule["to"]
            namespace = peer["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"]
            collector = peer["podSelector"]["matchLabels"]["app.kubernetes.io/name"]
            assert endpoint == f"http://{collector}.{namespace}:{port}"


def test_every_secret_that_is_mounted_is_issued_or_named_as_the_operators_own(rendered):
    issued = {found["spec"]["secretName"] for found in rendered.kind("Certificate")}
    mounted = {
        volume["secret"]["secretName"]
        for deployment in rendered.deployments().values()
        for volume in pods(deployment)["volumes"]
        if "secret" in volume
    }
    assert mounted - issued <= {"colaserve-keys"}


def test_certificates_hold_the_name_that_callers_use(rendered):
    addresses = {
        value.removeprefix("dns:///").partition(":")[0]
        for role in ("coordinator", "gateway")
        for name, value in rendered.environment(role).items()
        if name in {"COLASERVE_ENCODER", "COLASERVE_PRIOR", "COLASERVE_DECODER", "COLASERVE_COORDINATOR"}
    }
    assert addresses == {f"colaserve-{role}" for role in (*STAGES, "coordinator")}
    certified = {name for found in rendered.kind("Certificate") for name in found["spec"].get("dnsNames", ())}
    assert not certified or addresses <= certified


def test_autoscalers_follow_deployments_whose_replicas_nobody_else_sets(rendered):
    scalers = [*rendered.kind("HorizontalPodAutoscaler"), *rendered.kind("ScaledObject")]
    targets = {found["spec"]["scaleTargetRef"]["name"] for found in scalers}
    for deployment in rendered.deployments().values():
        assert (deployment["metadata"]["name"] in targets) == ("replicas" not in deployment["spec"])
    assert len(targets) == len(scalers)


def test_the_gpu_overlay_asks_for_one_gpu_where_the_device_is_cuda(rendered):
    for role, deployment in rendered.deployments().items():
        asked = container_of(deployment)["resources"]["limits"].get("nvidia.com/gpu")
        on_cuda = rendered.environment(role).get("COLASERVE_DEVICE", "cpu").startswith("cuda")
        assert (asked == "1") == on_cuda


def test_routes_wait_longer_than_a_request_may_take_and_check_the_name_in_our_certificate(rendered):
    services = {found["metadata"]["name"]: found["spec"] for found in rendered.kind("Service")}
    for route in rendered.kind("HTTPRoute"):
        (rule,) = route["spec"]["rules"]
        (backend,) = rule["backendRefs"]
        if backend.get("kind") != "InferencePool":
            assert backend["port"] in [port["port"] for port in services[backend["name"]]["ports"]]
        for seconds in rule["timeouts"].values():
            assert int(seconds.removesuffix("s")) > int(rendered.settings()["COLASERVE_REQUEST_SECONDS"])
    certified = {name for found in rendered.kind("Certificate") for name in found["spec"].get("dnsNames", ())}
    for policy in rendered.kind("BackendTLSPolicy"):
        assert policy["spec"]["validation"]["hostname"] in certified


def test_a_checkpoint_that_is_claimed_is_mounted_by_all_who_read_it_and_pulled_once(rendered):
    for claim in rendered.kind("PersistentVolumeClaim"):
        (job,) = rendered.kind("Job")
        (puller,) = pods(job)["containers"]
        for role in (*STAGES, "coordinator"):
            spec = pods(rendered.deployments()[role])
            (volume,) = (it for it in spec["volumes"] if it["name"] == "model")
            assert volume == {"name": "model", "persistentVolumeClaim": {
                "claimName": claim["metadata"]["name"], "readOnly": True}}  # fmt: skip
            assert not spec.get("initContainers")
            assert puller["args"][2] == rendered.environment(role)["COLASERVE_MODEL"]
        assert puller["image"] == container_of(rendered.deployments()["prior"])["image"]
