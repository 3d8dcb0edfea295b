"""Read a checkpoint for training, and write one in the released layout: all and only the released names."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import nn

from colaserve_client.writing import write_file
from colaserve_services.errors import CheckpointError
from colaserve_services.model.checkpoint import Checkpoint, WeightFolder
from colaserve_services.model.config import DiTConfig, TextVAEConfig, load_vae_config, read_json
from colaserve_services.model.dit import DiT
from colaserve_services.model.text_vae import TextVAE
from colaserve_services.text.special_ids import SpecialIds
from colaserve_services.training.tokenizer import END_ID, IM_END_ID, PAD_ID

# Keys that the released files have beside those that change the numbers.
VAE_FIXED: dict[str, Any] = {
    "architectures": ["ColaTextVAEModel"], "attn_dropout": 0.0, "block_causal": True, "causal": False, "dropout": 0.0,
    "init_cutoff_factor": 3, "init_fn": "normal", "init_std": 0.02, "layer_norm_type": "layer_norm",
    "model_type": "cola_text_vae", "shared_heads_kv": 1, "use_emb": True,
}  # fmt: skip
DIT_FIXED: dict[str, Any] = {"architectures": ["ColaDiTModel"], "model_type": "cola_dit", "patch_size": 1}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_vae(directory: Path) -> TextVAE:
    """`directory`/cola_dlm/cola_vae, single file or shards, in float32 on the CPU, ready to train."""
    folder = directory / "cola_dlm" / "cola_vae"
    vae = TextVAE(load_vae_config(folder / "config.json"))
    stored = WeightFolder(folder)
    try:
        vae.load_state_dict({name: value.float() for name, value in stored.read(stored.entries)})
    except RuntimeError as error:
        raise CheckpointError(f"{folder}: {str(error).splitlines()[1].strip()}") from error
    return vae.train()


def load_dit(checkpoint: Checkpoint) -> DiT:
    """The prior in float32 on the CPU, ready to train."""
    dit = checkpoint.load_prior(torch.device("cpu"), torch.float32).train().requires_grad_(True)
    for name, value in dit.named_parameters():
        value.requires_grad_(not name.endswith(".freqs"))  # a table of constants
    return dit


def write_vae(vae: TextVAE, out: Path, dtype: str = "float32") -> None:
    """Write `out`/cola_dlm/cola_vae."""
    _write(vae, {**VAE_FIXED, **asdict(vae.config)}, out / "cola_dlm" / "cola_vae", dtype)


def write_dit(dit: DiT, out: Path, dtype: str = "float32") -> None:
    """Write `out`/cola_dlm/cola_dit."""
    _write(dit, {**DIT_FIXED, **asdict(dit.config)}, out / "cola_dlm" / "cola_dit", dtype)


def _write(model: nn.Module, config: dict[str, Any], folder: Path, dtype: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: value.detach().cpu().to(torch.float32 if name.endswith(".freqs") else DTYPES[dtype]).contiguous()
        for name, value in model.state_dict().items()
    }
    draft = folder / "model.safetensors.part"
    save_file(tensors, draft, metadata={"format": "pt"})
    draft.chmod(0o644)  # the library's own files are the writer's alone, and servers run as somebody else
    draft.replace(folder / "model.safetensors")
    write_json(folder / "config.json", {**config, "dtype": dtype})


def write_json(path: Path, content: dict[str, Any]) -> None:
    write_file(path, json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def write_generation_config(out: Path, **defaults: Any) -> None:
    """Write `out`/generation_config.json with the special ids of our tokenizers and a checkpoint's own defaults."""
    special = {"eos_token_id": END_ID, "im_end_token_id": IM_END_ID, "pad_token_id": PAD_ID}
    write_json(out / "generation_config.json", {**special, **defaults})


def copy_companions(source: Path, out: Path) -> None:
    """Copy tokenizer.json and generation_config.json, so that `out` can be served; a file that is not there is not."""
    out.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "generation_config.json"):
        if (source / name).is_file() and source.resolve() != out.resolve():
            shutil.copyfile(source / name, out / name)


def special_ids(folder: Path, words: Tokenizer) -> SpecialIds:
    """Of a checkpoint folder: its generation_config.json first, then the release's, then the tokenizer's."""
    path = folder / "generation_config.json"
    given = read_json(path) if path.is_file() else {}
    pad, end = given.get("pad_token_id"), given.get("eos_token_id")
    return SpecialIds.find(words.token_to_id, words.get_vocab_size(), pad=pad, end_of_text=end)


def copy_prior(source: Path, out: Path) -> None:
    """Copy the prior of a checkpoint as it is, shards and all."""
    if source.resolve() != out.resolve():
        shutil.copytree(source / "cola_dlm" / "cola_dit", out / "cola_dlm" / "cola_dit", dirs_exist_ok=True)


def tiny_vae_config(vocab_size: int, dim: int = 128, blocks: int = 2, block_size: int = 1) -> TextVAEConfig:
    """A small Text VAE of 16 latent channels; heads of 32 channels."""
    return TextVAEConfig(
        vocab_size=vocab_size, encoder_num_blocks=blocks, decoder_num_blocks=blocks, dim=dim, ffn_dim=4 * dim,
        num_heads=max(1, dim // 32), block_size=block_size,
    )  # fmt: skip


def tiny_dit_config(dim: int = 192, layers: int = 4, latent_dim: int = 16, block_size: int = 4) -> DiTConfig:
    """A small prior; heads of 32 channels, all of them rotated."""
    return DiTConfig(
        txt_in_channels=latent_dim, txt_out_channels=latent_dim, txt_dim=dim, emb_dim=dim, heads=max(1, dim // 32),
        head_dim=32, num_layers=layers, rope_dim=32, block_size=block_size,
    )  # fmt: skip
