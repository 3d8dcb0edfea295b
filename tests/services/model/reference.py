"""MODEL.md written down a second time, plainly: one sequence, float64, no cache. The judge of the tests."""

import math

import torch
from torch import Tensor

from colaserve_services.model.config import DiTConfig, TextVAEConfig

Weights = dict[str, Tensor]


def norm(x: Tensor, eps: float, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    x = (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + eps)
    return x if weight is None else x * weight + bias


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    y = x @ w[f"{name}.weight"].T
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def attention(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, block: int) -> Tensor:  # (L, heads, head_dim)
    scores = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(q.shape[-1])
    visible = positions[None, :] // block <= positions[:, None] // block
    return torch.einsum("hij,jhd->ihd", scores.masked_fill(~visible, -math.inf).softmax(-1), v)


def vae_tensors(c: TextVAEConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of each tensor of cola_vae, as MODEL.md lists them."""
    D, d, hidden = c.dim, c.latent_dim, c.ffn_dim // 2 if c.act == "swiglu" else c.ffn_dim
    linears = {  # name: (outputs, inputs, bias)
        "encoder.final_layer": (2 * d if c.use_variation else d, D, c.bias),
        "decoder.in_layer": (D, d, c.bias),
        "decoder.unpatch_layer": (c.patch_size * D, D, True),
        "decoder.final_layer": (c.vocab_size, D, c.bias),
    }
    norms = {"decoder.final_norm": True}  # name: affine
    for half, blocks in (("encoder", c.encoder_num_blocks), ("decoder", c.decoder_num_blocks)):
        for p in (f"{half}.blocks.{i}" for i in range(blocks)):
            linears |= {f"{p}.qkv_proj": (3 * D, D, c.qk_bias), f"{p}.attn_out_proj": (D, D, c.bias)}
            linears |= {f"{p}.ffn_proj": (c.ffn_dim, D, c.bias), f"{p}.ffn_out": (D, hidden, c.bias)}
            norms |= {f"{p}.norm_attn": c.layer_norm_affine, f"{p}.norm_ffn": True}
            norms |= {f"{p}.{name}": c.qk_norm and c.qk_norm_affine for name in ("q_norm", "k_norm")}
    shapes: dict[str, tuple[int, ...]] = {
        "encoder.wte.weight": (c.vocab_size + 1, D),
        "encoder.patch_embedder.weight": (D, D, c.patch_size),
        "encoder.patch_embedder.bias": (D,),
    }
    shapes |= {f"{name}.weight": (outputs, inputs) for name, (outputs, inputs, _) in linears.items()}
    shapes |= {f"{name}.bias": (outputs,) for name, (outputs, _, bias) in linears.items() if bias}
    shapes |= {f"{name}.{part}": (D,) for name, affine in norms.items() if affine for part in ("weight", "bias")}
    return shapes


def vae_blocks(w: Weights, c: TextVAEConfig, prefix: str, blocks: int, x: Tensor) -> Tensor:
    L, heads, hd = len(x), c.num_heads, c.dim // c.num_heads
    positions = torch.arange(L)
    angles = positions[:, None].double() * c.rope_theta ** (-2 * torch.arange(hd // 2).double() / hd)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]

    def rotate(t: Tensor) -> Tensor:
        a, b = t[..., : hd // 2], t[..., hd // 2 :]
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    for i in range(blocks):
        p = f"{prefix}.blocks.{i}"

        def ln(name: str, t: Tensor, p: str = p) -> Tensor:
            return norm(t, c.layer_norm_eps, w.get(f"{p}.{name}.weight"), w.get(f"{p}.{name}.bias"))

        h = x if c.post_norm else ln("norm_attn", x)
        qkv = linear(w, f"{p}.qkv_proj", h)
        if c.clip_qkv is not None:
            qkv = qkv.clamp(-c.clip_qkv, c.clip_qkv)
        q, k, v = qkv.split(c.dim, -1)
        if c.qk_norm:
            q, k = ln("q_norm", q), ln("k_norm", k)
        q, k, v = (t.reshape(L, heads, hd) for t in (q, k, v))
        out = attention(rotate(q), rotate(k), v, positions, c.block_size).reshape(L, c.dim)
        x = (ln("norm_attn", x) if c.post_norm else x) + linear(w, f"{p}.attn_out_proj", out)

        def feed_forward(t: Tensor, p: str = p) -> Tensor:
            t = linear(w, f"{p}.ffn_proj", t)
            if c.act == "swiglu":
                value, gate = t.chunk(2, -1)
                t = silu(gate) * value
            else:
                t = gelu(t) if c.act == "gelu" else silu(t)
            return linear(w, f"{p}.ffn_out", t)

        x = x + ln("norm_ffn", feed_forward(x)) if c.post_norm else x + feed_forward(ln("norm_ffn", x))
    return x


def encode(w: Weights, c: TextVAEConfig, ids: Tensor) -> tuple[Tensor, Tensor | None]:
    """Normalised mean and log variance of one padded sequence."""
    tokens, P = w["encoder.wte.weight"][ids], c.patch_size
    kernel = w["encoder.patch_embedder.weight"]  # (out, in, P)
    x = sum(tokens[p::P] @ kernel[:, :, p].T for p in range(P)) + w["encoder.patch_embedder.bias"]
    x = linear(w, "encoder.final_layer", vae_blocks(w, c, "encoder", c.encoder_num_blocks, x))
    mean, logvar = x[:, : c.latent_dim], x[:, c.latent_dim :].clamp(-30, 20) if c.use_variation else None
    if c.encoder_last_ln or not c.use_variation:
        mean = norm(mean, c.layer_norm_eps)
    return (mean - c.shifting_factor) * c.scaling_factor, logvar


def decode(w: Weights, c: TextVAEConfig, latents: Tensor) -> Tensor:
    x = vae_blocks(w, c, "decoder", c.decoder_num_blocks, linear(w, "decoder.in_layer", latents))
    x = linear(w, "decoder.unpatch_layer", x).reshape(len(x), c.dim, c.patch_size)
    x = x.transpose(1, 2).reshape(-1, c.dim)
    x = norm(x, c.layer_norm_eps, w["decoder.final_norm.weight"], w["decoder.final_norm.bias"])
    return linear(w, "decoder.final_layer", x)


def velocity(w: Weights, c: DiTConfig, z: Tensor, t: Tensor, positions: Tensor) -> Tensor:
    L, D, half = len(z), c.txt_dim, c.rope_dim // 2
    angles = t[:, None] * 10000 ** (-torch.arange(128).double() / 128)
    e = torch.cat((angles.sin(), angles.cos()), -1)
    e = linear(w, "emb_in.proj_out", silu(linear(w, "emb_in.proj_hid", silu(linear(w, "emb_in.proj_in", e)))))
    rope = positions[:, None].double() * 10000 ** (-2 * torch.arange(half).double() / max(c.rope_dim, 1))
    cos, sin = rope.cos()[:, None], rope.sin()[:, None]

    def rotate(x: Tensor) -> Tensor:
        a, b = x[..., 0 : c.rope_dim : 2], x[..., 1 : c.rope_dim : 2]
        pairs = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
        return torch.cat((pairs, x[..., c.rope_dim :]), -1)

    x = linear(w, "txt_in.proj", z)
    for i in range(c.num_layers):
        p = f"blocks.{i}"
        shift, scale = linear(w, f"{p}.ada.msa_in.1", silu(e)).split(D, -1)
        qkv = linear(w, f"{p}.msa.proj_qkv", norm(x, c.norm_eps) * (1 + scale) + shift)
        q, k, v = qkv.reshape(L, 3, c.heads, c.head_dim).unbind(1)
        q = rotate(norm(q, c.norm_eps, w[f"{p}.msa.norm_q.weight"], w[f"{p}.msa.norm_q.bias"]))
        k = rotate(norm(k, c.norm_eps, w[f"{p}.msa.norm_k.weight"], w[f"{p}.msa.norm_k.bias"]))
        out = linear(w, f"{p}.msa.proj_out", attention(q, k, v, positions, c.block_size).reshape(L, -1))
        x = x + linear(w, f"{p}.ada.msa_out.1", silu(e)) * out
        shift, scale = linear(w, f"{p}.ada.mlp_in.1", silu(e)).split(D, -1)
        h = linear(w, f"{p}.mlp.proj_in", norm(x, c.norm_eps) * (1 + scale) + shift)
        x = x + linear(w, f"{p}.ada.mlp_out.1", silu(e)) * linear(w, f"{p}.mlp.proj_out", gelu_tanh(h))
    shift, scale = linear(w, "txt_out_ada.out_in.1", silu(e)).split(D, -1)
    x = norm(x, c.norm_eps, w["txt_out_norm.weight"], w["txt_out_norm.bias"]) * (1 + scale) + shift
    return linear(w, "txt_out.proj", x)
