"""scripts/capacity: the arithmetic of docs/operations.md."""

import importlib.util
import json
import sys
from argparse import Namespace
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture(scope="module")
def capacity():
    sys.path.insert(0, str(SCRIPTS))
    try:
        loader = SourceFileLoader("capacity", str(SCRIPTS / "capacity"))
        module = importlib.util.module_from_spec(importlib.util.spec_from_loader("capacity", loader))
        sys.modules["capacity"] = module  # dataclasses look their module up
        sys.dont_write_bytecode, before = True, sys.dont_write_bytecode
        loader.exec_module(module)
        sys.dont_write_bytecode = before
        yield module
    finally:
        sys.path.remove(str(SCRIPTS))
        sys.modules.pop("capacity", None)


def level(sessions, prior, kv=1000.0):
    return {
        "sessions": sessions, "generations_per_second": 1.0, "blocks_per_generation": 10.0, "encoder": 0.001,
        "prior": prior, "decoder": 0.01, "coordinator": 0.002, "gateway": 0.001, "inter_block_seconds": 0.1,
        "prior_kv_bytes": kv, "decoder_kv_bytes": kv / 2,
    }  # fmt: skip


MEASURED = {
    "about": {"model": "m", "date": "2026-01-01", "new_tokens": 64},
    "levels": [level(1, 0.2), level(4, 0.1), level(16, 0.05)],
}


def options(measured, **given):
    chosen = {"rate": 7.0, "new_tokens": None, "inter_block": 1.0, "utilisation": 0.7, "spare": 1, "kv_bytes": 1e9}
    return Namespace(measured=measured, **{**chosen, **given})


def table(capacity, tmp_path, capsys, **given):
    """Role to (replicas, with the spare ones)."""
    file = tmp_path / "measured.json"
    file.write_text(json.dumps(MEASURED))
    code = capacity.plan(options(file, **given))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    return code, {line[0]: (int(line[3]), int(line[4])) for line in lines if line and line[0] in capacity.COSTS}


def test_replicas_are_the_busy_devices_over_the_utilisation_rounded_up(capacity, tmp_path, capsys):
    code, replicas = table(capacity, tmp_path, capsys)  # 70 blocks/s at 16 sessions
    assert code == 0
    assert replicas == {
        "encoder": (1, 2),  # 0.07 busy
        "prior": (5, 6),  # 3.5 busy / 0.7
        "decoder": (1, 2),  # 0.7 busy / 0.7
        "coordinator": (1, 2),
        "gateway": (1, 2),
    }


def test_a_tighter_bound_on_the_time_between_blocks_takes_fewer_sessions_and_more_priors(capacity, tmp_path, capsys):
    _, replicas = table(capacity, tmp_path, capsys, inter_block=0.5)  # 16 x 0.05 is too long, 4 x 0.1 is not
    assert replicas["prior"] == (10, 11)


def test_sessions_must_fit_the_kv_budget(capacity, tmp_path, capsys):
    _, replicas = table(capacity, tmp_path, capsys, kv_bytes=15_999.0)
    assert replicas["prior"] == (10, 11)
    code, none = table(capacity, tmp_path, capsys, kv_bytes=999.0)
    assert (code, none) == (1, {})


def test_longer_texts_cost_blocks_but_no_more_encoding(capacity, tmp_path, capsys):
    _, replicas = table(capacity, tmp_path, capsys, new_tokens=640.0, rate=70.0)  # ten times the blocks, ten the rate
    assert replicas["prior"] == (500, 501)
    assert replicas["encoder"] == (1, 2)  # 0.7 busy


def test_counters_are_summed_by_labels_and_role(capacity):
    samples = {
        ('x_total{stage="prior",code="OK"}', "prior"): 2.0,
        ('x_total{stage="prior",code="BAD"}', "prior"): 3.0,
        ('x_total{stage="decoder"}', "decoder"): 5.0,
        ('x_total_more{stage="prior"}', "prior"): 100.0,
        ("x_total", "gateway"): 7.0,
    }
    assert capacity.value(samples, "x_total", stage="prior") == 5.0
    assert capacity.value(samples, "x_total", role="gateway") == 7.0
