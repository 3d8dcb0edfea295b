"""The prior's network in float32 gives the recorded velocities."""

import pytest
import torch

from colaserve_services.model.attention import RaggedAttention, Segment
from colaserve_services.model.checkpoint import Checkpoint
from colaserve_services.model.loading import load
from tests.conftest import Golden

BOUND = 3e-6  # relative; 1e-4 would not tell a wrong epsilon or the wrong GELU


def assert_recorded(velocity: torch.Tensor, expected: torch.Tensor) -> None:
    assert ((velocity - expected).norm() / expected.norm()).item() < BOUND


@pytest.mark.parametrize("branch", ["cond", "uncond"])
@torch.inference_mode()
def test_velocities_are_the_recorded_ones(golden: Golden, branch: str) -> None:
    model = load(Checkpoint.open(golden.directory), "prior", torch.device("cpu"), torch.float32)
    B, tensors = model.config.block_size, golden.tensors
    lengths = tensors["dit.prefix_lengths"].tolist()
    prefixes, outputs = (tensors[name].split(lengths) for name in ("dit.prefix", "dit.prefix_out"))
    for i, (prefix, recorded) in enumerate(zip(prefixes, outputs, strict=True)):
        block = slice(i * B, (i + 1) * B)
        before = prefix if branch == "cond" else prefix[:0]
        z, positions = torch.cat((before, tensors["dit.block"][block])), torch.arange(len(before) + B)
        t = torch.cat((torch.zeros(len(before)), tensors["dit.timestep"][block]))
        velocity = model(z, t, positions, RaggedAttention([Segment(len(z))], B, model.device))
        assert_recorded(velocity[len(before) :], tensors[f"dit.{branch}"][block])
        if branch == "cond":  # no position sees a later block
            assert_recorded(velocity[: len(before)], recorded)
