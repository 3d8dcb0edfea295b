"""The loop: what it computes does not depend on interruptions, micro-batches or where a state came from."""

import json
import re
import signal
from dataclasses import dataclass, replace

import pytest
import torch

from colaserve_services.errors import CheckpointError, UsageError
from colaserve_services.model.config import DiTConfig, TextVAEConfig, check_pair
from colaserve_services.model.cpu_features import lacks_bfloat16
from colaserve_training.config import PRESETS, OptimizerConfig, RunConfig, full_rate
from colaserve_training.metrics import plot_losses
from colaserve_training.optim import Ema, Muon, build_optimizers, rate_at
from colaserve_training.prior_stage import JointObjective, PriorObjective
from colaserve_training.release import checkpoint_folder, load_vae, new_dit, new_vae
from colaserve_training.rows import ListSource, Row
from colaserve_training.trainer import Stop, Stopped, Trainer
from tests.training.conftest import dit_config, vae_config

ROWS = [Row(tuple(range(3 + k, 12 + 2 * k)), prompt=k) for k in range(7)]
RUN = RunConfig(
    steps=12,
    rows=4,
    save_every=4,
    check_every=0,
    optimizer=OptimizerConfig(adamw_lr=1e-2, muon_lr=1e-2, warmup=3),
    ema=0.9,
)


@dataclass(frozen=True)
class Interrupting(ListSource):
    """Rows whose step `at` brings a signal along, or the end of the process."""

    at: int = -1
    stop: Stop | None = None

    def rows(self, step, count, first=None):
        if step == self.at:
            if self.stop is None:
                raise KeyboardInterrupt
            self.stop.signal = signal.SIGTERM
        return super().rows(step, count, first)


def trainer(folder, run=RUN, objective=PriorObjective, at=-1, stop=None, quiet=True, **surroundings):
    torch.manual_seed(0)
    vae, dit = new_vae(vae_config()), new_dit(dit_config())
    source = Interrupting(ROWS, run.seed, at, stop)
    return Trainer(objective(dit, vae, 2), source, run, folder, quiet=quiet, stop=stop or Stop(), **surroundings)


def killed(folder, at, **options):
    with pytest.raises(KeyboardInterrupt):
        trainer(folder, at=at, **options).run()


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("objective", [PriorObjective, JointObjective])
def test_a_killed_and_resumed_run_equals_an_undisturbed_one_loss_by_loss(tmp_path, objective):
    whole = trainer(tmp_path / "whole", objective=objective)
    whole.run()
    killed(tmp_path / "parts", 7, objective=objective)  # three steps after its last state
    torch.manual_seed(99)
    resumed = trainer(tmp_path / "parts", objective=objective, resume=True)
    resumed.run()
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    for network, weights in whole.result().items():
        assert all(torch.equal(value, resumed.result()[network][name]) for name, value in weights.items())


def test_a_signal_ends_the_run_after_its_step_with_a_state_that_continues_exactly(tmp_path):
    trainer(tmp_path / "whole").run()
    with pytest.raises(Stopped, match=r"stopped after step 6 of 12; saved as .*step-00000006") as stopped:
        trainer(tmp_path / "parts", at=5, stop=Stop()).run()
    assert stopped.value.exit_code == 143
    trainer(tmp_path / "parts", resume=True).run()
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_what_is_resumed_is_said_and_that_a_run_without_a_state_starts_from_the_first_step(tmp_path, capsys):
    trainer(tmp_path, resume=True, quiet=False, at=11, stop=Stop()).run()  # a signal in the last step changes nothing
    assert f"prior: no state in {tmp_path}; starting from the first step" in capsys.readouterr().out
    trainer(tmp_path, resume=True, quiet=False).run()
    assert f"prior: resuming from {tmp_path}/state/step-00000012 (step 12 of 12)" in capsys.readouterr().out


