"""Every configuration of MODEL.md gives what the plain float64 implementation gives, and what was recorded."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from colaserve_services.model.checkpoint import Checkpoint
from colaserve_services.model.config import TextVAEConfig
from colaserve_services.model.layers import Attend, block_causal_mask, masked_attention
from colaserve_services.model.loading import load
from colaserve_services.model.text_vae import TextVAE, TextVAEDecoder, TextVAEEncoder
from tests.conftest import Golden
from tests.services.model import reference
from tests.services.model.checkpoints import TINY_VAE, draw, write_checkpoint

CPU, TOLERANCE = torch.device("cpu"), 3e-6  # relative; 1e-4 would not tell a wrong epsilon or the wrong GELU

VAE_VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "no_bias": {"bias": False},
    "everything_off": {
        "bias": False,
        "qk_norm": False,
        "post_norm": False,
        "act": "silu",
        "use_variation": False,
        "encoder_last_ln": False,
        "clip_qkv": 0.3,
        "patch_size": 2,
    },
    "patches_of_3_strictly_causal": {"patch_size": 3, "block_size": 1},
    "pre_norm_without_affine": {"post_norm": False, "layer_norm_affine": False},
    "qk_norm_without_affine": {"qk_norm_affine": False},
    "scaled": {"scaling_factor": 1.7, "shifting_factor": 0.25},
    "large_eps": {"layer_norm_eps": 0.1},
    "other_theta": {"rope_theta": 100.0},
    "low_precision_rotary": {"rope_full_precision": False},
}
SMALL: dict[str, Any] = {
    "vocab_size": 24, "encoder_num_blocks": 1, "decoder_num_blocks": 1, "dim": 16, "ffn_dim": 24, "num_heads": 2,
}  # fmt: skip
CORNERS: dict[str, tuple[Any, ...]] = {
    "bias": (True, False), "qk_bias": (True, False), "qk_norm": (True, False), "post_norm": (True, False),
    "use_variation": (True, False), "encoder_last_ln": (True, False), "clip_qkv": (None, 0.3),
}  # fmt: skip
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


def attending(positions: int, block_size: int) -> Attend:
    """Of one whole sequence."""
    places = torch.arange(positions)
    return masked_attention(block_causal_mask(places, places, block_size))


def weights(directory: Path, part: str) -> reference.Weights:
    stored = load_file(directory / "cola_dlm" / part / "model.safetensors")
    return {name: tensor.double() for name, tensor in stored.items()}


@pytest.mark.parametrize("variant", VAE_VARIANTS)
def test_vae_of_any_configuration_agrees_with_the_reference(variant: str, tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model", vae=VAE_VARIANTS[variant])
    checkpoint, w = Checkpoint.open(directory), weights(directory, "cola_vae")
    check_encoder(checkpoint.vae_config, load(checkpoint, "encoder", CPU, torch.float32), w)
    check_decoder(checkpoint.vae_config, load(checkpoint, "decoder", CPU, torch.float32), w)


@pytest.mark.parametrize("patch_size", [1, 2, 3])
@pytest.mark.parametrize("act", ["swiglu", "gelu", "silu"])
def test_every_combination_of_what_a_vae_may_leave_out_agrees_with_the_reference(act: str, patch_size: int) -> None:
    """It takes the tensors that MODEL.md lists, no other; from files they are read by the same names."""
    for values in product(*CORNERS.values()):
        chosen = dict(zip(CORNERS, values, strict=True))
        config = TextVAEConfig(**TINY_VAE | SMALL | chosen, act=act, patch_size=patch_size)  # type: ignore[arg-type]
        vae, tensors = TextVAE(config), draw(reference.vae_tensors(config), 1)
        vae.load_state_dict(tensors)
        w = {name: tensor.double() for name, tensor in tensors.items()}
        check_encoder(config, vae.encoder, w)
        if config.use_variation and config.encoder_last_ln:  # which are nothing to the decoder
            check_decoder(config, vae.decoder, w)


@torch.inference_mode()
def check_encoder(config: TextVAEConfig, encoder: TextVAEEncoder, w: reference.Weights) -> None:
    """It gives what the reference gives with the same weights."""
    n = 2 * config.block_size + 1
    attend = attending(n, config.block_size)
    ids = torch.randint(0, config.vocab_size, (n * config.patch_size,), generator=torch.Generator().manual_seed(3))
    mean, logvar = encoder(ids, torch.arange(n), attend)
    expected_mean, expected_logvar = reference.encode(w, config, ids)
    assert relative(encoder.normalise(mean), expected_mean) < TOLERANCE, config
    assert (logvar is None) == (expected_logvar is None), config
    if logvar is not None and expected_logvar is not None:
        assert relative(logvar, expected_logvar) < TOLERANCE, config


@torch.inference_mode()
def check_decoder(config: TextVAEConfig, decoder: TextVAEDecoder, w: reference.Weights) -> None:
    """It gives what the reference gives with the same weights."""
    n = 2 * config.block_size + 1
    attend = attending(n, config.block_size)
    latents = torch.randn(n, 8, generator=torch.Generator().manual_seed(4))
    logits = decoder(latents, torch.arange(n), attend)
    assert relative(logits, reference.decode(w, config, latents.double())) < TOLERANCE, config


@pytest.mark.parametrize("variant", DIT_VARIANTS)
@torch.inference_mode()
def test_dit_of_any_configuration_agrees_with_the_reference(variant: str, tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model", dit=DIT_VARIANTS[variant])
    checkpoint, w = Checkpoint.open(directory), weights(directory, "cola_dit")
    dit, n = load(checkpoint, "prior", CPU, torch.float32), 16
    generator = torch.Generator().manual_seed(5)
    z, t = torch.randn(n, 8, generator=generator), 1000 * torch.rand(n, generator=generator)
    positions = torch.arange(n) + 7 * checkpoint.dit_config.block_size
    got = dit(z, t, positions, attending(n, checkpoint.dit_config.block_size))
    expected = reference.velocity(w, checkpoint.dit_config, z.double(), t.double(), positions)
    assert relative(got, expected) < TOLERANCE


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, TOLERANCE), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("branch", ["cond", "uncond"])
@torch.inference_mode()
def test_velocities_are_the_recorded_ones(golden: Golden, branch: str, dtype: torch.dtype, bound: float) -> None:
    model = load(Checkpoint.open(golden.directory), "prior", CPU, dtype)
    B, tensors = model.config.block_size, golden.tensors
    lengths = tensors["dit.prefix_lengths"].tolist()
    prefixes, outputs = (tensors[name].split(lengths) for name in ("dit.prefix", "dit.prefix_out"))
    for i, (prefix, recorded) in enumerate(zip(prefixes, outputs, strict=True)):
        block = slice(i * B, (i + 1) * B)
        before = prefix if branch == "cond" else prefix[:0]
        z, positions = torch.cat((before, tensors["dit.block"][block])), torch.arange(len(before) + B)
        t = torch.cat((torch.zeros(len(before)), tensors["dit.timestep"][block]))
        velocity = model(z, t, positions, attending(len(z), B))
        assert relative(velocity[len(before) :], tensors[f"dit.{branch}"][block]) < bound
        if branch == "cond":  # no position sees a later block
            assert relative(velocity[: len(before)], recorded) < bound
