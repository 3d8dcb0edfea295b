"""New networks, for training from scratch. The draws come from torch's global generator: seed it first."""

from __future__ import annotations

from torch import nn

from colaserve_services.model.config import DiTConfig, TextVAEConfig
from colaserve_services.model.dit import DiT
from colaserve_services.model.layers import Linear, init_linear
from colaserve_services.model.text_vae import PatchEmbedder, TextVAE


def new_vae(config: TextVAEConfig) -> TextVAE:
    """Fan-in scaled weights; the patch embedder starts as the mean of its tokens."""
    vae = TextVAE(config)
    _init_linears(vae)
    for module in vae.modules():
        if isinstance(module, PatchEmbedder):
            nn.init.zeros_(module.weight)
            for channel in range(config.dim):
                nn.init.constant_(module.weight[channel, channel], 1 / config.patch_size)
    nn.init.normal_(vae.encoder.wte.weight)
    return vae


def new_dit(config: DiTConfig) -> DiT:
    """adaLN-Zero: every gate and the output start at zero, so that each block is the identity."""
    dit = DiT(config)
    _init_linears(dit)
    for name, parameter in dit.named_parameters():
        if ".ada." in name or name.startswith(("txt_out_ada.", "txt_out.")):
            nn.init.zeros_(parameter)
    return dit


def _init_linears(module: nn.Module) -> None:
    for child in module.modules():
        if isinstance(child, Linear) and not isinstance(child, PatchEmbedder):
            init_linear(child)
        elif isinstance(child, PatchEmbedder):
            nn.init.zeros_(child.bias)
