"""Fetching a checkpoint from a hub, with `pull` and with --model: it arrives whole and is compared, also after a break;
what is in the Hub's cache is served without asking; what is wrong is one line."""

import os
import resource
import shutil
import signal
import subprocess
import sys

import httpx
import pytest
from huggingface_hub import constants

from colaserve_services.commands import COMMANDS
from colaserve_services.launch.hub import HubId
from colaserve_services.model.checkpoint import Checkpoint
from colaserve_services.pull import pull
from tests.conftest import GOLDEN
from tests.services.launch.processes import FREE_PORTS, LAUNCH, invoked, started
from tests.services.pull.hub import COMMIT, REPOSITORY, Hub
from tests.waiting import wait_until

LONG = "README.md"
WEIGHTS = "cola_dlm/cola_dit/model.safetensors"
NOT_WANTED = (
    "pytorch_model.bin", "run.py", "examples/tokenizer.json", "golden.json", "golden.safetensors",
    "cola_dlm/cola_dit/optimizer.pt", "cola_dlm/cola_dit/old/model.safetensors",
)  # fmt: skip
NOTHING = "http://127.0.0.1:9"
ENCODER = (COMMANDS["encoder"], *FREE_PORTS[::2], "--model")


@pytest.fixture
def hub(tmp_path):
    """Has the tiny checkpoint with some files that nobody should fetch."""
    folder = tmp_path / "source"
    shutil.copytree(GOLDEN / "tiny_b4", folder)
    for name in NOT_WANTED:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"not wanted")
    (folder / LONG).write_bytes(b"about it\n" * 2_500_000)  # longer than what the library writes at a time
    made = Hub(folder)
    yield made
    made.close()


@pytest.fixture
def home(tmp_path):
    return tmp_path / "hf"


def environment(hub, home, **more):
    """Of a process."""
    return {**os.environ, "HF_ENDPOINT": f"{hub.url}/", "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", **more}


@pytest.fixture
def run(hub, home, monkeypatch):
    """Runs a command in this process, where the Hub's library has read its variables already."""

    def ran(command, *arguments, url=hub.url, home=home, offline=False):
        files = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        known = {"ENDPOINT": url, "HUGGINGFACE_CO_URL_TEMPLATE": files, "HF_HUB_DISABLE_XET": True}
        for name, value in {**known, "HF_HUB_CACHE": str(home / "hub"), "HF_HUB_OFFLINE": offline}.items():
            monkeypatch.setattr(constants, name, value)
        return invoked(command, *arguments)

    return ran


def failure(done, code=1):
    """The one line that says why, after the lines that say what is done."""
    assert done.exit_code == code, done.output
    assert isinstance(done.exception, SystemExit), done.exception
    assert "Traceback" not in done.stderr
    return done.stderr.strip().splitlines()[-1]


def files_asked(hub, since=0):
    return [path for method, path, _ in hub.asked[since:] if method == "GET" and "/resolve/" in path]


def test_a_checkpoint_arrives_whole_also_after_a_break_and_is_checked(hub, run, tmp_path):
    target, size = tmp_path / "model", len(hub.files[LONG])
    hub.cut[LONG] = size - 1000
    done = run(pull, REPOSITORY, "--dir", target)
    assert done.exit_code == 0, done.output
    assert f"colaserve up {target}" in done.stdout
    resumed = [asked for method, path, asked in hub.asked if method == "GET" and path.endswith(LONG) and asked]
    assert int(resumed[0].removeprefix("bytes=").partition("-")[0]) >= size // 2
    for name, data in hub.files.items():
        assert (target / name).is_file() is (name not in NOT_WANTED), name
        if name not in NOT_WANTED:
            assert (target / name).read_bytes() == data

    before = len(hub.asked)
    with (target / WEIGHTS).open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xff")
    check = (pull, REPOSITORY, "--dir", target, "--check")
    assert f"{target / WEIGHTS}: is not the Hub's" in failure(run(*check))
    (target / WEIGHTS).write_bytes(hub.files[WEIGHTS])
    (target / "tokenizer.json").unlink()
    assert "tokenizer.json: missing" in failure(run(*check))
    assert not files_asked(hub, before)


