"""Fetching a checkpoint from a hub: it arrives whole, also after a break, and what is wrong is one line."""

import shutil

import pytest
from click.testing import CliRunner

from colaserve_services.pull import pull as command
from colaserve_services.pull import wanted
from tests.conftest import GOLDEN
from tests.services.pull.hub import REPOSITORY, Hub

LONG = "README.md"
WEIGHTS = "cola_dlm/cola_dit/model.safetensors"


@pytest.fixture
def source(tmp_path):
    """The tiny checkpoint with some files that nobody should fetch."""
    folder = tmp_path / "source"
    shutil.copytree(GOLDEN / "tiny_b4", folder)
    for name in ("pytorch_model.bin", "cola_dlm/cola_dit/optimizer.pt", "run.py"):
        (folder / name).write_bytes(b"not wanted")
    (folder / LONG).write_bytes(b"about it\n" * 2_500_000)  # longer than what the library writes at a time
    for name in ("golden.json", "golden.safetensors"):
        (folder / name).unlink()
    return folder


@pytest.fixture
def hub(source):
    made = Hub(source)
    yield made
    made.close()


def pull(hub, target, *arguments, repository=REPOSITORY):
    environment = {"HF_ENDPOINT": hub if isinstance(hub, str) else hub.url, "HF_HOME": str(target.parent / "hf")}
    return CliRunner().invoke(command, [repository, "--dir", str(target), *arguments], env=environment)


def failure(done, code=1):
    """The one line that says why, after the line that says what is fetched."""
    assert done.exit_code == code, done.output
    assert isinstance(done.exception, SystemExit)
    return done.stderr.strip().splitlines()[-1]


def test_a_checkpoint_arrives_whole_also_after_a_break_and_is_checked(hub, tmp_path):
    target, size = tmp_path / "model", len(hub.files[LONG])
    hub.cut[LONG] = size - 1000
    first = pull(hub, target)
    if first.exit_code:  # the client library may also go on by itself
        failure(first)
        assert pull(hub, target).exit_code == 0
    ranges = [asked for method, path, asked in hub.asked if method == "GET" and path.endswith(LONG)]
    resumed = [int(asked.removeprefix("bytes=").partition("-")[0]) for asked in ranges if asked]
    assert resumed
    assert resumed[0] >= size // 2
    for name, data in hub.files.items():
        assert (target / name).is_file() is wanted(name), name
        if wanted(name):
            assert (target / name).read_bytes() == data

    before = len(hub.asked)
    again = pull(hub, target)
    assert again.exit_code == 0
    assert "colaserve up --model" in again.stdout
    assert not [path for method, path, _ in hub.asked[before:] if method == "GET" and "resolve" in path]

    with (target / WEIGHTS).open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xff")
    assert f"{target / WEIGHTS}: is not the Hub's file" in failure(pull(hub, target, "--check"))
    (target / "tokenizer.json").write_text("{}")
    (target / WEIGHTS).write_bytes(hub.files[WEIGHTS])
    assert "tokenizer.json: is not the Hub's file" in failure(pull(hub, target, "--check"))
    (target / "tokenizer.json").unlink()
    assert "tokenizer.json: missing" in failure(pull(hub, target, "--check"))


def test_a_repository_whose_files_do_not_make_a_model_is_refused(source, tmp_path):
    shutil.copy(source / "cola_dlm/cola_vae/model.safetensors", source / WEIGHTS)
    hub = Hub(source)
    try:
        assert "is missing" in failure(pull(hub, tmp_path / "model"))
    finally:
        hub.close()


def test_what_is_not_there_is_said_in_one_line(hub, tmp_path):
    target = tmp_path / "model"
    assert "no such repository" in failure(pull(hub, target, repository="someone/else"), 2)
    assert "has no 'v9'" in failure(pull(hub, target, "--revision", "v9"), 2)
    assert "no repository's name" in failure(pull(hub, target, repository="a/b/c/d"), 2)
    assert "cannot be reached" in failure(pull("http://127.0.0.1:9", target))
    assert "model: no such folder" in failure(pull(hub, target, "--check"))
    assert not target.exists()


@pytest.mark.parametrize(
    ("path", "is_wanted"),
    [
        ("tokenizer.json", True),
        ("cola_dlm/cola_vae/config.json", True),
        ("cola_dlm/cola_dit/model-00001-of-00004.safetensors", True),
        ("cola_dlm/cola_dit/model.safetensors.index.json", True),
        ("cola_dlm/cola_dit/pytorch_model.bin", False),
        ("cola_dlm/cola_dit/old/model.safetensors", False),
        ("examples/tokenizer.json", False),
    ],
)
def test_only_what_is_served_is_fetched(path, is_wanted):
    assert wanted(path) is is_wanted
