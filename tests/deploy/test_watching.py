"""Dashboards, alerts and autoscalers ask for what the code exports; every alert is tested."""

import re
import shutil
import subprocess
import sys

import pytest
import yaml

from colaserve_services.rpc.metrics import Metrics
from tests.deploy.conftest import DEPLOY, KUBERNETES, STAGES, documents, queries

ADDED = {"namespace", "instance", "job", "role", "le", "pod"}  # labels that Prometheus adds
SUFFIXES = {"histogram": ("_bucket", "_sum", "_count"), "counter": ("_total",), "gauge": ("",)}


def exported():
    """Series name to its labels."""
    registry = Metrics().registry
    found = {}
    for collector in set(registry._collector_to_names):
        for family in collector.collect():
            for suffix in SUFFIXES[family.type]:
                found[family.name + suffix] = set(collector._labelnames)
    return found


def alerts():
    groups = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yaml").read_text(encoding="utf-8"))["groups"]
    return {rule["alert"]: rule for group in groups for rule in group["rules"]}


@pytest.mark.parametrize(("where", "query"), queries(), ids=[where for where, _ in queries()])
def test_queries_use_series_and_labels_that_exist(where, query):
    series = exported()
    names = set(re.findall(r"\bcolaserve_\w+", query))
    assert names <= set(series), names - set(series)
    for name, matchers in re.findall(r"\b(colaserve_\w+)\{([^}]*)\}", query):
        assert set(re.findall(r"(\w+)\s*=", matchers)) <= series[name] | ADDED, where
    stages = set(re.findall(r'stage="(\w+)"', query))
    assert stages <= {*STAGES, "coordinator"}
    labels = set().union(*(series[name] for name in names)) | ADDED
    for listed in re.findall(r"(?:by|on) \(([^)]*)\)", query):
        assert {name.strip() for name in listed.split(",") if name.strip()} <= labels, where


def test_autoscalers_use_series_that_exist():
    series = exported()
    for scaler in documents(KUBERNETES / "components/autoscaling-hpa/autoscalers.yaml"):
        for metric in scaler["spec"]["metrics"]:
            asked = metric["pods"]["metric"]
            assert set(asked["selector"]["matchLabels"]) <= series[asked["name"]]
    adapter = (DEPLOY / "prometheus" / "adapter.yaml").read_text(encoding="utf-8")
    scaled = {
        metric["pods"]["metric"]["name"]
        for scaler in documents(KUBERNETES / "components/autoscaling-hpa/autoscalers.yaml")
        for metric in scaler["spec"]["metrics"]
    }
    pattern = re.search(r'__name__=~"([^"]*)"', adapter)[1]
    assert all(re.fullmatch(pattern, name) for name in scaled)


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
    done = subprocess.run(
        [sys.executable, str(DEPLOY / "generate.py"), "--check"], capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 0, done.stderr