def test_up_takes_an_id_fetches_it_into_the_cache_and_is_called_by_it(hub, home, tmp_path):
    hub.token = "hf_secret"
    env = environment(hub, home, HF_TOKEN=hub.token)
    with started(tmp_path, "up", REPOSITORY, *FREE_PORTS, model=None, env=env) as running:
        assert served_names(running) == [REPOSITORY]
    assert f"someone/tiny at main is {COMMIT}" in (tmp_path / "log.txt").read_text()
    before = len(hub.asked)
    with started(tmp_path, "up", *FREE_PORTS, model=f"{REPOSITORY}@main", env=env | {"HF_HUB_OFFLINE": "1"}) as running:
        assert served_names(running) == [REPOSITORY]
    assert len(hub.asked) == before

    [snapshot] = (home / "hub/models--someone--tiny/snapshots").iterdir()
    assert (snapshot / WEIGHTS).is_symlink()
    (tmp_path / "link").symlink_to(snapshot)
    assert {Checkpoint.open(folder).name for folder in (snapshot, tmp_path / "link")} == {REPOSITORY}


def served_names(running):
    return [model["id"] for model in httpx.get(f"{running.http}/v1/models").json()["data"]]


def test_bytes_that_are_not_the_hubs_are_never_served(hub, run):
    hub.wrong[WEIGHTS] = hub.files[WEIGHTS][:-1] + b"\xff"
    for _ in range(2):
        line = failure(run(*ENCODER, REPOSITORY))
        assert f"is not the Hub's {WEIGHTS}" in line
    blob = line.split(": is not")[0].removeprefix("Error: ")
    os.unlink(blob)
    hub.wrong.clear()
    before = len(hub.asked)
    assert run(pull, REPOSITORY).exit_code == 0
    assert [path.partition(COMMIT)[2] for path in files_asked(hub, before)] == [f"/{WEIGHTS}"]


def test_a_signal_ends_a_role_that_fetches_at_once(hub, home, tmp_path):
    hub.stall = WEIGHTS
    with (tmp_path / "log.txt").open("w") as log:
        command = [sys.executable, *LAUNCH, "prior", *FREE_PORTS[::2], "--model", REPOSITORY]
        process = subprocess.Popen(command, stderr=log, env=environment(hub, home))
    try:
        wait_until(hub.stalled.is_set, 60)
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait()


def test_what_the_hub_does_not_have_or_say_is_said_in_one_line(hub, run):
    missing = failure(run(*ENCODER, "someone/else"), 2)
    assert "--model: someone/else is no folder here; someone/else: no such repository" in missing
    assert "someone/tiny has no revision 'v9'" in failure(run(*ENCODER, f"{REPOSITORY}@v9"), 2)
    assert "no repository's name" in failure(run(pull, "a/b/c/d"), 2)
    assert "a/b/c: no such folder" in failure(run(*ENCODER, "a/b/c"))
    assert "the Hub cannot be reached for someone/tiny" in failure(run(*ENCODER, REPOSITORY, url=NOTHING))
    assert "HF_HUB_OFFLINE" in failure(run(*ENCODER, REPOSITORY, offline=True))
    assert "no such folder" in failure(run(pull, REPOSITORY, "--check"))
    hub.files = {name: data for name, data in hub.files.items() if not name.endswith(".safetensors")}
    assert "is it a Cola-DLM checkpoint?" in failure(run(pull, REPOSITORY))
    assert "given twice" in failure(run(COMMANDS["up"], REPOSITORY, "--model", REPOSITORY), 2)


def test_a_failure_of_the_disk_is_not_said_to_be_the_hubs(hub, home, run):
    def bound():  # bytes of a file
        resource.setrlimit(resource.RLIMIT_FSIZE, (10**7, 10**7))

    command = [sys.executable, "-c", "from colaserve_services.pull import pull; pull()", REPOSITORY]
    full = subprocess.run(command, env=environment(hub, home), preexec_fn=bound, capture_output=True, timeout=100)
    assert (full.returncode, b"cannot be written: File too large" in full.stderr.splitlines()[-1]) == (2, True)
    home.parent.joinpath("file").write_text("")
    line = failure(run(pull, REPOSITORY, home=home.parent / "file"), 2)
    assert f"{home.parent / 'file'}" in line
    assert "cannot be written: Not a directory" in line


def test_a_repository_whose_files_do_not_make_a_model_is_refused(hub, run):
    hub.files[WEIGHTS] = hub.files["cola_dlm/cola_vae/model.safetensors"]
    assert "is missing" in failure(run(pull, REPOSITORY))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ByteDance-Seed/Cola-DLM", ("ByteDance-Seed/Cola-DLM", "main")),
        ("a/b@refs/pr/1", ("a/b", "refs/pr/1")),
        ("a/b@", None),
        ("model", None),
        ("./models/theirs", None),
        ("/models/theirs", None),
        ("a/b/c", None),
    ],
)
def test_an_id_is_an_owner_and_a_name_and_no_path(text, expected):
    assert HubId.parse(text) == expected
