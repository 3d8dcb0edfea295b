"""Dashboards, alerts, autoscalers and docs/operations.md ask for what the code exports; every alert is tested and
has its entry in the runbook."""

import re
import runpy
import shutil
import subprocess

import pytest
import yaml

from colaserve_services.rpc.metrics import Metrics
from tests.deploy.conftest import DEPLOY, KUBERNETES, ROOT, STAGES, documents, queries

ADDED = {"namespace", "instance", "job", "role", "le", "pod"}  # labels that Prometheus adds
SERIES = {  # name to labels
    name + suffix: set(labels)
    for name, kind, labels, _ in Metrics().table
    for suffix in (("_bucket", "_sum", "_count") if kind == "histogram" else ("",))
}


def alerts():
    groups = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yaml").read_text(encoding="utf-8"))["groups"]
    return {rule["alert"]: rule for group in groups for rule in group["rules"]}


@pytest.mark.parametrize(("where", "query"), queries(), ids=[where for where, _ in queries()])
def test_queries_use_series_and_labels_that_exist(where, query):
    names = set(re.findall(r"\bcolaserve_\w+", query))
    assert names <= SERIES.keys(), names - SERIES.keys()
    for name, matchers in re.findall(r"\b(colaserve_\w+)\{([^}]*)\}", query):
        assert set(re.findall(r"(\w+)\s*=", matchers)) <= SERIES[name] | ADDED, where
    stages = set(re.findall(r'stage="(\w+)"', query))
    assert stages <= {*STAGES, "coordinator"}
    labels = set().union(*(SERIES[name] for name in names)) | ADDED
    for listed in re.findall(r"(?:by|on) \(([^)]*)\)", query):
        assert {name.strip() for name in listed.split(",") if name.strip()} <= labels, where


def test_autoscalers_use_series_that_exist_and_the_adapter_serves():
    adapter = (DEPLOY / "prometheus" / "adapter.yaml").read_text(encoding="utf-8")
    pattern = re.search(r'__name__=~"([^"]*)"', adapter)[1]
    for scaler in documents(KUBERNETES / "components/autoscaling-hpa/autoscalers.yaml"):
        for metric in scaler["spec"]["metrics"]:
            asked = metric[metric["type"].lower()]["metric"]
            assert set(asked["selector"]["matchLabels"]) <= SERIES[asked["name"]]
            assert re.fullmatch(pattern, asked["name"])


def test_every_query_parses(tmp_path):
    if shutil.which("promtool") is None:
        pytest.skip("promtool reads PromQL")
    rules = [{"record": f"query_{number}", "expr": query} for number, (_, query) in enumerate(queries())]
    file = tmp_path / "rules.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "all", "rules": rules}]}))
    done = subprocess.run(["promtool", "check", "rules", str(file)], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stdout + done.stderr


def test_alert_rules_pass_their_tests():
    if shutil.which("promtool") is None:
        pytest.skip("promtool runs the rules")
    command = ["promtool", "test", "rules", "alerts.test.yaml"]
    done = subprocess.run(command, cwd=DEPLOY / "prometheus", capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_seen_firing_and_quiet_in_a_test():
    tests = yaml.safe_load((DEPLOY / "prometheus" / "alerts.test.yaml").read_text(encoding="utf-8"))["tests"]
    cases = [case for test in tests for case in test["alert_rule_test"]]
    fired = {case["alertname"] for case in cases if case["exp_alerts"]}
    assert fired == set(alerts())


def test_generated_files_are_what_their_sources_give():
    made = runpy.run_path(str(DEPLOY / "generate.py"))["files"]()
    stale = [path.name for path, text in made.items() if path.read_text(encoding="utf-8") != text]
    assert not stale, "run python deploy/generate.py"


PAGE = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")


def section(title):
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)[1]


def test_every_alert_has_an_entry_in_the_runbook_and_none_is_left_over():
    entries = re.findall(r"^### (Colaserve\w+)\n(\w+)\.", section("Runbook"), re.MULTILINE)
    assert dict(entries) == {name: rule["labels"]["severity"] for name, rule in alerts().items()}
    for name, rule in alerts().items():
        assert rule["annotations"]["runbook"] == f"docs/operations.md#{name.lower()}"
        assert rule["labels"]["severity"] in {"page", "ticket"}


def test_the_options_and_metrics_it_names_exist():
    from colaserve_services.commands import COMMANDS

    assert set(re.findall(r"\bcolaserve_\w+", PAGE)) <= SERIES.keys()
    flags = {flag for command in COMMANDS.values() for option in command.params for flag in option.opts}
    assert set(re.findall(r"`(--[a-z-]+)[^`]*`", PAGE)) - {"--help", "--revision", "--seconds"} <= flags


def test_every_threat_names_a_file_of_tests_or_says_that_there_is_none():
    threats = re.findall(r"^- (?:.+\n(?:  .+\n)*)", section("Security"), re.MULTILINE)
    assert len(threats) > 20
    for threat in (" ".join(threat.split()) for threat in threats):
        last = re.search(r"\(([^()]*)\)$", threat)[1]
        files = re.findall(r"`([\w/]+\.py)`", last)
        assert files or last in {"not defended", "no test"}, threat
        assert all((ROOT / "tests" / file).is_file() for file in files), threat
