"""What velocities do to latents: guidance, steering, the solver, noise and what is pinned; all slots in one launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from colaserve_services.model.backend.ops import BEGINS, KEEPS
from colaserve_services.model.kernels.registry import launch, padded, warps_of

COLUMNS = 8  # of `entries` and `numbers`


@triton.jit
def _update(
    velocity, latents, z, previous, entries, numbers, pinned, noise, steering, out,
    B: tl.constexpr, D: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    e = tl.program_id(0).to(tl.int64)
    entry, number = entries + e * COLUMNS, numbers + e * COLUMNS
    row = tl.load(entry).to(tl.int64)
    if row >= 0:
        i, channel = tl.arange(0, POSITIONS)[:, None], tl.arange(0, CHANNELS)[None, :]
        seen = (i < B) & (channel < D)
        at = i * D + channel
        flags = tl.load(entry + 3)
        old = tl.load(latents + row * (B * D) + at, seen, 0.0)
        conditional = tl.load(velocity + row * (B * D) + at, seen, 0.0).to(tl.float32)
        unconditional, v = conditional, conditional
        other = tl.load(entry + 1).to(tl.int64)
        if other >= 0:
            unconditional = tl.load(velocity + other * (B * D) + at, seen, 0.0).to(tl.float32)
            v = unconditional + tl.load(number + 5) * (conditional - unconditional)
        time = tl.load(number)
        clean = old - time * v
        term = tl.zeros([POSITIONS, CHANNELS], tl.float32)
        probe = steering + tl.load(entry + 5).to(tl.int64) * (D + 2)
        for _ in range(tl.load(entry + 6)):
            direction = tl.load(probe + channel, channel < D, 0.0)
            logit = tl.sum(clean * direction, 1, keep_dims=True) + tl.load(probe + D)
            term -= tl.load(probe + D + 1) * tl.sigmoid(-logit) * direction
            probe += D + 2
        v += term
        slot = tl.load(entry + 2).to(tl.int64) * (B * D)
        before = tl.load(previous + slot + at, seen & (flags & 2 == 0), 0.0)
        new = tl.load(number + 1) * old + tl.load(number + 2) * v + tl.load(number + 3) * before
        drawn = tl.load(entry + 4).to(tl.int64)
        new += tl.load(number + 4) * tl.load(noise + drawn * (B * D) + at, seen & (drawn >= 0), 0.0)
        stays = tl.load(pinned + e * B + i, i < B, 0) != 0
        new, clean = tl.where(stays, old, new), tl.where(stays, old, old - time * v)
        tl.store(z + slot + at, new, seen)
        tl.store(previous + slot + at, tl.where(flags & 1 != 0, v, before), seen)
        given = out + e * (5 * B * D) + at
        tl.store(given, new, seen)
        tl.store(given + B * D, v, seen)
        tl.store(given + 2 * B * D, clean, seen)
        tl.store(given + 3 * B * D, conditional, seen)
        tl.store(given + 4 * B * D, unconditional, seen)


def update_reference(
    velocity: Tensor, latents: Tensor, z: Tensor, previous: Tensor, entries: Tensor, numbers: Tensor, pinned: Tensor,
    noise: Tensor, steering: Tensor,
) -> Tensor:  # fmt: skip
    out = torch.empty(len(entries), 5, *z.shape[1:])
    rows = velocity.float().view(-1, *z.shape[1:])
    for e, ((row, other, slot, flags, drawn, first, count, _), (t, a, b, c, d, g, *_)) in enumerate(
        zip(entries.tolist(), numbers.tolist(), strict=True)
    ):
        if row < 0:
            continue
        old, conditional = latents[row], rows[row]
        unconditional = rows[other] if other >= 0 else conditional
        v = unconditional + (g if other >= 0 else 1.0) * (conditional - unconditional)
        w, bias, scale = steering[first : first + count].split((z.shape[2], 1, 1), dim=1)
        v = v - (torch.sigmoid(-((old - t * v) @ w.T + bias.T)) * scale.T) @ w
        before = torch.zeros_like(v) if flags & BEGINS else previous[slot].clone()
        new = a * old + b * v + c * before + (d * noise[drawn] if drawn >= 0 else 0.0)
        stays = pinned[e, :, None]
        out[e] = torch.stack((new.where(~stays, old), v, (old - t * v).where(~stays, old), conditional, unconditional))
        z[slot], previous[slot] = out[e, 0], v if flags & KEEPS else before
    return out


@torch.library.custom_op("colaserve::update", mutates_args=("z", "previous"))
def update(
    velocity: Tensor, latents: Tensor, z: Tensor, previous: Tensor, entries: Tensor, numbers: Tensor, pinned: Tensor,
    noise: Tensor, steering: Tensor,
) -> Tensor:  # fmt: skip
    """Of E entries (E, 5, B, d) float32: z after it, the velocity with guidance and steering, x0 = z - (t/T) v, and the
    velocities that were guided, with and without the condition.

    velocity (N B, d) and latents (N, B, d): of the rows that `entries` counts. z and previous (slots, B, d) float32 are
    those of `Update`, changed in place. entries (E, 8) int32: a row, or -1 for an entry that is none; its unconditional
    row or -1; a slot, in no other entry; flags of `ops`; a row of `noise` (K, B, d) or -1; the first of its rows of
    `steering` (M, d + 2), as in `Denoise`, and how many. numbers (E, 8) float32: t/T, the four of `Update`, guidance.
    pinned (E, B) bool: positions that stay as they are.
    """
    given = (velocity, latents, z, previous, entries, numbers, pinned, noise, steering)
    assert all(t.is_contiguous() for t in given), "all is read as it lies"
    B, D = z.shape[1:]
    assert entries.shape == numbers.shape == (len(entries), COLUMNS)
    assert (pinned.shape, noise.shape[1:], steering.shape[1]) == ((len(entries), B), (B, D), D + 2)
    out = torch.empty(len(entries), 5, B, D, device=z.device)
    sizes = {"B": B, "D": D, "POSITIONS": padded(B), "CHANNELS": padded(D), "COLUMNS": COLUMNS}
    launch(_update, (len(entries),), *given, out, **sizes, warps=warps_of(padded(B) * padded(D)))
    return out


update.register_fake(lambda velocity, latents, z, previous, entries, *_: z.new_empty(len(entries), 5, *z.shape[1:]))