def test_a_damaged_state_falls_back_to_the_one_before_with_a_warning(tmp_path, capsys):
    trainer(tmp_path / "whole").run()
    killed(tmp_path / "parts", 9)
    (tmp_path / "parts" / "state" / "step-00000008" / "tensors.safetensors").write_bytes(b"broken")
    with (tmp_path / "parts" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')  # as a process leaves it that is killed in writing
    trainer(tmp_path / "parts", resume=True, quiet=False).run()
    output = capsys.readouterr().out
    assert "step-00000008: not a readable training state" in output
    assert "trying the state before it" in output
    assert "step-00000004 (step 4 of 12)" in output
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_a_state_that_cannot_be_written_is_said_and_ends_no_run(tmp_path, capsys):
    (tmp_path / "state").write_text("a file where the folder of states should be")
    run = trainer(tmp_path, quiet=False)
    run.run()
    assert run.step == 12
    assert "warning: step 4: its state could not be saved" in capsys.readouterr().out


def test_training_lowers_the_loss_and_leaves_curves_which_raise_nothing_when_they_cannot_be_drawn(tmp_path, capsys):
    trainer(tmp_path, replace(RUN, steps=40)).run()
    values = losses(tmp_path)
    assert sum(values[-10:]) < 0.9 * sum(values[:10])
    picture = tmp_path / "loss.png"
    plot_losses(tmp_path)
    assert picture.stat().st_size > 1000
    picture.unlink()
    picture.mkdir()
    plot_losses(tmp_path)
    assert "loss.png: not drawn (IsADirectoryError" in capsys.readouterr().out


def test_held_out_rows_give_a_validation_loss_of_the_averaged_weights(tmp_path):
    checked = trainer(tmp_path / "checked", replace(RUN, check_every=6), held_out=ROWS[:6])
    checked.run()
    trainer(tmp_path / "plain").run()
    rows = [json.loads(line) for line in (tmp_path / "checked" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "validation" in row] == [5, 11]
    assert losses(tmp_path / "checked") == losses(tmp_path / "plain")  # a check changes nothing
    objective = checked.objective
    objective.dit.load_state_dict(checked.result()["dit"])
    parts = [objective(objective.draw([rows], "validation", 0, 1)[0])["loss"].item() for rows in (ROWS[:4], ROWS[4:6])]
    assert rows[-1]["validation"] == pytest.approx(sum(parts) / 2, rel=1e-5)


def test_progress_tells_the_time_left_and_sample_texts_and_only_the_newest_states_are_kept(tmp_path, capsys):
    run = replace(RUN, check_every=6, log_every=5, save_every=2)
    trainer(tmp_path, run, quiet=False, samples=lambda: ["a text", "another"]).run()
    output = capsys.readouterr().out
    assert "  step 6: 'a text'\n  step 6: 'another'" in output
    assert output.count("a text") == 2
    assert re.search(r"prior 6/12 .* step/s  ETA 0:00:\d\d", output)
    assert sorted(path.name for path in (tmp_path / "state").iterdir()) == ["step-00000010", "step-00000012"]
    assert {path.suffix for path in (tmp_path / "state").glob("*/*")} == {".safetensors", ".json"}


def test_a_run_is_not_resumed_under_other_settings(tmp_path):
    killed(tmp_path, 5)
    with pytest.raises(UsageError, match=r"rows was 4 and is now 6; resume with the same settings"):
        trainer(tmp_path, replace(RUN, rows=6), resume=True).run()
    with pytest.raises(UsageError, match=r"data was  and is now other; resume with the same settings"):
        trainer(tmp_path, resume=True, data="other").run()
    trainer(tmp_path, replace(RUN, save_every=3, log_every=7, check_every=5), resume=True).run()


def test_states_that_are_all_damaged_are_one_clear_line_and_a_new_run_leaves_none(tmp_path):
    killed(tmp_path, 5)
    (tmp_path / "state" / "step-00000004" / "tensors.safetensors").write_bytes(b"broken")
    with pytest.raises(CheckpointError, match="not a readable training state"):
        trainer(tmp_path, resume=True).run()
    killed(tmp_path, 1)
    assert not (tmp_path / "state").exists()


def test_rows_that_do_not_split_into_passes_and_a_loss_that_is_not_finite_are_refused(tmp_path):
    with pytest.raises(UsageError, match="rows: got 4, expected a multiple of micro_batches x processes = 3"):
        trainer(tmp_path, replace(RUN, micro_batches=3))
    run = trainer(tmp_path)
    with torch.no_grad():
        run.objective.dit.txt_in.proj.weight.fill_(float("nan"))
    with pytest.raises(UsageError, match="the loss or its gradient is not finite"):
        run.run()
    assert not (tmp_path / "state").exists()


def test_muon_has_the_matrices_of_blocks_and_adamw_all_else():
    dit = new_dit(dit_config())
    optimizers = build_optimizers(dit, OptimizerConfig(muon_lr=0.02))
    owned = {name: {id(p) for g in opt.param_groups for p in g["params"]} for name, opt in optimizers.items()}
    for name, value in dit.named_parameters():
        if value.requires_grad:
            expected = "muon" if name.startswith("blocks.") and value.ndim == 2 else "adamw"
            assert [key for key, ids in owned.items() if id(value) in ids] == [expected], name


def test_muon_is_torchs_to_the_bit_where_the_cpu_has_bfloat16_and_close_elsewhere():
    shapes = [(12, 40), (40, 12), (16, 16)]
    ours, theirs = ([torch.nn.Parameter(torch.ones(shape)) for shape in shapes] for _ in range(2))
    optimizers = (Muon(ours, lr=0.02, weight_decay=0.1), torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1))
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        for one, two in zip(ours, theirs, strict=True):
            one.grad = two.grad = torch.randn(one.shape, generator=generator)
        for optimizer in optimizers:
            optimizer.step()
    bound = 2e-2 if lacks_bfloat16() else 0
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two, rtol=bound, atol=bound)


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


