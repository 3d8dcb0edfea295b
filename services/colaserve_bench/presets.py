"""The model sizes that benchmarks run on."""

from __future__ import annotations

from dataclasses import dataclass

from colaserve_services.model.config import DiTConfig, TextVAEConfig
from colaserve_services.text.special_ids import END_OF_TEXT, IM_END, PAD, RELEASE_IDS


@dataclass(frozen=True)
class Preset:
    """One size: both configs, the ids of the special tokens, and how large a weight file may get."""

    dit: DiTConfig
    vae: TextVAEConfig
    special_ids: dict[str, int]  # token -> id
    shard_bytes: int = 5_000_000_000


_FIRST_IDS = {END_OF_TEXT: 0, IM_END: 1, PAD: 2}

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
    "released": Preset(DiTConfig(block_size=16), TextVAEConfig(block_size=16), dict(RELEASE_IDS)),
}  # fmt: skip
