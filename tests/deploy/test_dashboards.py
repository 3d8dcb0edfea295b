"""A real Prometheus scrapes `colaserve up --split` under load: every panel draws numbers, every rule is evaluated."""

import json
import math
import shutil
import subprocess
import threading
import urllib.error
import urllib.parse
import urllib.request
from contextlib import contextmanager

import pytest

from tests.chaos.fleet import free_port
from tests.deploy.conftest import DEPLOY, ROLES, queries
from tests.services.launch.processes import FREE_PORTS, started
from tests.waiting import wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="needs prometheus and promtool"),
]
SHARED = "The same beginning of many prompts, long enough to fill several blocks of latents. " * 2


def fetched(url, body=None):
    headers = {"content-type": "application/json"}
    request = urllib.request.Request(url, body and json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.read()


@contextmanager
def prometheus(folder, ports):
    """Scrapes the roles each second, with our alert rules. Yields what asks its API for a path."""
    targets = [
        {"targets": [urllib.parse.urlsplit(kinds["metrics"]).netloc], "labels": {"role": role}}
        for role, kinds in ports.items()
    ]
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "5s"},
        "rule_files": [str(DEPLOY / "prometheus" / "alerts.yaml")],
        "scrape_configs": [{"job_name": "colaserve", "static_configs": targets}],
    }
    (folder / "prometheus.yaml").write_text(json.dumps(config))  # JSON is YAML
    address = f"127.0.0.1:{free_port()}"
    command = ["prometheus", f"--config.file={folder}/prometheus.yaml", f"--storage.tsdb.path={folder}/data"]
    with (folder / "prometheus.log").open("w") as log:
        process = subprocess.Popen([*command, f"--web.listen-address={address}"], stdout=log, stderr=log)
    try:
        yield lambda path: json.loads(fetched(f"http://{address}/api/v1/{path}"))["data"]
    finally:
        process.kill()
        process.wait(10)


@contextmanager
def load(url, workers=6):
    """Asks all the time, each tenth time wrongly; fails where an answer is not as it should be."""
    stop, wrong_answers = threading.Event(), []

    def work(number):
        count = 0
        while not stop.is_set():
            count += 1
            wrong, status = count % 10 == 0, 200
            body = {"prompt": f"{SHARED}{number} {count}", "max_tokens": -1 if wrong else 24, "stream": count % 2 == 0}
            try:
                fetched(f"{url}/v1/completions", body)
            except urllib.error.HTTPError as error:
                status = error.code
            if status != (400 if wrong else 200):
                wrong_answers.append((status, body))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(workers)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not wrong_answers


def test_every_panel_draws_numbers_and_every_rule_can_be_evaluated(tmp_path):
    missing = {query.replace("1m", "15s"): where for where, query in queries() if ".json: " in where}
    assert len(missing) > 50

    def drawn():
        for query in list(missing):
            found = asked(f"query?{urllib.parse.urlencode({'query': query})}")["result"]
            if any(math.isfinite(float(sample["value"][1])) for sample in found):
                del missing[query]
        return not missing

    with (
        started(tmp_path, "up", "--split", "--threads=1", *FREE_PORTS) as running,
        prometheus(tmp_path, running.ports) as asked,
        load(running.http),
    ):
        wait_until(lambda: "ready to receive" in (tmp_path / "prometheus.log").read_text())
        try:
            wait_until(drawn, 90)
        except AssertionError:
            pytest.fail(f"no numbers: {missing}")
        up = asked("query?query=up")["result"]
        assert {sample["metric"]["role"]: sample["value"][1] for sample in up} == dict.fromkeys(ROLES, "1")
        rules = [rule for group in asked("rules")["groups"] for rule in group["rules"]]
        assert {rule["name"]: rule.get("lastError") for rule in rules if rule["health"] == "err"} == {}
        for kinds in running.ports.values():
            command = ["promtool", "check", "metrics"]
            done = subprocess.run(command, input=fetched(kinds["metrics"]), capture_output=True, timeout=30)
            assert (done.returncode, done.stdout + done.stderr) == (0, b"")