@pytest.mark.parametrize("name", PRESETS)
def test_both_networks_of_a_preset_fit_each_other(name):
    vae, dit = PRESETS[name].vae_config(300), PRESETS[name].dit_config()
    check_pair(vae, dit)
    assert vae.dim == vae.num_heads * vae.head_dim
    assert dit.txt_dim == dit.heads * dit.head_dim


def test_the_released_preset_is_the_released_model_and_the_demos_is_the_bundled_one():
    released, bundled = PRESETS["released"], load_vae(checkpoint_folder("bundled")).config
    assert (released.vae, released.dit) == (TextVAEConfig(), DiTConfig())
    assert PRESETS["demo"].vae_config(bundled.vocab_size) == bundled


def test_values_that_are_given_win_over_a_preset_and_heads_keep_their_width():
    vae = PRESETS["demo"].vae_config(300, dim=64, blocks=1, block_size=4, patch_size=2)
    assert (vae.dim, vae.ffn_dim, vae.num_heads, vae.encoder_num_blocks, vae.decoder_num_blocks) == (64, 256, 2, 1, 1)
    assert (vae.block_size, vae.patch_size, vae.vocab_size) == (4, 2, 300)
    dit = PRESETS["small"].dit_config(latent_dim=8, dim=128, num_layers=3, block_size=16)
    assert (dit.txt_dim, dit.emb_dim, dit.heads, dit.num_layers, dit.block_size) == (128, 128, 2, 3, 16)
    assert (dit.txt_in_channels, dit.txt_out_channels) == (8, 8)


def test_wide_networks_and_fine_tuning_take_smaller_rates():
    assert [full_rate(width, False) for width in (16, 192, 1920)] == pytest.approx([2e-3, 2e-3, 2e-4])
    assert full_rate(1920, True) == pytest.approx(2e-5)
