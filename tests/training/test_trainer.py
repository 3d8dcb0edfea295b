"""The loop: what it computes does not depend on interruptions, micro-batches or where a state came from."""

import json
from dataclasses import replace

import pytest
import torch

from colaserve_services.errors import CheckpointError, UsageError
from colaserve_services.training.config import FlowConfig, JointConfig, OptimizerConfig, RunConfig
from colaserve_services.training.init import new_dit, new_vae
from colaserve_services.training.optim import Ema, build_optimizers, rate_at
from colaserve_services.training.prior_stage import PriorStage
from colaserve_services.training.rows import ListSource, Row
from colaserve_services.training.trainer import Trainer
from tests.training.conftest import dit_config, vae_config

ROWS = [Row(tuple(range(3 + k, 12 + 2 * k)), prompt=k) for k in range(7)]
RUN = RunConfig(
    steps=12, rows=4, save_every=4, optimizer=OptimizerConfig(adamw_lr=1e-2, muon_lr=1e-2, warmup=3), ema=0.9
)


def trainer(folder, run=RUN, joint=None):
    torch.manual_seed(0)
    vae, dit = new_vae(vae_config()), new_dit(dit_config())
    stage = PriorStage(dit, vae, ListSource(ROWS, run.seed), run, FlowConfig(), 2, joint)
    return Trainer(stage, run, folder, quiet=True)


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("joint", [None, JointConfig()], ids=["prior", "joint"])
def test_a_killed_and_resumed_run_equals_an_undisturbed_one_loss_by_loss(tmp_path, joint):
    whole = trainer(tmp_path / "whole", joint=joint)
    whole.run()
    trainer(tmp_path / "parts", joint=joint).run(until=7)  # killed three steps after its last state
    torch.manual_seed(99)
    resumed = trainer(tmp_path / "parts", joint=joint)
    resumed.run(resume=True)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    weights = resumed.ema_weights()
    assert all(torch.equal(value, weights[name]) for name, value in whole.ema_weights().items())


def test_training_lowers_the_loss_and_leaves_curves(tmp_path):
    run = trainer(tmp_path, replace(RUN, steps=60))
    run.run()
    values = losses(tmp_path)
    assert sum(values[-10:]) < 0.9 * sum(values[:10])
    assert (tmp_path / "loss.png").stat().st_size > 1000


def test_states_are_safetensors_and_json_and_only_the_newest_are_kept(tmp_path):
    trainer(tmp_path, replace(RUN, save_every=2)).run()
    found = sorted(path.name for path in (tmp_path / "state").iterdir())
    assert found == ["step-00000010", "step-00000012"]
    assert {path.suffix for path in (tmp_path / "state").glob("*/*")} == {".safetensors", ".json"}


def test_a_run_is_not_resumed_under_other_settings(tmp_path):
    trainer(tmp_path).run(until=4)
    with pytest.raises(UsageError, match=r"rows was 4 and is now 6; resume with the same settings"):
        trainer(tmp_path, replace(RUN, rows=6)).run(resume=True)


def test_a_damaged_state_is_one_clear_line(tmp_path):
    trainer(tmp_path).run(until=4)
    (tmp_path / "state" / "step-00000004" / "tensors.safetensors").write_bytes(b"broken")
    with pytest.raises(CheckpointError, match="not a readable training state"):
        trainer(tmp_path).run(resume=True)


def test_rows_must_split_into_passes_and_processes(tmp_path):
    with pytest.raises(UsageError, match="rows: got 4, expected a multiple of micro_batches x processes = 3"):
        trainer(tmp_path, replace(RUN, micro_batches=3))


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    run = trainer(tmp_path)
    with torch.no_grad():
        run.stage.dit.txt_in.proj.weight.fill_(float("nan"))
    with pytest.raises(UsageError, match="the loss is not finite"):
        run.run()


def test_gradients_are_clipped_to_the_bound(tmp_path):
    run = trainer(tmp_path, replace(RUN, optimizer=OptimizerConfig(clip=1e-4)))
    parts = [run._backward(batch) for batch in run._batches()]
    assert parts
    assert run._clip() > 1e-4
    norms = torch.stack([p.grad.norm() for p in run.stage.dit.parameters() if p.grad is not None])
    assert norms.norm() == pytest.approx(1e-4, rel=1e-3)


def test_muon_has_the_matrices_of_blocks_and_adamw_all_else():
    dit = new_dit(dit_config())
    optimizers = build_optimizers(dit, OptimizerConfig(muon_lr=0.02))
    owned = {name: {id(p) for g in opt.param_groups for p in g["params"]} for name, opt in optimizers.items()}
    for name, value in dit.named_parameters():
        if value.requires_grad:
            expected = "muon" if name.startswith("blocks.") and value.ndim == 2 else "adamw"
            assert [key for key, ids in owned.items() if id(value) in ids] == [expected], name


def test_the_rate_warms_up_stays_and_falls_to_its_end():
    config = OptimizerConfig(warmup=10, cooldown=0.5, final=0.1)
    assert [rate_at(step, 100, config) for step in (0, 4, 9, 49)] == [0.1, 0.5, 1, 1]
    assert rate_at(75, 100, config) == pytest.approx(0.55)
    assert rate_at(99, 100, config) == pytest.approx(0.1, abs=0.01)


def test_averaged_weights_follow_the_formula():
    value = torch.zeros(1)
    ema = Ema([("w", value)], decay=0.5)
    for step, new in enumerate((1.0, 2.0)):
        ema.update([("w", torch.tensor([new]))], step)
    first = 0.9  # decay 1/10 at step 0
    assert ema.values["w"].item() == pytest.approx(first + (1 - 2 / 11) * (2 - first))


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"steps": 0}, "steps: got 0, expected at least 1"),
        ({"rows": -1}, "rows: got -1, expected at least 1"),
        ({"micro_batches": 9}, r"micro_batches: got 9, expected 1 to rows \(4\)"),
        ({"ema": 1.0}, "ema: got 1.0, expected 0"),
    ],
)
def test_impossible_settings_are_named(change, line):
    with pytest.raises(UsageError, match=line):
        replace(RUN, **change)


def test_impossible_flow_settings_are_named():
    with pytest.raises(UsageError, match="empty_history: got 2, expected a share from 0 to 1"):
        FlowConfig(empty_history=2)
