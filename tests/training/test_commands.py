"""`colaserve train`, from tokenizer to fine-tuned checkpoint, at tiny size."""

import json

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from colaserve_services.model.checkpoint import Checkpoint
from colaserve_services.training.commands import train
from colaserve_services.training.demo import load_generator
from colaserve_services.training.generate import Sampling

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
    run("prior", *words, "--vae", folder / "vae", "--dim", 32, "--layers", 1, "--steps", 3, "--out", folder / "model")
    return folder / "model"


def weights(folder, part):
    return load_file(folder / "cola_dlm" / part / "model.safetensors")


def same(one, two, part):
    return all(torch.equal(value, weights(two, part)[name]) for name, value in weights(one, part).items())


def test_a_checkpoint_made_by_the_commands_is_served_and_writes(base):
    Checkpoint.open(base)
    (text,) = load_generator(base, Sampling(steps=2, max_new_tokens=5)).texts(["the capital"])
    assert isinstance(text, str)
    assert (base / "run" / "loss.png").exists()


def test_pairs_fine_tune_the_prior_and_leave_the_vae(base, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps({"prompt": f"say {k}", "response": " river"}) + "\n" for k in range(8)))
    output = run("prior", "--init", base, "--data", pairs, *TINY, "--steps", 2, "--out", tmp_path / "tuned")
    assert "data: 8 rows" in output
    assert same(base, tmp_path / "tuned", "cola_vae")
    assert not same(base, tmp_path / "tuned", "cola_dit")
    assert (tmp_path / "tuned" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


def test_joint_training_changes_both(base, tmp_path):
    text = tmp_path / "more.txt"
    text.write_text("another river\n\nanother capital\n")
    run("prior", "--init", base, "--joint", "--data", text, *TINY, "--steps", 2, "--out", tmp_path / "tuned")
    assert not same(base, tmp_path / "tuned", "cola_vae")
    assert not same(base, tmp_path / "tuned", "cola_dit")


def test_the_vae_is_fine_tuned_alone(base, tmp_path):
    text = tmp_path / "more.txt"
    text.write_text("another river\n")
    run("vae", "--init", base, "--data", text, *TINY, "--steps", 2, "--out", tmp_path / "tuned")
    assert not same(base, tmp_path / "tuned", "cola_vae")
    assert same(base, tmp_path / "tuned", "cola_dit")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["prior", "--out", "x"], "--init or --vae: expected exactly one"),
        (["vae", "--out", "x"], "--init or --tokenizer: expected exactly one"),
        (
            ["vae", "--out", "x", "--tokenizer", "none.json"],
            "none.json: no such tokenizer; `train tokenizer`",
        ),
        (["prior", "--out", "x", "--init", "none"], "none"),
        (["prior", "--out", "x", "--init", "none", "--steps", "0"], "steps: got 0, expected at least 1"),
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
