"""Checkpoints made for benchmarks are served like any other."""

import dataclasses
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from colaserve_bench.checkpoint import PRESETS, make_checkpoint, write_tokenizer
from colaserve_bench.commands import bench
from colaserve_services.model.checkpoint import Checkpoint
from colaserve_services.model.loading import STAGES, load

CPU = torch.device("cpu")


def files(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def test_the_same_seed_writes_the_same_finite_weights_and_another_one_others(tiny_model: Path, tmp_path: Path) -> None:
    make_checkpoint(PRESETS["tiny"], tmp_path / "again")
    assert files(tmp_path / "again") == files(tiny_model)
    make_checkpoint(PRESETS["tiny"], tmp_path / "other", seed=1)
    assert Checkpoint.open(tmp_path / "other").space != Checkpoint.open(tiny_model).space
    for stage in STAGES:
        model = load(Checkpoint.open(tiny_model), stage, CPU, torch.float32)
        assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 0.0), ("bfloat16", 1e-2)])
def test_shards_of_any_dtype_hold_what_one_file_would(tiny_model, tmp_path, dtype, tolerance):
    make_checkpoint(dataclasses.replace(PRESETS["tiny"], shard_bytes=100_000), tmp_path / "sharded", dtype)
    assert len(list((tmp_path / "sharded").rglob("model-0000*.safetensors"))) >= 4
    whole, parts = (load(Checkpoint.open(d), "prior", CPU, torch.float32) for d in (tiny_model, tmp_path / "sharded"))
    for got, expected in zip(parts.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=0.1 * tolerance)


def test_a_folder_that_holds_a_checkpoint_is_left_alone(tiny_model: Path) -> None:
    result = CliRunner().invoke(bench, ["make-checkpoint", "--preset", "tiny", str(tiny_model)])
    assert result.exit_code == 2
    assert result.output.startswith("Error: ")
    assert "already" in result.output


@pytest.mark.parametrize("name", ["tiny", "released"])
def test_the_tokenizer_has_the_right_ids_and_each_has_its_own_text(name: str, tmp_path: Path) -> None:
    preset = PRESETS[name]
    write_tokenizer(tmp_path / "tokenizer.json", preset.vae.vocab_size, preset.special_ids)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    size = tokenizer.get_vocab_size()
    assert size == preset.vae.vocab_size
    assert len({tokenizer.id_to_token(i) for i in range(size)}) == size
    for text, id_ in preset.special_ids.items():
        assert tokenizer.encode(f"a{text}b").ids[1] == id_
    sample = [*range(0, size, 97), size - 1]
    assert all(tokenizer.decode([i], skip_special_tokens=False) for i in sample)


@settings(max_examples=50, deadline=None)
@given(text=st.text(max_size=60))
def test_any_text_survives_the_tokenizer(tiny_model: Path, text: str) -> None:
    tokenizer = Tokenizer.from_file(str(tiny_model / "tokenizer.json"))
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
