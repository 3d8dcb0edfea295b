"""Stage 1's losses, written out at tiny size."""

from dataclasses import replace

import pytest
import torch
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F

from colaserve_training.config import VaeLossConfig
from colaserve_training.release import new_vae
from colaserve_training.rows import Row, micro_batches
from colaserve_training.vae_stage import VaeObjective, kl_to_standard_normal
from tests.training.conftest import vae_config

ROWS = [Row((5, 6, 7, 8, 9)), Row((4, 3)), Row((11, 12, 13, 14))]
LOSS = VaeLossConfig(masked_tokens=0.3, masked_rows=0.7)


@pytest.fixture
def vae():
    torch.manual_seed(0)
    return new_vae(vae_config())


def stage(vae, loss=LOSS):
    return VaeObjective(vae, 2, 4, loss)


def drawn(vae, groups=(ROWS,), loss=LOSS):
    return stage(vae, loss).draw(groups, "seed", 0, 1)


def test_kl_is_that_of_the_normal_distributions():
    mean, log_variance = torch.randn(3, 5), torch.randn(3, 5)
    expected = kl_divergence(Normal(mean, (0.5 * log_variance).exp()), Normal(0.0, 1.0)).sum(-1)
    torch.testing.assert_close(kl_to_standard_normal(mean, log_variance), expected)


def test_one_steps_losses_are_the_equation_written_out(vae):
    (batch,) = drawn(vae)
    parts = stage(vae)(batch)
    shown = batch.ids.clone()
    shown[batch.masked] = vae.config.vocab_size
    mean, log_variance = vae.encode(shown)
    z = mean + (0.5 * log_variance).exp() * batch.noise + batch.decoder_noise
    logits = vae.decode(z)
    kept, hidden, kl = [], [], []
    for row in range(3):
        for place in range(4 * (1 + (row == 0))):  # whole blocks of the row; what is past them does not count
            error = F.cross_entropy(logits[row, place], batch.ids[row, place])
            (hidden if batch.masked[row, place] else kept).append(error)
            kl.append(kl_to_standard_normal(mean[row, place], log_variance[row, place]))
    expected = [torch.stack(values).mean() for values in (kept, kl, hidden)]
    torch.testing.assert_close(
        torch.stack([parts[n] for n in ("reconstruction", "kl", "masking")]), torch.stack(expected)
    )
    total = expected[0] + LOSS.kl * expected[1] + LOSS.masking * expected[2]
    torch.testing.assert_close(parts["loss"], total)


def test_micro_batches_sum_to_the_whole_step(vae):
    rows, loss = [*ROWS, Row((7, 7, 7, 7, 7, 7))], VaeLossConfig(masked_rows=0, decoder_noise=0)
    sums = [
        sum(stage(vae, loss)(batch)["kl"].detach() for batch in drawn(vae, micro_batches(rows, k), loss))
        for k in (1, 2)
    ]
    torch.testing.assert_close(*sums)


def test_latents_are_scaled_and_shifted_as_they_are_served(vae):
    scaled = new_vae(replace(vae.config, scaling_factor=1.7, shifting_factor=0.25))
    scaled.load_state_dict(vae.state_dict())
    (batch,) = drawn(vae)
    torch.testing.assert_close(stage(scaled)(batch)["kl"], stage(vae)(batch)["kl"])
    torch.testing.assert_close(scaled.encode(batch.ids)[0], (vae.encode(batch.ids)[0] - 0.25) * 1.7)
