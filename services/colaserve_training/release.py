"""Networks to train, new or of a checkpoint, and checkpoints in the released layout: all and only its names."""

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from colaserve_client.writing import write_file
from colaserve_services.errors import CheckpointError, UsageError
from colaserve_services.model.config import DiTConfig, TextVAEConfig, load_dit_config, load_vae_config, read_json
from colaserve_services.model.dit import DiT
from colaserve_services.model.layers import Linear
from colaserve_services.model.text_vae import PatchEmbedder, TextVAE
from colaserve_services.model.weights import WeightFolder
from colaserve_services.text.tokenizer import SpecialIds
from colaserve_training.state import stored_states
from colaserve_training.tokenizer import OWN_IDS, save_tokenizer, write_tokenizer_config

# Keys that the released files have beside those that change the numbers, by network.
FIXED: dict[str, dict[str, Any]] = {
    "vae": {
        "architectures": ["ColaTextVAEModel"], "attn_dropout": 0.0, "block_causal": True, "causal": False,
        "dropout": 0.0, "init_cutoff_factor": 3, "init_fn": "normal", "init_std": 0.02,
        "layer_norm_type": "layer_norm", "model_type": "cola_text_vae", "shared_heads_kv": 1, "use_emb": True,
    },
    "dit": {"architectures": ["ColaDiTModel"], "model_type": "cola_dit", "patch_size": 1},
}  # fmt: skip
N = TypeVar("N", bound=nn.Module)
GENERATION: dict[str, Any] = {"steps": 16, "guidance_scale": 2.0, "max_new_tokens": 64}  # good for small networks
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def checkpoint_folder(name: Path) -> Path:
    """The folder that `--init` names: `bundled` is the checkpoint that ships with this package."""
    return Path(str(files("colaserve_services"))) / "demo" if str(name) == "bundled" else name


def claim(out: Path, runs: Sequence[Path], resume: bool, overwrite: bool) -> None:
    """Refuse to lose work: a finished checkpoint in `out`, or states in the folders of its runs."""
    if overwrite:
        return
    if (out / "cola_dlm").exists():
        raise UsageError(f"{out}: holds a checkpoint; name another --out, or replace it with --overwrite")
    states = [state for run in runs for state in stored_states(run / "state")]
    if states and not resume:
        raise UsageError(
            f"{states[0]}: a state of an earlier run; continue it with --resume, or delete it with --overwrite"
        )


def load_vae(directory: Path) -> TextVAE:
    """`directory`/cola_dlm/cola_vae, single file or shards, in float32 on the CPU, ready to train."""
    return _load(TextVAE, load_vae_config, directory / "cola_dlm" / "cola_vae")


def load_dit(directory: Path) -> DiT:
    """`directory`/cola_dlm/cola_dit, likewise; its table of frequencies is constant."""
    return _load(DiT, load_dit_config, directory / "cola_dlm" / "cola_dit")


def _load(kind: Callable[[Any], N], read_config: Callable[[Path], Any], folder: Path) -> N:
    stored = WeightFolder(folder)
    with torch.device("meta"):
        network = kind(read_config(folder / "config.json"))
    weights = {name: value.to(torch.float32, copy=True) for name, value in stored.read(stored.entries)}
    try:
        network.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"{folder}: {str(error).splitlines()[1].strip()}") from error
    return network.train()


def new_vae(config: TextVAEConfig) -> TextVAE:
    """Fan-in scaled weights, drawn from torch's global generator; the patch embedder is the mean of its tokens."""
    vae = TextVAE(config)
    _init_linears(vae)
    patches = vae.encoder.patch_embedder
    nn.init.zeros_(patches.bias)
    nn.init.zeros_(patches.weight)
    for channel in range(config.dim):
        nn.init.constant_(patches.weight[channel, channel], 1 / config.patch_size)
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
            nn.init.normal_(child.weight, std=1 / math.sqrt(child.in_features))
            if child.bias is not None:
                nn.init.zeros_(child.bias)


def write_network(
    network: str, config: TextVAEConfig | DiTConfig, weights: Mapping[str, Tensor], out: Path, dtype: str = "float32"
) -> None:
    """Write `out`/cola_dlm/cola_vae or cola_dit: `network` is "vae" or "dit"."""
    folder = out / "cola_dlm" / f"cola_{network}"
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: value.detach().cpu().to(torch.float32 if name.endswith(".freqs") else DTYPES[dtype]).contiguous()
        for name, value in weights.items()
    }
    path = folder / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)  # the library's own files are the writer's alone, and servers run as somebody else
    write_json(folder / "config.json", {**FIXED[network], **asdict(config), "dtype": dtype})


def write_json(path: Path, content: dict[str, Any]) -> None:
    write_file(path, json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def write_generation_config(out: Path, special: SpecialIds = OWN_IDS, **defaults: Any) -> None:
    """Write `out`/generation_config.json with the special ids and a checkpoint's own defaults."""
    ids = {"eos_token_id": special.end_of_text, "im_end_token_id": special.im_end, "pad_token_id": special.pad}
    write_json(out / "generation_config.json", {**{k: v for k, v in ids.items() if v is not None}, **defaults})


def write_companions(source: Path, out: Path, words: Tokenizer, special: SpecialIds) -> None:
    """tokenizer.json, tokenizer_config.json and generation_config.json: those of `source`, else new ones."""
    out.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
    if not (out / "tokenizer.json").exists():
        save_tokenizer(words, out)
    if not (out / "tokenizer_config.json").exists():
        write_tokenizer_config(words, out, special)
    if not (out / "generation_config.json").exists():
        write_generation_config(out, special, **GENERATION)


def special_ids(folder: Path, words: Tokenizer) -> SpecialIds:
    """Of a checkpoint folder: its generation_config.json first, then the release's, then the tokenizer's."""
    path = folder / "generation_config.json"
    given = read_json(path) if path.is_file() else {}
    pad, end, im_end = (given.get(f"{name}_token_id") for name in ("pad", "eos", "im_end"))
    return SpecialIds.find(words.token_to_id, words.get_vocab_size(), pad=pad, end_of_text=end, im_end=im_end)
