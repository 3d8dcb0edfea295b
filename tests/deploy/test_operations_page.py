"""docs/operations.md: every alert has an entry; the tests, options and metrics that the page names exist."""

import re

from tests.deploy.conftest import ROOT
from tests.deploy.test_watching import SERIES, alerts

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
