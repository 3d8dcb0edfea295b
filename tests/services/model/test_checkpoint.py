"""Checkpoints load from any of the released layouts, cheaply, or fail with one line that says what is wrong."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from colaserve_services.errors import CheckpointError
from colaserve_services.model.checkpoint import Checkpoint
from colaserve_services.model.loading import STAGES, load
from tests.services.model.checkpoints import write_checkpoint

CPU = torch.device("cpu")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model")


def vae(model: Path) -> Path:
    return model / "cola_dlm" / "cola_vae"


def dit(model: Path) -> Path:
    return model / "cola_dlm" / "cola_dit"


def edit(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | changes))


def shard(folder: Path) -> None:
    """Split model.safetensors into two files with an index."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = (names[::2], names[1::2])
    files = [f"model-0000{i + 1}-of-00002.safetensors" for i in range(2)]
    for file, part in zip(files, parts, strict=True):
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
    weight_map = {name: file for file, part in zip(files, parts, strict=True) for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "model.safetensors").unlink()


def load_all(model: Path, dtype: torch.dtype = torch.float32) -> list[dict[str, torch.Tensor]]:
    checkpoint = Checkpoint.open(model)
    return [load(checkpoint, stage, CPU, dtype).state_dict() for stage in STAGES]


def test_shards_load_like_a_single_file_and_keep_the_fingerprint(model: Path) -> None:
    whole, space = load_all(model), Checkpoint.open(model).space
    shard(vae(model))
    shard(dit(model))
    assert Checkpoint.open(model).space == space
    for before, after in zip(whole, load_all(model), strict=True):
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_bfloat16_files_load_in_either_dtype(model: Path) -> None:
    for folder in (vae(model), dit(model)):
        tensors = load_file(folder / "model.safetensors")
        save_file({n: t.bfloat16() for n, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    for part in load_all(model):
        assert all(tensor.dtype == torch.float32 for tensor in part.values())
    checkpoint = Checkpoint.open(model)
    assert load(checkpoint, "prior", CPU, torch.bfloat16).dtype == torch.bfloat16


def test_the_fingerprint_differs_between_vaes_and_ignores_the_prior(model: Path, tmp_path: Path) -> None:
    space = Checkpoint.open(model).space
    assert re.fullmatch("[0-9a-f]{16}", space)
    assert Checkpoint.open(write_checkpoint(tmp_path / "other_prior", dit={"num_layers": 1})).space == space
    assert Checkpoint.open(write_checkpoint(tmp_path / "scaled", vae={"scaling_factor": 2.0})).space != space
    path = vae(model) / "model.safetensors"
    tensors = load_file(path)
    tensors["decoder.final_norm.bias"] = tensors["decoder.final_norm.bias"] + 1
    save_file(tensors, path, {"format": "pt"})
    assert Checkpoint.open(model).space != space


def drop(folder: Callable[[Path], Path], name: str) -> Callable[[Path], None]:
    def damage(model: Path) -> None:
        path = folder(model) / "model.safetensors"
        tensors = load_file(path)
        del tensors[name]
        save_file(tensors, path, {"format": "pt"})

    return damage


def replace(folder: Callable[[Path], Path], name: str, tensor: torch.Tensor) -> Callable[[Path], None]:
    def damage(model: Path) -> None:
        path = folder(model) / "model.safetensors"
        save_file(load_file(path) | {name: tensor}, path, {"format": "pt"})

    return damage


def truncate(model: Path) -> None:
    path = dit(model) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def lose_a_shard(model: Path) -> None:
    shard(dit(model))
    (dit(model) / "model-00002-of-00002.safetensors").unlink()


def leave_a_stale_copy(model: Path) -> None:
    """The first shard gets a tensor too that the index puts into the second."""
    shard(dit(model))
    first, second = (dit(model) / f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    name, tensor = next(iter(load_file(second).items()))
    save_file(load_file(first) | {name: tensor + 1}, first, {"format": "pt"})


def write(name: str, content: str) -> Callable[[Path], None]:
    def damage(model: Path) -> None:
        (model / name).write_text(content)

    return damage


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 7340032\n"
PAGE = "\n<!DOCTYPE html>\n<html><body>Sign in</body></html>"
WEIGHTS = "cola_dlm/cola_vae/model.safetensors"


def config(folder: Callable[[Path], Path], **changes: Any) -> Callable[[Path], None]:
    return lambda model: edit(folder(model) / "config.json", **changes)


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated weights": (truncate, "model.safetensors: damaged or truncated"),
    "missing tensor": (drop(dit, "blocks.1.mlp.proj_in.weight"), "'blocks.1.mlp.proj_in.weight' is missing"),
    "missing encoder tensor": (drop(vae, "encoder.wte.weight"), "'encoder.wte.weight' is missing"),
    "wrong shape": (replace(vae, "decoder.in_layer.weight", torch.zeros(3, 3)), r"shape \[3, 3\].*asks for \[32, 8\]"),
    "unknown tensor": (replace(dit, "blocks.0.extra", torch.zeros(1)), "'blocks.0.extra' is not in the model"),
    "integer tensor": (replace(dit, "txt_out_norm.bias", torch.zeros(32, dtype=torch.int8)), "floating-point"),
    "missing shard": (lose_a_shard, "model-00002-of-00002.safetensors: no such file"),
    "stale shard": (leave_a_stale_copy, r"00001-of-00002.safetensors: has a tensor '.*' that the index does not put"),
    "pointer": (write(WEIGHTS, POINTER), "model.safetensors: is a git-lfs pointer in place of the file"),
    "page": (write(WEIGHTS, PAGE), "model.safetensors: is an HTML page in place of the file"),
    "page for a config": (write("cola_dlm/cola_vae/config.json", PAGE), "config.json: is an HTML page"),
    "quantised": (config(dit, quantization_config={"bits": 4}), "unknown key 'quantization_config'"),
    "no weights": (lambda m: (vae(m) / "model.safetensors").unlink(), "model.safetensors: no such file"),
    "no config": (lambda m: (vae(m) / "config.json").unlink(), "config.json"),
    "broken config": (lambda m: (vae(m) / "config.json").write_text("{"), "not JSON"),
    "another model": (config(dit, model_type="llama"), "model_type is 'llama'"),
    "another VAE": (config(vae, model_type="llama"), "model_type is 'llama'"),
    "unknown key": (config(dit, num_experts=8), r"config.json: unknown key 'num_experts' \(value 8\).*can be deleted"),
    "shared heads": (config(vae, shared_heads_kv=2), "shared_heads_kv is 2"),
    "not block-causal": (config(vae, block_causal=False), "block_causal is False"),
    "prior patches": (config(dit, patch_size=2), "patch_size is 2"),
    "unknown activation": (config(vae, act="relu"), "act is 'relu'"),
    "other norm": (config(vae, layer_norm_type="rms"), "layer_norm_type is 'rms'"),
    "wrong type": (config(vae, dim="wide"), "dim is 'wide'; expected int"),
    "negative": (config(dit, heads=-1), "heads is -1"),
    "blocks that do not fit": (config(dit, block_size=6), "block_size is 6; expected a multiple of the VAE's, 4"),
    "other latents": (config(dit, txt_in_channels=4, txt_out_channels=4), "txt_in_channels is 4"),
    "uneven channels": (config(dit, txt_out_channels=4), "txt_out_channels is 4"),
    "odd rotary": (config(dit, rope_dim=5), "rope_dim is 5"),
    "odd heads": (config(dit, head_dim=7), "head_dim is 7"),
    "zero scale": (config(vae, scaling_factor=0.0), "scaling_factor is 0"),
    "no tokenizer": (lambda m: (m / "tokenizer.json").unlink(), "tokenizer.json: no such file"),
    "unknown default": (lambda m: (m / "generation_config.json").write_text('{"x": 1}'), "unknown key 'x'"),
    "default of another type": (lambda m: (m / "generation_config.json").write_text('{"steps": "a"}'), "steps is 'a'"),
    "end ids of another type": (write("generation_config.json", '{"eos_token_id": [1, "a"]}'), "eos_token_id is 'a'"),
    "frame without the message": (
        lambda m: (m / "generation_config.json").write_text('{"chat_frame": "a"}'),
        "chat_frame lacks",
    ),
    "index into another folder": (
        lambda m: (dit(m) / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x"}}'),
        "expected a file of the same folder",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_one_clear_line(damage: str, model: Path) -> None:
    harm, message = DAMAGES[damage]
    harm(model)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_all(model)
    assert "\n" not in str(caught.value)


def test_configs_that_transformers_wrote_load(model: Path) -> None:
    """What PretrainedConfig and GenerationConfig add does not concern inference; several ids may end a text."""
    written = {
        "_name_or_path": "x", "return_dict": True, "tie_word_embeddings": True, "use_cache": True, "max_length": 20,
        "id2label": {"0": "LABEL_0"}, "pruned_heads": {}, "eos_token_id": [0, 1], "pad_token_id": None,
        "temperature": 1.0, "top_k": 50, "torch_dtype": "float32", "quantization_config": None,
    }  # fmt: skip
    for folder in (vae(model), dit(model)):
        edit(folder / "config.json", **written)
    generation = {"eos_token_id": [0, 3], "max_length": 20, "use_cache": True, "do_sample": False, "pad_token_id": 2}
    (model / "generation_config.json").write_text(json.dumps(generation))
    checkpoint = Checkpoint.open(model)
    assert checkpoint.defaults.eos_token_id == (0, 3)
    load_all(model)


def test_each_half_of_the_vae_loads_without_the_other_ones_weights(model: Path) -> None:
    path = vae(model) / "model.safetensors"
    tensors = load_file(path)
    for half in ("encoder", "decoder"):
        needed = f"{half}."
        save_file({n: t for n, t in tensors.items() if n.startswith(needed)}, path, {"format": "pt"})
        loaded = load(Checkpoint.open(model), half, CPU, torch.float32)
        of_half = [t.numel() for n, t in tensors.items() if n.startswith(needed)]
        assert sum(not parameter.is_meta for parameter in loaded.parameters()) == len(of_half)
        assert Checkpoint.open(model).shape_of(half).parameters == sum(of_half)


MEASURE = """
import sys, torch
from colaserve_services.model.checkpoint import Checkpoint
from colaserve_services.model.loading import load
def anonymous(key):
    return next(1024 * int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(key))
checkpoint = Checkpoint.open(sys.argv[1])
torch.ones(10) @ torch.ones(10, 10)
peak = before = anonymous("RssAnon")
def watch(done, total):
    global peak
    peak = max(peak, anonymous("RssAnon"))
model = load(checkpoint, sys.argv[2], torch.device("cpu"), getattr(torch, sys.argv[3]), watch)
watch(0, 0)
print(peak - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(("part", "dtype"), [("encoder", "bfloat16"), ("decoder", "float32"), ("prior", "bfloat16")])
def test_loading_holds_one_tensor_twice_at_most(part: str, dtype: str, tmp_path: Path) -> None:
    model = write_checkpoint(
        tmp_path / "model",
        vae={"dim": 512, "ffn_dim": 2048, "num_heads": 8, "vocab_size": 4096},
        dit={"txt_dim": 512, "emb_dim": 512, "heads": 8, "head_dim": 64, "num_layers": 4},
    )
    folder = Checkpoint.open(model).dit if part == "prior" else Checkpoint.open(model).vae
    kept = [e for n, e in folder.entries.items() if part == "prior" or n.startswith(part)]
    itemsize = 4 if dtype == "float32" else 2
    weights = sum(entry.nbytes for entry in kept) // 4 * itemsize
    largest = max(entry.nbytes for entry in kept)
    command = [sys.executable, "-c", MEASURE, str(model), part, dtype]
    used = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert weights * 0.9 < used < 1.6 * weights + largest  # all tensors twice: 2 in float32, 3 in bfloat16
