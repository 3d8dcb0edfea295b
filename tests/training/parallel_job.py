"""What each process of a torchrun does in test_parallel.py: train a tiny prior and write its losses and weights."""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from colaserve_training.config import OptimizerConfig, RunConfig
from colaserve_training.parallel import started
from colaserve_training.prior_stage import PriorObjective
from colaserve_training.release import new_dit, new_vae
from colaserve_training.rows import ListSource, Row
from colaserve_training.trainer import Trainer
from tests.training.conftest import dit_config, vae_config

ROWS = [Row(tuple(range(3 + k, 12 + 2 * k)), prompt=k) for k in range(6)]
RUN = RunConfig(steps=6, rows=4, micro_batches=2, ema=0.999, check_every=0, optimizer=OptimizerConfig(adamw_lr=1e-2))


def main(folder: Path, mode: str) -> None:
    torch.set_num_threads(1)
    with started("cpu", mode) as parallel:
        torch.manual_seed(0)
        vae, dit = new_vae(vae_config()), new_dit(dit_config(layers=2))
        objective = PriorObjective(dit, vae, 2)
        trainer = Trainer(objective, ListSource(ROWS, 0), RUN, folder, parallel, quiet=True)
        trainer.run()
        weights = trainer.result()
        if parallel.rank == 0:
            save_file(weights["dit"], folder / "weights.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
