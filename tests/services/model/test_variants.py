"""Every configuration of MODEL.md gives what the plain float64 implementation gives."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from colaserve_services.model.attention import RaggedAttention, Segment
from colaserve_services.model.checkpoint import Checkpoint
from tests.services.model import reference
from tests.services.model.checkpoints import write_checkpoint

CPU, TOLERANCE = torch.device("cpu"), 3e-6

VAE_VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "patches_of_2": {"patch_size": 2},
    "patches_of_3_strictly_causal": {"patch_size": 3, "block_size": 1},
    "pre_norm": {"post_norm": False},
    "pre_norm_without_affine": {"post_norm": False, "layer_norm_affine": False},
    "no_qk_norm": {"qk_norm": False},
    "qk_norm_without_affine": {"qk_norm_affine": False},
    "qk_bias": {"qk_bias": True},
    "clipped": {"clip_qkv": 0.3},
    "gelu": {"act": "gelu"},
    "silu": {"act": "silu"},
    "no_variation": {"use_variation": False, "encoder_last_ln": False},
    "no_last_norm": {"encoder_last_ln": False},
    "no_bias": {"bias": False},
    "scaled": {"scaling_factor": 1.7, "shifting_factor": 0.25},
    "large_eps": {"layer_norm_eps": 0.1},
    "other_theta": {"rope_theta": 100.0},
    "low_precision_rotary": {"rope_full_precision": False},
}
DIT_VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "qk_bias": {"qk_bias": True},
    "large_eps": {"norm_eps": 0.1},
    "no_rotary": {"rope_dim": 0},
    "whole_head_rotary": {"rope_dim": 8},
    "wide": {"expand_ratio": 4, "heads": 2, "head_dim": 16, "emb_dim": 40},
    "blocks_of_8": {"block_size": 8},
}


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got.double() - expected).norm() / expected.norm()).item()


def weights(directory: Path, part: str) -> reference.Weights:
    stored = load_file(directory / "cola_dlm" / part / "model.safetensors")
    return {name: tensor.double() for name, tensor in stored.items()}


@pytest.mark.parametrize("variant", VAE_VARIANTS)
@torch.inference_mode()
def test_vae_of_any_configuration_agrees_with_the_reference(variant: str, tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model", vae=VAE_VARIANTS[variant])
    checkpoint, w = Checkpoint.open(directory), weights(directory, "cola_vae")
    config, n = checkpoint.vae_config, 12
    attend = RaggedAttention([Segment(n)], config.block_size, CPU)
    positions = torch.arange(n)

    encoder = checkpoint.load_encoder(CPU, torch.float32)
    ids = torch.randint(0, 512, (n * config.patch_size,), generator=torch.Generator().manual_seed(3))
    mean, logvar = encoder(ids, positions, attend)
    expected_mean, expected_logvar = reference.encode(w, config, ids)
    assert relative(encoder.normalise(mean), expected_mean) < TOLERANCE
    assert (logvar is None) == (expected_logvar is None)
    if logvar is not None and expected_logvar is not None:
        assert relative(logvar, expected_logvar) < TOLERANCE

    decoder = checkpoint.load_decoder(CPU, torch.float32)
    latents = torch.randn(n, 8, generator=torch.Generator().manual_seed(4))
    assert relative(decoder(latents, positions, attend), reference.decode(w, config, latents.double())) < TOLERANCE


@pytest.mark.parametrize("variant", DIT_VARIANTS)
@torch.inference_mode()
def test_dit_of_any_configuration_agrees_with_the_reference(variant: str, tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model", dit=DIT_VARIANTS[variant])
    checkpoint, w = Checkpoint.open(directory), weights(directory, "cola_dit")
    dit, n = checkpoint.load_prior(CPU, torch.float32), 16
    generator = torch.Generator().manual_seed(5)
    z, t = torch.randn(n, 8, generator=generator), 1000 * torch.rand(n, generator=generator)
    positions = torch.arange(n) + 7 * checkpoint.dit_config.block_size
    got = dit(z, t, positions, RaggedAttention([Segment(n)], checkpoint.dit_config.block_size, CPU))
    expected = reference.velocity(w, checkpoint.dit_config, z.double(), t.double(), positions)
    assert relative(got, expected) < TOLERANCE
