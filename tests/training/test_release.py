"""What the trainer writes is what the released layout has, and what serving loads."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from colaserve_services.errors import CheckpointError
from colaserve_services.model.checkpoint import Checkpoint
from colaserve_services.model.loading import load
from colaserve_training.generate import Generator, Sampling
from colaserve_training.release import (
    OWN_IDS,
    load_dit,
    load_vae,
    new_dit,
    new_vae,
    special_ids,
    write_companions,
    write_generation_config,
    write_network,
)
from tests.training.conftest import vae_config

PARTS = ("cola_vae", "cola_dit")


def write(vae, dit, folder, dtype="float32"):
    write_network("vae", vae.config, vae.state_dict(), folder, dtype)
    write_network("dit", dit.config, dit.state_dict(), folder, dtype)


@pytest.mark.parametrize("part", PARTS)
def test_a_written_checkpoint_has_the_released_tensors_and_config_and_can_be_read_by_another_user(
    golden, tmp_path, part
):
    checkpoint = Checkpoint.open(golden.directory)
    write(new_vae(checkpoint.vae_config), new_dit(checkpoint.dit_config), tmp_path)
    folders = [folder / "cola_dlm" / part for folder in (tmp_path, golden.directory)]
    ours, theirs = (load_file(folder / "model.safetensors") for folder in folders)
    assert {k: (v.shape, v.dtype) for k, v in ours.items()} == {k: (v.shape, v.dtype) for k, v in theirs.items()}
    config, released = (json.loads((folder / "config.json").read_text()) for folder in folders)
    assert config == {key: value for key, value in released.items() if key != "transformers_version"}
    assert (folders[0] / "model.safetensors").stat().st_mode & 0o777 == 0o644


def test_reading_and_writing_changes_no_weight(golden, tmp_path):
    write(load_vae(golden.directory), load_dit(golden.directory), tmp_path)
    for part in PARTS:
        path = f"cola_dlm/{part}/model.safetensors"
        ours, theirs = load_file(tmp_path / path), load_file(golden.directory / path)
        assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_a_loaded_model_trains_everything_but_the_table_of_frequencies(golden):
    dit = load_dit(golden.directory)
    fixed = {name for name, value in dit.named_parameters() if not value.requires_grad}
    assert fixed == {name for name, _ in dit.named_parameters() if name.endswith(".freqs")}
    assert all(value.requires_grad for value in load_vae(golden.directory).parameters())


def test_bfloat16_weights_are_half_the_size_and_are_served(tmp_path, golden, words):
    write(load_vae(golden.directory), load_dit(golden.directory), tmp_path, "bfloat16")
    write_companions(golden.directory, tmp_path, words, OWN_IDS)
    checkpoint = Checkpoint.open(tmp_path)
    assert {entry.dtype for entry in checkpoint.vae.entries.values()} == {"BF16"}
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).token_to_id(config["eos_token"]) == OWN_IDS.end_of_text
    load(checkpoint, "prior", torch.device("cpu"), torch.float32)


def test_the_in_process_generator_writes_the_recorded_tokens(golden):
    tokenizer = Tokenizer.from_file(str(golden.directory / "tokenizer.json"))
    vae, dit = load_vae(golden.directory), load_dit(golden.directory)
    for case in golden.meta["cases"]:
        asked = case["params"]
        sampling = Sampling(
            steps=asked["timestep_num"], guidance=asked["guidance_scale"], max_new_tokens=asked["max_new_tokens"],
            repetition_penalty=asked.get("repetition_penalty", 1.1), base_seed=case["noise_base_seed"],
            end_ids=frozenset(),
        )  # fmt: skip
        ids = [tokenizer.encode(prompt).ids for prompt in case["prompts"][:2]]
        for new, recorded in zip(Generator(vae, dit, tokenizer, sampling).tokens(ids), case["tokens"][:2], strict=True):
            length = min(len(new), len(recorded))
            assert length
            assert new[:length] == recorded[:length]


def test_special_ids_are_the_checkpoints_own(tmp_path, words):
    assert special_ids(tmp_path, words).pad == 2
    write_generation_config(tmp_path, steps=4)
    assert special_ids(tmp_path, words).end_of_text == 0
    (tmp_path / "generation_config.json").write_text('{"pad_token_id": 7}')
    assert special_ids(tmp_path, words).pad == 7


def test_a_vae_that_lacks_a_tensor_is_one_clear_line(tmp_path):
    write_network("vae", vae_config(), new_vae(vae_config()).state_dict(), tmp_path)
    config = tmp_path / "cola_dlm" / "cola_vae" / "config.json"
    config.write_text(config.read_text().replace('"encoder_num_blocks": 1', '"encoder_num_blocks": 2'))
    with pytest.raises(CheckpointError, match="Missing key"):
        load_vae(tmp_path)
