"""What a checkpoint's config.json files say, checked once; every key is honoured or refused by name."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from colaserve_client import reading
from colaserve_services.errors import CheckpointError
from colaserve_services.stand_ins import stand_in

Activation = Literal["swiglu", "gelu", "silu"]

# Keys that describe the file or the training run and cannot change what inference computes.
_IGNORED = {"architectures", "attn_dropout", "auto_map", "causal", "dropout", "dtype", "torch_dtype", "use_emb"}
_IGNORED_PREFIXES = ("init_", "_", "transformers_")
# What PretrainedConfig of transformers writes into every config.json, about its own classes and its own generation.
_TRANSFORMERS = {
    "add_cross_attention", "attn_implementation", "bad_words_ids", "begin_suppress_tokens", "bos_token_id",
    "chunk_size_feed_forward", "cross_attention_hidden_size", "decoder_start_token_id", "diversity_penalty",
    "do_sample", "early_stopping", "encoder_no_repeat_ngram_size", "eos_token_id", "exponential_decay_length_penalty",
    "finetuning_task", "forced_bos_token_id", "forced_eos_token_id", "id2label", "is_decoder", "is_encoder_decoder",
    "label2id", "length_penalty", "max_length", "min_length", "name_or_path", "no_repeat_ngram_size",
    "num_beam_groups", "num_beams", "num_return_sequences", "output_attentions", "output_hidden_states",
    "output_scores", "pad_token_id", "prefix", "problem_type", "remove_invalid_values", "repetition_penalty",
    "return_dict", "return_dict_in_generate", "sep_token_id", "suppress_tokens", "task_specific_params", "temperature",
    "tf_legacy_loss", "tie_encoder_decoder", "tie_word_embeddings", "tokenizer_class", "top_k", "top_p", "torchscript",
    "typical_p", "use_bfloat16", "use_cache", "use_return_dict",
}  # fmt: skip
DELETE = "A key that inference does not need can be deleted"
_EMPTY = {"pruned_heads", "quantization_config"}  # pass when their value asks for nothing


@dataclass(frozen=True)
class TextVAEConfig:
    """cola_vae/config.json; names, meanings and defaults are the file's."""

    vocab_size: int = 100278
    encoder_num_blocks: int = 4
    decoder_num_blocks: int = 4
    dim: int = 1536
    ffn_dim: int = 6144
    latent_dim: int = 16
    patch_size: int = 1  # tokens a latent
    num_heads: int = 12
    encoder_last_ln: bool = True  # the posterior mean is layer-normalised, without affine
    layer_norm_eps: float = 1e-6
    layer_norm_affine: bool = True  # of norm_attn
    post_norm: bool = True  # norm_attn is on the residual input, norm_ffn on the feed-forward's output
    qk_bias: bool = False
    qk_norm: bool = True  # over the full width, before the split into heads
    qk_norm_affine: bool = True
    clip_qkv: float | None = None
    rope_theta: float = 500000.0
    rope_full_precision: bool = True  # rotary in float32, else in the compute dtype
    bias: bool = True  # of every Linear but qkv_proj; patch_embedder and unpatch_layer always have one
    act: Activation = "swiglu"
    block_size: int = 4  # latents a block of the attention mask; 1 is strictly causal
    use_variation: bool = True  # the encoder gives a mean and a log variance
    scaling_factor: float = 1.0
    shifting_factor: float = 0.0

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def layer_weights(self) -> int:
        """Elements of one layer's four matrices."""
        return self.dim * (4 * self.dim + self.ffn_dim + self.ffn_dim // (2 if self.act == "swiglu" else 1))


@dataclass(frozen=True)
class DiTConfig:
    """cola_dit/config.json; names, meanings and defaults are the file's."""

    txt_in_channels: int = 16  # latent_dim of the VAE
    txt_out_channels: int = 16
    txt_dim: int = 2048
    emb_dim: int = 2048  # width of the time embedding
    heads: int = 16
    head_dim: int = 128
    expand_ratio: int = 4
    num_layers: int = 24
    norm_eps: float = 1e-5
    qk_bias: bool = False  # of proj_qkv and proj_out
    rope_dim: int = 96  # leading channels of a head that are rotated
    block_size: int = 4  # latents a block of generation

    @property
    def layer_weights(self) -> int:
        """Elements of one layer's four matrices."""
        inner = self.heads * self.head_dim
        return self.txt_dim * (4 * inner + 2 * self.expand_ratio * self.txt_dim)


@dataclass(frozen=True)
class ModelShape:
    """What services report about a model; `parameters` are those that the reporting one holds."""

    latent_dim: int
    block_size: int
    vae_block_size: int
    patch_size: int
    vocab_size: int
    parameters: int = 0


_Config = TypeVar("_Config", TextVAEConfig, DiTConfig)

# Keys with one value that is supported, and why another is not.
_VAE_FIXED: Mapping[str, tuple[Any, str]] = {
    "shared_heads_kv": (1, "grouped-query attention is not part of the released model"),
    "block_causal": (True, "generation needs a block-causal VAE"),
    "layer_norm_type": ("layer_norm", "no other norm exists"),
    "model_type": ("cola_text_vae", "this folder must hold the Text VAE"),
}
_DIT_FIXED: Mapping[str, tuple[Any, str]] = {
    "patch_size": (1, "the prior works on single latents"),
    "model_type": ("cola_dit", "this folder must hold the DiT prior"),
}


def load_vae_config(path: Path) -> TextVAEConfig:
    """Read cola_vae/config.json; raise `CheckpointError` naming the file and key of what cannot be served."""
    config = _load(path, TextVAEConfig, _VAE_FIXED)
    if config.act not in ("swiglu", "gelu", "silu"):
        raise CheckpointError(f"{path}: act is {config.act!r}; expected swiglu, gelu or silu")
    if config.dim % config.num_heads or config.head_dim % 2:
        raise CheckpointError(
            f"{path}: dim {config.dim} does not split into num_heads {config.num_heads} heads of even size"
        )
    if config.act == "swiglu" and config.ffn_dim % 2:
        raise CheckpointError(f"{path}: ffn_dim is {config.ffn_dim}; swiglu needs an even one")
    if config.clip_qkv is not None and config.clip_qkv <= 0:
        raise CheckpointError(f"{path}: clip_qkv is {config.clip_qkv}; expected null or a positive number")
    if config.scaling_factor == 0:
        raise CheckpointError(f"{path}: scaling_factor is 0; the latents would carry nothing")
    return config


def load_dit_config(path: Path) -> DiTConfig:
    """Read cola_dit/config.json; raise `CheckpointError` naming the file and key of what cannot be served."""
    config = _load(path, DiTConfig, _DIT_FIXED)
    if config.txt_in_channels != config.txt_out_channels:
        raise CheckpointError(
            f"{path}: txt_out_channels is {config.txt_out_channels}; expected txt_in_channels, {config.txt_in_channels}"
        )
    if config.head_dim % 2:
        raise CheckpointError(
            f"{path}: head_dim is {config.head_dim}; expected an even number, which rotary pairs need"
        )
    if config.rope_dim % 2 or config.rope_dim > config.head_dim:
        raise CheckpointError(f"{path}: rope_dim is {config.rope_dim}; expected an even number up to head_dim")
    return config


def check_pair(vae: TextVAEConfig, dit: DiTConfig) -> None:
    """Raise `CheckpointError` unless the prior generates in this VAE's space and block grid."""
    if dit.txt_in_channels != vae.latent_dim:
        raise CheckpointError(
            f"cola_dit/config.json: txt_in_channels is {dit.txt_in_channels}; expected the VAE's latent_dim, "
            f"{vae.latent_dim}"
        )
    if dit.block_size % vae.block_size:
        raise CheckpointError(
            f"cola_dit/config.json: block_size is {dit.block_size}; expected a multiple of the VAE's, {vae.block_size}"
        )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, or a `CheckpointError` of one line."""
    if found := stand_in(path):
        raise CheckpointError(f"{path}: is {found}")
    try:
        return reading.read_json(path)
    except reading.Unreadable as error:
        raise CheckpointError(str(error)) from error


def _load(path: Path, kind: type[_Config], fixed: Mapping[str, tuple[Any, str]]) -> _Config:
    content = read_json(path)
    for key, (expected, why) in fixed.items():
        if key in content and content[key] != expected:
            raise CheckpointError(f"{path}: {key} is {content[key]!r}; only {expected!r} is served ({why})")
    known = {field.name: field for field in fields(kind)}
    values = {}
    for key, value in content.items():
        if key in known:
            values[key] = _checked(path, key, value, known[key].default)
        elif key not in fixed and not _passes(key, value):
            raise CheckpointError(f"{path}: unknown key {key!r} (value {value!r}); it may change the numbers. {DELETE}")
    return kind(**values)


def _passes(key: str, value: Any) -> bool:
    """Whether a key that is not ours can be read past."""
    if key in _EMPTY:
        return not value
    return key in _IGNORED or key in _TRANSFORMERS or key.startswith(_IGNORED_PREFIXES)


_NON_NEGATIVE = {"encoder_num_blocks", "decoder_num_blocks", "num_layers", "rope_dim"}


def _checked(path: Path, key: str, value: Any, default: Any) -> Any:
    if key == "clip_qkv":
        default = 1.0 if value is not None else None
    expected = type(default)
    if expected is float and type(value) is int:
        value = float(value)
    if type(value) is not expected:
        raise CheckpointError(f"{path}: {key} is {value!r}; expected {expected.__name__}")
    if expected is int and value < (0 if key in _NON_NEGATIVE else 1):
        raise CheckpointError(f"{path}: {key} is {value}; expected a positive number")
    if key.endswith("eps") and cast(float, value) <= 0:
        raise CheckpointError(f"{path}: {key} is {value}; expected a positive number")
    return value
