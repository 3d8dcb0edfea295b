"""Two processes under torchrun (gloo, CPU) compute what one does."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from colaserve_services.errors import UsageError
from colaserve_training.demo import load_generator
from colaserve_training.generate import Sampling
from colaserve_training.parallel import MODES, started
from colaserve_training.release import OWN_IDS, new_vae, write_companions, write_network
from tests.training.conftest import vae_config
from tests.training.parallel_job import main
from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]
DIT = "cola_dlm/cola_dit/model.safetensors"


def command(folder: Path, *arguments: object) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    # torchrun leaves a folder for logs behind
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}
    words += map(str, arguments)
    return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def output_of(process: subprocess.Popen[str], code: int = 0) -> str:
    with process:
        try:
            output, _ = process.communicate(timeout=280)
        finally:
            process.kill()
    assert process.returncode == code, output[:4000]  # the processes' own words come before torchrun's
    return output


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    main(folder, "ddp")
    return folder


def assert_equal(one: Path, two: Path) -> None:
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    weights, others = (load_file(folder / "weights.safetensors") for folder in (one, two))
    assert weights.keys() == others.keys()
    for name, value in weights.items():
        torch.testing.assert_close(others[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("mode", MODES)
def test_two_processes_equal_one(alone, tmp_path, mode):
    output_of(command(tmp_path, "tests.training.parallel_job", tmp_path, mode))
    assert_equal(alone, tmp_path)


@pytest.fixture
def vae(tmp_path: Path, words: Tokenizer) -> Path:
    """The output of `train vae`, tiny, two tokens a latent."""
    folder = tmp_path / "vae"
    torch.manual_seed(0)
    model = new_vae(replace(vae_config(words.get_vocab_size()), patch_size=2))
    write_network("vae", model.config, model.state_dict(), folder)
    write_companions(folder, folder, words, OWN_IDS)
    return folder


@pytest.mark.timeout(600)
def test_two_processes_train_stop_and_continue(vae, tmp_path):
    """With shards, through the command line."""
    text, out, steps = tmp_path / "text.txt", tmp_path / "out", 24
    text.write_text("\n\n".join(f"the river runs {k}" for k in range(40)))
    options = ["colaserve_client", "train", "prior", "--vae", vae, "--data", text, "--dim", 32, "--layers", 2]
    options += ["--parallel", "fsdp", "--prompt", "the", "--out", out]
    options += ["--rows", 4, "--steps", steps, "--save-every", 4, "--check-every", steps, "--held-out", 0.2]
    state, first = out / "run" / "state", command(tmp_path, *options)
    wait_until(lambda: first.poll() is not None or list(state.glob("step-*")), 120)
    first.send_signal(signal.SIGTERM)
    assert "the same command with --resume continues from there" in output_of(first, 1)
    assert not (out / "cola_dlm").exists()
    second = output_of(command(tmp_path, *options, "--resume"))
    assert f"prior: resuming from {state}" in second
    assert f"  step {steps}: 'the" in second
    assert "validation" in second
    assert len(losses(out / "run")) == steps
    averaged = load_file(state / f"step-{steps:08d}" / "tensors.safetensors")
    for name, value in load_file(out / DIT).items():
        assert name.endswith(".freqs") or torch.equal(value, averaged[f"ema/dit.{name}"])
    assert all(load_generator(out, Sampling(max_new_tokens=9)).texts(["a", "the river"]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_an_absent_device_is_named():
    with pytest.raises(UsageError, match="device: got cuda, but this torch sees no CUDA device"), started("cuda"):
        pass
