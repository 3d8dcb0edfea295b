"""What deploy/ holds, read once."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
OVERLAYS = sorted(path.name for path in (KUBERNETES / "overlays").iterdir())
ROLES = ("encoder", "prior", "decoder", "coordinator", "gateway")
STAGES = ROLES[:3]
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def documents(path):
    """The YAML documents of a file."""
    return [document for document in yaml.load_all(path.read_text(encoding="utf-8"), LOADER) if document]


def role_of(deployment):
    return deployment["metadata"]["name"].removeprefix("colaserve-")


def container_of(deployment):
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    return container


class Rendered:
    """The objects of a rendered overlay."""

    def __init__(self, text):
        self.objects = [document for document in yaml.load_all(text, LOADER) if document]

    def kind(self, kind):
        return [found for found in self.objects if found["kind"] == kind]

    def deployments(self):
        return {role_of(found): found for found in self.kind("Deployment")}

    def settings(self):
        (found,) = (it for it in self.kind("ConfigMap") if it["metadata"]["name"].startswith("colaserve-settings"))
        return found["data"]

    def environment(self, role):
        """All variables of a role's container: shared settings, then its own; None where Kubernetes fills in."""
        own = {it["name"]: it.get("value") for it in container_of(self.deployments()[role]).get("env", ())}
        return {**self.settings(), **own}


@pytest.fixture(scope="session", params=[*OVERLAYS, "keda", "production"])
def rendered(request, tmp_path_factory):
    """Each overlay, the one of docs/operations.md, and the base with what these leave out: KEDA, tracing, an inference
    gateway."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl renders the overlays")
    folder = KUBERNETES / "overlays" / request.param
    if request.param == "keda":
        folder = tmp_path_factory.mktemp("keda")
        up = Path(*[".."] * len(folder.parts[1:]))
        added = map(_component, ("autoscaling-keda", "tracing", "inference-gateway"))
        paths = KUBERNETES / "base", *added
        base, *components = (str(up / path.relative_to("/")) for path in paths)
        (folder / "kustomization.yaml").write_text(
            f"namespace: colaserve\nresources: [{base}]\ncomponents: [{', '.join(components)}]\n"
        )
    if request.param == "production":
        folder = tmp_path_factory.mktemp("production")
        shutil.copytree(DEPLOY, folder / "colaserve" / "deploy")
        (folder / "kustomization.yaml").write_text(production_overlay())
    done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return Rendered(done.stdout)


def production_overlay():
    """The kustomization.yaml that docs/operations.md shows."""
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    (found,) = re.findall(r"^```yaml\n# kustomization.yaml\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    return found


def _component(name):
    return KUBERNETES / "components" / name


def queries():
    """(where, PromQL) of every dashboard panel, alert and autoscaler of KEDA."""
    found = []
    for path in sorted((DEPLOY / "grafana").glob("*.json")):
        for panel in json.loads(path.read_text(encoding="utf-8"))["panels"]:
            for target in panel.get("targets", ()):
                found.append((f"{path.name}: {panel['title']}", plain(target["expr"])))
    for group in yaml.safe_load((DEPLOY / "prometheus" / "alerts.yaml").read_text(encoding="utf-8"))["groups"]:
        found += [(rule["alert"], rule["expr"]) for rule in group["rules"]]
    for scaled in documents(_component("autoscaling-keda") / "scaled-objects.yaml"):
        found += [(scaled["metadata"]["name"], trigger["metadata"]["query"]) for trigger in scaled["spec"]["triggers"]]
    return found


def plain(expression):
    """A dashboard's query with its variables filled in."""
    return re.sub(r"\$(namespace|stage)\b", ".*", expression).replace("$__rate_interval", "1m")
