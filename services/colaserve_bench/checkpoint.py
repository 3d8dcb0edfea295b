"""Checkpoints to measure on: random weights in the released layout, with a tokenizer of the right size."""

import itertools
import math
import shutil
import string
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from colaserve_client.writing import write_file
from colaserve_services.errors import UsageError
from colaserve_services.model.config import DiTConfig, TextVAEConfig
from colaserve_services.model.dit import DiT
from colaserve_services.model.layers import rotary_frequencies
from colaserve_services.model.loading import DTYPES
from colaserve_services.model.text_vae import TextVAE
from colaserve_services.text.tokenizer import END_OF_TEXT, IM_END, PAD, RELEASE_IDS
from colaserve_training.release import FIXED, write_json

_NEVER = -1e4  # bias of the special ids: a benchmark's text does not end by chance
_SPACE = "Ġ"  # how byte-level BPE writes a space
_FIRST_IDS = {END_OF_TEXT: 0, IM_END: 1, PAD: 2}


@dataclass(frozen=True)
class Preset:
    """One size: both configs, the ids of the special tokens, and how large a weight file may get."""

    dit: DiTConfig
    vae: TextVAEConfig
    special_ids: Mapping[str, int]  # token -> id
    shard_bytes: int = 1 << 30  # one shard at a time is held in memory


PRESETS: dict[str, Preset] = {
    "tiny": Preset(
        DiTConfig(txt_dim=64, emb_dim=64, heads=4, head_dim=16, num_layers=2, rope_dim=12, block_size=4),
        TextVAEConfig(
            vocab_size=512, encoder_num_blocks=1, decoder_num_blocks=1, dim=64, ffn_dim=128, num_heads=4, block_size=4
        ),
        _FIRST_IDS,
    ),
    "medium": Preset(
        DiTConfig(txt_dim=512, emb_dim=512, heads=8, head_dim=64, num_layers=8, rope_dim=48, block_size=16),
        TextVAEConfig(
            vocab_size=8192, encoder_num_blocks=2, decoder_num_blocks=2, dim=512, ffn_dim=2048, num_heads=8,
            block_size=16,
        ),
        _FIRST_IDS,
    ),
    "released": Preset(DiTConfig(block_size=16), TextVAEConfig(block_size=16), RELEASE_IDS),
}  # fmt: skip


def make_checkpoint(preset: Preset, directory: Path, dtype: str = "float32", seed: int = 0) -> int:
    """Write a checkpoint; the same seed gives the same bytes. Returns the parameters written.

    Raises UsageError when the folder holds a checkpoint already or the disk has too little free.
    """
    if (directory / "cola_dlm").exists():
        raise UsageError(f"{directory}: holds a checkpoint already; name another folder or remove it")
    with torch.device("meta"):
        networks: dict[str, torch.nn.Module] = {"dit": DiT(preset.dit), "vae": TextVAE(preset.vae)}
    tensors = {name: network.to(DTYPES[dtype]).state_dict() for name, network in networks.items()}
    every = [tensor for folder in tensors.values() for tensor in folder.values()]
    directory.mkdir(parents=True, exist_ok=True)
    needed, free = sum(tensor.nbytes for tensor in every), shutil.disk_usage(directory).free
    if free < needed:
        raise UsageError(f"{directory}: {needed / 2**30:.1f} GiB are needed, {free / 2**30:.1f} GiB are free")
    for name, config in (("dit", preset.dit), ("vae", preset.vae)):
        folder, own = directory / "cola_dlm" / f"cola_{name}", tensors[name]
        folder.mkdir(parents=True)
        split = split_torch_state_dict_into_shards(  # as many files as it takes; without values so far
            own, filename_pattern="model{suffix}.safetensors", max_shard_size=preset.shard_bytes
        )
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            write_json(folder / "model.safetensors.index.json", index)
        for file, names in split.filename_to_tensors.items():
            values = {each: _values(each, own[each].shape, preset, seed).to(own[each].dtype) for each in names}
            save_file(values, folder / file, metadata={"format": "pt"})
        kind = {key: FIXED[name][key] for key in ("architectures", "model_type")}
        write_json(folder / "config.json", {**kind, **asdict(config), "dtype": dtype})
    write_tokenizer(directory / "tokenizer.json", preset.vae.vocab_size, preset.special_ids)
    return sum(tensor.numel() for tensor in every)


def _values(name: str, shape: torch.Size, preset: Preset, seed: int) -> Tensor:
    """Fan-in scaled matrices, norms that start as the identity: activations stay near one at any depth."""
    if name.endswith(".freqs"):
        return rotary_frequencies(preset.dit.rope_dim, 10000.0)
    if name == "decoder.final_layer.bias":
        return torch.zeros(shape).index_fill(0, torch.tensor(list(preset.special_ids.values())), _NEVER)
    if len(shape) == 1:
        return torch.full(shape, 1.0 if name.endswith("weight") else 0.0)
    # A small velocity: with guidance 7 latents stay near the noise.
    gain = 0.2 if name == "txt_out.proj.weight" else 1.0
    deviation = 1.0 if name.endswith("wte.weight") else gain / math.sqrt(math.prod(shape[1:]))
    generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
    return torch.from_numpy(generator.standard_normal(tuple(shape), dtype=np.float32) * np.float32(deviation))


def write_tokenizer(path: Path, size: int, special_ids: Mapping[str, int]) -> None:
    """Write a byte-level BPE with exactly `size` ids: it encodes any text, and every id has a text of its own.

    It is made without training data: merges spell out letter sequences in a fixed order. Ids above the merges (between
    and around the release's special ids) become reserved special tokens.
    """
    special = {i: text for text, i in special_ids.items()}
    if (lowest := min(special)) >= size // 2:  # they are at the top of the vocabulary
        special |= {i: f"<|reserved_{i}|>" for i in range(lowest, size) if i not in special}
    regular, alphabet = [i for i in range(size) if i not in special], sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = list(itertools.islice(_merges(), len(regular) - len(alphabet)))
    texts = [*alphabet, *("".join(pair) for pair in merges)]
    vocabulary = dict(zip(texts, regular, strict=True)) | {text: i for i, text in special.items()}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for _, text in sorted(special.items())])
    write_file(path, tokenizer.to_str())


def _merges() -> Iterator[tuple[str, str]]:
    """(known token, letter) without end, shorter tokens first, words' beginnings before their insides."""
    letters = string.ascii_lowercase
    known = [_SPACE, *letters]
    while True:
        grown = [(left, right) for left in known for right in letters]
        yield from grown
        known = [left + right for left, right in grown]
