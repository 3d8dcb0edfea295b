"""`colaserve train`, from tokenizer to fine-tuned checkpoint, at tiny size."""

import json
import os
import re
import shutil
import signal
import sys
from importlib.resources import files

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from colaserve_services.model.checkpoint import Checkpoint
from colaserve_training.commands import train
from colaserve_training.demo import load_generator
from colaserve_training.generate import Sampling
from tests.waiting import when

TOKENIZER = str(files("colaserve_services").joinpath("demo", "tokenizer.json"))
TINY = ["--rows", "8", "--threads", "1", "--save-every", "0", "--context", "64"]


def run(*arguments, code=0):
    result = CliRunner().invoke(train, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny checkpoint made by the commands, a few steps each."""
    folder = tmp_path_factory.mktemp("base")
    text = folder / "text.txt"
    text.write_text("the capital of France is Paris\n\na river runs through it\n\n" * 20)
    run("tokenizer", "--data", text, "--vocab-size", 280, "--out", folder / "tok")
    words = ["--data", text, *TINY]
    run("vae", *words, "--tokenizer", folder / "tok" / "tokenizer.json", "--dim", 32, "--blocks", 1, "--steps", 3,
        "--out", folder / "vae")  # fmt: skip
    output = run("prior", *words, "--vae", folder / "vae", "--dim", 32, "--layers", 1, "--steps", 3,
                 "--out", folder / "model")  # fmt: skip
    assert "learning rate 0.002\n" in output
    return folder / "model"


def weights(folder, part):
    return load_file(folder / "cola_dlm" / part / "model.safetensors")


def same(one, two, part):
    return all(torch.equal(value, weights(two, part)[name]) for name, value in weights(one, part).items())


def test_a_checkpoint_made_by_the_commands_is_served_and_writes(base):
    defaults = Checkpoint.open(base).defaults
    assert (defaults.eos_token_id, defaults.pad_token_id) == (0, 2)
    assert defaults.requests == {"steps": 16, "guidance_scale": 2, "max_new_tokens": 64}
    assert len(load_generator(base, Sampling(steps=2, max_new_tokens=5)).texts(["the capital"])) == 1
    assert (base / "run" / "loss.png").exists()


@pytest.mark.parametrize(
    ("verb", "changed"),
    [(["prior"], {"cola_dit"}), (["prior", "--joint"], {"cola_vae", "cola_dit"}), (["vae"], {"cola_vae"})],
)
def test_fine_tuning_changes_the_networks_that_it_trains_and_no_other(base, tmp_path, verb, changed):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps({"prompt": f"say {k}", "response": " river"}) + "\n" for k in range(8)))
    output = run(*verb, "--init", base, "--data", pairs, *TINY, "--steps", 2, "--out", tmp_path / "tuned")
    assert "data: 8 rows" in output
    assert "learning rate 0.0002, for fine-tuning" in output
    assert {part for part in ("cola_vae", "cola_dit") if not same(base, tmp_path / "tuned", part)} == changed
    assert (tmp_path / "tuned" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


def test_the_bundled_checkpoint_is_fine_tuned_by_its_name(tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"prompt": "Question: Who are you? Answer:", "response": " A small model."}) + "\n")
    data = ["--data", f"{pairs}=1", "--data", "demo=3"]
    output = run("prior", "--init", "bundled", *data, *TINY, "--steps", 1, "--check-every", 1, "--prompt", "Question:",
                 "--lr", 0.01, "--out", tmp_path / "tuned")  # fmt: skip
    assert "learning rate 0.01, for fine-tuning" in output
    assert "  step 1: 'Question:" in output
    assert Checkpoint.open(tmp_path / "tuned").defaults.chat_frame == "User: {prompt}\nAssistant:"


def test_a_vae_of_several_tokens_a_latent_gets_its_prior(base, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    lines = [{"prompt": "the river"[:k], "response": " runs"} for k in range(2, 9)] + [{"text": "a river runs through"}]
    pairs.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ["--data", pairs, *TINY, "--steps", 2, "--check-every", 1, "--held-out", 0.3]
    run("vae", "--tokenizer", base / "tokenizer.json", "--dim", 32, "--patch-size", 3, *options,
        "--out", tmp_path / "vae")  # fmt: skip
    for joint in ([], ["--joint"]):
        run("prior", "--vae", tmp_path / "vae", "--dim", 32, "--layers", 1, *joint, *options,
            "--out", tmp_path / "model", "--overwrite")  # fmt: skip
    assert len(load_generator(tmp_path / "model", Sampling(steps=2, max_new_tokens=5)).texts(["the capital"])) == 1


def test_a_run_without_matplotlib_says_so_first_and_writes_its_checkpoint(base, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    output = run("vae", "--init", base, *TINY, "--steps", 2, "--out", tmp_path / "out")
    assert output.index("matplotlib is not installed") < output.index("vae 1/2")
    assert not same(base, tmp_path / "out", "cola_vae")


def test_a_finished_checkpoint_is_replaced_only_when_that_is_asked_for(base, tmp_path):
    shutil.copytree(base, tmp_path / "out")
    again = ["prior", "--init", base, *TINY, "--steps", 1, "--out", tmp_path / "out"]
    for more in ([], ["--resume"]):
        assert "holds a checkpoint; name another --out, or replace it with --overwrite" in run(*again, *more, code=1)
    assert same(base, tmp_path / "out", "cola_dit")
    run(*again, "--overwrite")
    assert not same(base, tmp_path / "out", "cola_dit")
    assert "holds a tokenizer" in run("tokenizer", "--out", tmp_path / "out", code=1)


@pytest.mark.timeout(300)
def test_ctrl_c_saves_a_state_that_is_neither_overwritten_nor_ignored(base, tmp_path):
    out = tmp_path / "out"
    long = ["prior", "--init", base, *TINY, "--steps", 60, "--out", out]
    metrics = out / "run" / "metrics.jsonl"
    with when(lambda: metrics.exists() and metrics.stat().st_size, lambda: os.kill(os.getpid(), signal.SIGINT)):
        output = run(*long, code=130)
    step, path = re.search(r"Error: stopped after step (\d+) of 60; saved as (\S+);", output).groups()
    assert "the same command with --resume continues from there" in output
    assert not (out / "cola_dlm").exists()
    assert "a state of an earlier run; continue it with --resume" in run(*long, code=1)
    assert f"prior: resuming from {path} (step {step} of 60)" in run(*long, "--resume")
    Checkpoint.open(out)
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == list(range(60))


def test_a_checkpoint_that_could_not_be_written_is_written_by_resuming(base, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / ".draft").touch()  # in the way
    train_it = ["prior", "--init", base, *TINY, "--steps", 2, "--out", out]
    assert "with --resume writes it" in run(*train_it, code=1)
    (out / ".draft").unlink()
    assert "(step 2 of 2)" in run(*train_it, "--resume")
    Checkpoint.open(out)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["prior", "--out", "x"], "--init or --vae: expected exactly one"),
        (["vae", "--out", "x"], "--init or --tokenizer: expected exactly one"),
        (["vae", "--out", "x", "--tokenizer", "none.json"], "none.json: no such tokenizer; `train tokenizer`"),
        (["prior", "--out", "x", "--init", "none"], "none"),
        (["vae", "--out", "x", "--tokenizer", TOKENIZER, "--dim", "48"], "--dim: got 48, expected a multiple of 32"),
        (["prior", "--out", "x", "--init", "bundled", "--data", "a=0"], "a=0: got weight 0, expected a number above 0"),
        (
            ["prior", "--out", "x", "--init", "bundled", "--data", "demo", "--data", "a=1"],
            "--data demo: no weight; give each data set one",
        ),
        (["tokenizer", "--out", "x", "--vocab-size", "10"], "vocab_size: got 10, expected at least 259"),
        (["tokenizer", "--out", "x", "--data", "none.txt"], "none.txt: No such file"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(arguments, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    output = run(*arguments, code=1)
    assert output.startswith("Error: ")
    assert line in output
    assert len(output.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "option",
    ["--steps=0", "--rows=-1", "--steps=100000000000000000000", "--seed=18446744073709551616", "--seed=-1",
     "--micro-batches=0", "--ema=1.0", "--lr=-1", "--lr=0", "--clip=-1", "--save-every=-1", "--held-out=0.6"],
)  # fmt: skip
def test_a_value_that_does_not_fit_is_a_wrong_use(option, tmp_path):
    output = run("prior", "--init", "bundled", "--out", tmp_path / "x", option, code=2)
    assert f"Error: Invalid value for '{option.partition('=')[0]}'" in output
