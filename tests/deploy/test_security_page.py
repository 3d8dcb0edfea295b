"""docs/security.md names tests that exist."""

import re

import pytest

from tests.deploy.conftest import ROOT

TEXT = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
NAMED = sorted(set(re.findall(r"`([\w/]+\.py)::(test_\w+)`", TEXT)))


@pytest.mark.parametrize(("file", "name"), NAMED, ids=[name for _, name in NAMED])
def test_every_named_test_exists(file, name):
    assert re.search(rf"^(async )?def {name}\(", (ROOT / "tests" / file).read_text(encoding="utf-8"), re.MULTILINE)


def test_every_threat_says_how_it_is_tested():
    rows = [line for line in TEXT.splitlines() if line.startswith("| ") and not line.startswith("| Threat")]
    assert len(rows) > 20
    for row in rows:
        last = row.rstrip(" |").rpartition(" | ")[2]
        assert re.search(r"`[\w/]+\.py::test_\w+`", last) or last in {"not defended", "**no test**"}, row


def test_the_options_it_names_exist():
    from colaserve_services.launch import options

    flags = {flag for group in options.GROUPS.values() for option in group for flag in option.opts}
    assert {flag for flag in re.findall(r"`(--[a-z-]+)", TEXT) if "*" not in flag} - {"--tls-"} <= flags
