"""The pass of stage 2, position by position."""

import random

import torch

from colaserve_training.config import FlowConfig
from colaserve_training.flow_batch import clean_and_noisy_mask, draw_batch, draw_time, lay_out
from colaserve_training.rows import Row

ROWS = [Row(tuple(range(3, 14)), prompt=6), Row(tuple(range(3, 24))), Row((5, 6, 0), prompt=2)]
FLOW = FlowConfig()


def drawn(rows=ROWS, flow=FLOW, seed="s", size=4, dim=2):
    return draw_batch(rows, size, dim, 2, flow, seed)


def test_every_position_sees_what_the_method_lets_it_see():
    block, history = torch.tensor([[0, 2, 1]]), torch.tensor([[True, True, False]])
    mask = clean_and_noisy_mask(8, 4, block, history)[0]
    kinds = [("clean", place // 4, None) for place in range(8)]
    kinds += [("noisy", int(block[0, copy]), copy) for copy in range(3) for _ in range(4)]
    for query, (kind, at, copy) in enumerate(kinds):
        for key, (other, where, which) in enumerate(kinds):
            if other == "noisy":
                expected = kind == "noisy" and copy == which
            elif kind == "clean":
                expected = where <= at
            else:
                expected = bool(history[0, copy]) and where < at
            assert bool(mask[query, key]) is expected, (query, key)


def test_a_row_trains_the_blocks_from_its_prompts_end_to_its_end():
    batch = drawn(flow=FlowConfig(copies=6))
    blocks = [set(row[used].tolist()) for row, used in zip(batch.block, batch.used, strict=True)]
    assert blocks == [{1, 2}, {0, 1, 2, 3, 4, 5}, {0}]


def test_the_prompts_end_is_pinned_in_the_block_that_holds_it():
    batch = drawn(flow=FlowConfig(copies=6, pin=0))
    for row, pinned in ((0, {1: 2, 2: 0}), (1, dict.fromkeys(range(6), 0)), (2, {0: 2})):
        for block, count in zip(batch.block[row].tolist(), batch.pinned[row].tolist(), strict=True):
            assert count == pinned[block]


def test_pinned_positions_are_clean_at_time_zero_and_weigh_nothing():
    batch = drawn()
    latents = torch.randn(3, batch.ids.shape[1], 2)
    inputs = lay_out(latents, latents, batch)
    clean = latents.shape[1] - 4
    for row in range(3):
        for copy in range(batch.block.shape[1]):
            for place in range(4):
                at, where = clean + copy * 4 + place, int(batch.block[row, copy]) * 4 + place
                time, noise = batch.time[row, copy], batch.noise[row, copy, place]
                pinned = place < batch.pinned[row, copy]
                expected = latents[row, where] if pinned else (1 - time) * latents[row, where] + time * noise
                torch.testing.assert_close(inputs.values[row, at], expected)
                assert inputs.timestep[row, at] == (0 if pinned else 1000 * time)
                assert inputs.position[row, at] == where
                torch.testing.assert_close(inputs.target[row, copy * 4 + place], noise - latents[row, where])
                assert inputs.weight[row, copy * 4 + place] == float(not pinned and bool(batch.used[row, copy]))


def test_the_clean_copy_leaves_out_the_block_that_nobody_reads():
    batch = drawn(flow=FlowConfig(history_noise=0))
    latents = torch.randn(3, batch.ids.shape[1], 2)
    inputs = lay_out(latents, latents, batch)
    torch.testing.assert_close(inputs.values[:, :20], latents[:, :20])
    assert (inputs.timestep[:, :20] == 0).all()
    assert inputs.values.shape[1] == 20 + batch.block.shape[1] * 4


def test_the_count_is_what_the_weights_sum_to():
    batch = drawn(flow=FlowConfig(copies=5))
    latents = torch.randn(3, batch.ids.shape[1], 2)
    assert batch.count == lay_out(latents, latents, batch).weight.sum()


def test_shares_of_empty_history_and_pins_are_those_asked_for():
    rows = [Row(tuple(range(3, 35)))] * 200
    batch = drawn(rows, FlowConfig(copies=8, empty_history=0.25, pin=0.4))
    assert abs((~batch.history).float().mean() - 0.25) < 0.04
    assert abs((batch.pinned > 0).float().mean() - 0.4) < 0.04
    assert set(batch.pinned.unique().tolist()) == {0, 1, 2, 3}


def test_times_are_logit_normal_uniform_and_sometimes_exactly_one():
    rng = random.Random(0)
    normal = torch.tensor([draw_time(FlowConfig(uniform_time=0, pure_noise=0), rng) for _ in range(4000)])
    logits = torch.logit(normal)
    assert abs(logits.mean() - 1) < 0.06
    assert abs(logits.std() - 1) < 0.06
    uniform = torch.tensor([draw_time(FlowConfig(uniform_time=1, pure_noise=0), rng) for _ in range(4000)])
    assert abs(uniform.mean() - 0.5) < 0.02
    assert abs(uniform.std() - 12**-0.5) < 0.01
    ones = [draw_time(FlowConfig(pure_noise=0.2), rng) == 1 for _ in range(4000)]
    assert abs(sum(ones) / 4000 - 0.2) < 0.03


def test_a_batch_is_a_function_of_its_seed():
    one, again, other = drawn(seed="a"), drawn(seed="a"), drawn(seed="b")
    assert torch.equal(one.noise, again.noise)
    assert torch.equal(one.time, again.time)
    assert not torch.equal(one.noise, other.noise)


def test_processes_share_the_rows_out():
    batch = drawn(ROWS + ROWS[:1])
    parts = [batch.part(rank, 2) for rank in range(2)]
    assert torch.equal(torch.stack([parts[0].noise, parts[1].noise], 1).flatten(0, 1), batch.noise)
    assert parts[0].count == batch.count
