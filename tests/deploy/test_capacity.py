"""scripts/capacity plan: the arithmetic of docs/operations.md."""

import json
import subprocess
import sys

import pytest

from tests.deploy.conftest import ROOT


def level(sessions, prior):
    return {
        "sessions": sessions, "generations_per_second": 1.0, "blocks_per_generation": 10.0, "encoder": 0.001,
        "prior": prior, "decoder": 0.01, "coordinator": 0.002, "gateway": 0.001, "inter_block_seconds": 0.1,
        "prior_kv_bytes": 1000.0, "decoder_kv_bytes": 500.0,
    }  # fmt: skip


MEASURED = {
    "about": {"model": "m", "date": "2026-01-01", "new_tokens": 64},
    "levels": [level(1, 0.2), level(4, 0.1), level(16, 0.05)],
}


@pytest.fixture
def plan(tmp_path):
    """Plans for the measured levels: the exit code, and a role's (replicas, with the spare one)."""

    def run(*options):
        file = tmp_path / "measured.json"
        file.write_text(json.dumps(MEASURED))
        command = [sys.executable, ROOT / "scripts" / "capacity", "plan", file, "--kv-bytes=1e9", *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        rows = [line.split() for line in done.stdout.splitlines()]
        return done.returncode, {row[0]: (int(row[3]), int(row[4])) for row in rows if len(row) == 5}

    return run


def test_replicas_are_the_busy_devices_over_the_utilisation_rounded_up(plan):
    code, replicas = plan("--rate=7")  # 70 blocks/s at 16 sessions
    assert code == 0
    one = (1, 2)  # the decoder too: 0.7 busy / 0.7
    assert replicas == {"encoder": one, "prior": (5, 6), "decoder": one, "coordinator": one, "gateway": one}


@pytest.mark.parametrize(
    ("options", "prior"),
    [
        (["--rate=7", "--inter-block=0.5"], (10, 11)),  # 16 x 0.05 is too long, 4 x 0.1 is not
        (["--rate=7", "--kv-bytes=15999"], (10, 11)),  # 16 sessions do not fit
        (["--rate=70", "--new-tokens=640"], (500, 501)),  # ten times the blocks, ten times the rate
    ],
)
def test_bounds_and_lengths_decide_how_many_priors_it_takes(plan, options, prior):
    _, replicas = plan(*options)
    assert replicas["prior"] == prior
    assert replicas["encoder"] == (1, 2), "longer texts cost no more encoding"


def test_a_load_that_no_level_can_serve_is_said(plan):
    assert plan("--rate=7", "--kv-bytes=999") == (1, {})
