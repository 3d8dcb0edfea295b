"""Small random checkpoints in the released layout, of any configuration."""

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from colaserve_services.model.config import DiTConfig, TextVAEConfig
from colaserve_services.model.dit import DiT
from colaserve_services.model.text_vae import TextVAE
from tests.conftest import GOLDEN

TINY_VAE: dict[str, Any] = {
    "vocab_size": 512, "encoder_num_blocks": 2, "decoder_num_blocks": 2, "dim": 32, "ffn_dim": 64, "latent_dim": 8,
    "num_heads": 4, "block_size": 4,
}  # fmt: skip
TINY_DIT: dict[str, Any] = {
    "txt_in_channels": 8, "txt_out_channels": 8, "txt_dim": 32, "emb_dim": 24, "heads": 3, "head_dim": 8,
    "expand_ratio": 2, "num_layers": 2, "rope_dim": 6, "block_size": 4,
}  # fmt: skip


def randomise(module: torch.nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """Random tensors of a module's names and shapes."""
    state = module.state_dict()
    drawn = draw({name: tuple(stored.shape) for name, stored in state.items()}, seed)
    return drawn | {name: stored.clone() for name, stored in state.items() if name.endswith("freqs")}


def draw(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, torch.Tensor]:
    """Random tensors: nothing is left at a value that would hide a mistake."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        is_norm = len(shape) == 1 and name.endswith("weight")
        fan_in = math.prod(shape[1:]) if len(shape) > 1 else 16
        tensors[name] = 1 + 0.2 * noise if is_norm else noise / fan_in**0.5
    return tensors


def write_checkpoint(directory: Path, vae: dict[str, Any] | None = None, dit: dict[str, Any] | None = None) -> Path:
    """A checkpoint whose configs are the tiny ones with the given keys replaced."""
    vae_config, dit_config = TextVAEConfig(**TINY_VAE | (vae or {})), DiTConfig(**TINY_DIT | (dit or {}))
    for name, config, module, seed in (
        ("cola_vae", vae_config, TextVAE(vae_config), 1),
        ("cola_dit", dit_config, DiT(dit_config), 2),
    ):
        folder = directory / "cola_dlm" / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(asdict(config)))
        save_file(randomise(module, seed), folder / "model.safetensors", {"format": "pt"})
    shutil.copy(GOLDEN / "tiny_b4" / "tokenizer.json", directory)
    return directory
