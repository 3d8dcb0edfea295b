"""Tiny networks and a tokenizer, shared by the training tests."""

from collections.abc import Iterator

import pytest
import torch
from tokenizers import Tokenizer

from colaserve_services.model.config import DiTConfig, TextVAEConfig
from colaserve_training.tokenizer import train_tokenizer

WORDS = ["the capital of France is Paris", "a river runs through it", "Question: what? Answer: yes"] * 4


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def words() -> Tokenizer:
    return train_tokenizer(WORDS, 300)


def vae_config(vocab_size: int = 300, block_size: int = 1) -> TextVAEConfig:
    return TextVAEConfig(
        vocab_size=vocab_size, encoder_num_blocks=1, decoder_num_blocks=1, dim=16, ffn_dim=32, latent_dim=4,
        num_heads=2, block_size=block_size,
    )  # fmt: skip


def dit_config(dim: int = 16, layers: int = 1, latent_dim: int = 4, block_size: int = 4) -> DiTConfig:
    return DiTConfig(
        txt_in_channels=latent_dim, txt_out_channels=latent_dim, txt_dim=dim, emb_dim=dim, heads=2, head_dim=dim // 2,
        expand_ratio=2, num_layers=layers, rope_dim=dim // 2, block_size=block_size,
    )  # fmt: skip
