"""Checkpoints in the released layout: opened and checked as a whole; `loading.py` makes networks of them.

<model>/cola_dlm/cola_dit/   config.json, model.safetensors or shards with model.safetensors.index.json
<model>/cola_dlm/cola_vae/   likewise
<model>/tokenizer.json       and, optionally, generation_config.json
"""

from pathlib import Path

from colaserve_services.errors import CheckpointError
from colaserve_services.model.config import ModelShape, check_pair, load_dit_config, load_vae_config
from colaserve_services.model.generation_config import GenerationDefaults, read_generation_config
from colaserve_services.model.weights import WeightFolder


class Checkpoint:
    """A checkpoint whose configs, headers and defaults have been read and found sound; weights are read later."""

    def __init__(self, directory: Path):
        self.directory = directory
        if not directory.is_dir():
            raise CheckpointError(f"{directory}: no such folder")
        self.name = _name(directory.resolve())
        self.tokenizer_path = directory / "tokenizer.json"
        if not self.tokenizer_path.is_file():
            raise CheckpointError(f"{self.tokenizer_path}: no such file")
        vae_folder, dit_folder = (directory / "cola_dlm" / name for name in ("cola_vae", "cola_dit"))
        self.vae_config = load_vae_config(vae_folder / "config.json")
        self.dit_config = load_dit_config(dit_folder / "config.json")
        check_pair(self.vae_config, self.dit_config)
        self.vae, self.dit = WeightFolder(vae_folder), WeightFolder(dit_folder)
        self.space = self.vae.fingerprint()
        own = directory / "generation_config.json"
        self.defaults = read_generation_config(own) if own.is_file() else GenerationDefaults()

    @classmethod
    def open(cls, directory: Path | str) -> "Checkpoint":
        """Open a folder in the released layout; raise `CheckpointError`, one line, if it cannot be served."""
        return cls(Path(directory))

    @property
    def shape(self) -> ModelShape:
        """Of the whole model; `parameters` counts all stages."""
        return self._shape(self.vae.elements() + self.dit.elements())

    def shape_of(self, stage: str) -> ModelShape:
        """The shape with the parameters of one stage alone: "encoder", "prior" or "decoder"."""
        return self._shape(self.dit.elements() if stage == "prior" else self.vae.elements(f"{stage}."))

    def weights_of(self, stage: str) -> str:
        """Fingerprint of the folder that the weights of one stage lie in."""
        return self.dit.fingerprint() if stage == "prior" else self.space

    def _shape(self, parameters: int) -> ModelShape:
        vae, dit = self.vae_config, self.dit_config
        return ModelShape(
            vae.latent_dim, dit.block_size, vae.block_size, vae.patch_size, vae.vocab_size, parameters=parameters
        )


def _name(folder: Path) -> str:
    """The folder's, or the Hub id of a snapshot in the Hub's cache: models--OWNER--NAME/snapshots/COMMIT."""
    repository = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/")
    return folder.name
