"""Sizes to train from nothing."""

import pytest

from colaserve_services.errors import UsageError
from colaserve_services.model.config import DiTConfig, TextVAEConfig, check_pair
from colaserve_training.presets import PRESETS, full_rate
from colaserve_training.release import checkpoint_folder, load_vae
from tests.training.conftest import vae_config


@pytest.mark.parametrize("name", PRESETS)
def test_both_networks_of_a_preset_fit_each_other(name):
    vae, dit = PRESETS[name].vae_config(300), PRESETS[name].dit_config()
    check_pair(vae, dit)
    assert vae.dim == vae.num_heads * vae.head_dim
    assert dit.txt_dim == dit.heads * dit.head_dim


def test_the_released_preset_is_the_released_model_and_the_demos_is_the_bundled_one():
    released, bundled = PRESETS["released"], load_vae(checkpoint_folder("bundled")).config
    assert (released.vae, released.dit) == (TextVAEConfig(), DiTConfig())
    assert PRESETS["demo"].vae_config(bundled.vocab_size) == bundled


def test_values_that_are_given_win_and_heads_keep_their_width():
    vae = PRESETS["demo"].vae_config(300, dim=64, blocks=1, block_size=4, patch_size=2)
    assert (vae.dim, vae.ffn_dim, vae.num_heads, vae.encoder_num_blocks, vae.decoder_num_blocks) == (64, 256, 2, 1, 1)
    assert (vae.block_size, vae.patch_size, vae.vocab_size) == (4, 2, 300)
    dit = PRESETS["small"].dit_config(latent_dim=8, dim=128, layers=3, block_size=16)
    assert (dit.txt_dim, dit.emb_dim, dit.heads, dit.num_layers, dit.block_size) == (128, 128, 2, 3, 16)
    assert (dit.txt_in_channels, dit.txt_out_channels) == (8, 8)
    with pytest.raises(UsageError, match="--dim: got 100, expected a multiple of 32"):
        PRESETS["demo"].vae_config(300, dim=100)


def test_wide_networks_and_fine_tuning_take_smaller_rates():
    assert full_rate(vae_config().dim, False) == full_rate(192, False) == 2e-3
    assert full_rate(1920, False) == pytest.approx(2e-4)
    assert full_rate(1920, True) == pytest.approx(2e-5)
