"""The smoke test of docs/operations.md, against a gateway with HTTPS and keys."""

import os
import subprocess
import sys

import pytest

from tests.deploy.conftest import ROOT
from tests.services.launch.processes import FREE_PORTS, started
from tests.services.rpc.conftest import make_authority


def smoke(*arguments, key):
    command = [sys.executable, ROOT / "scripts" / "smoke", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "COLASERVE_KEY": key}, timeout=100
    )


@pytest.mark.slow
def test_it_says_what_works_and_what_is_wrong(tmp_path):
    authority = make_authority(tmp_path)
    (tmp_path / "keys").write_text("k1\n")
    secured = (f"--http-tls={authority.issue_folder('service', ca=False)}", f"--api-keys-file={tmp_path / 'keys'}")
    with started(tmp_path, "up", *FREE_PORTS, *secured, model=None) as running:
        options = (running.http.replace("127.0.0.1", "localhost"), "--ca", authority.ca)
        done = smoke(*options, "--server-name", "localhost", key="k1")
        assert (done.returncode, done.stderr) == (0, "")
        assert "answers ' Paris'" in done.stdout
        assert "streams it in" in done.stdout
        for wrong, said in (((*options, "--server-name", "other"), "certificate"), (options, "answers 401")):
            done = smoke(*wrong, key="k2")
            assert done.returncode == 1
            assert said in done.stderr
