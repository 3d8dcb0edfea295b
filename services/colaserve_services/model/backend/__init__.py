"""How engines reach a device: rows over pages in, results out. They know what is in this file, and `pick`.

A *row* is one block of B latents in a pass: a chunk of a prompt, a finished block on its way into the KV cache, or a
point where a solver wants the velocity. All are the same to a pass: within a block all positions see each other, so a
row's length is its mask. Its keys and values are written into a page of B positions, whether that page is kept or not.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

from torch import Tensor

from colaserve_services.model.backend.pages import Pages

P = TypeVar("P")

# What a decoder's pass does last: logits (K, B * P, V) of the rows wanted to tensors (K, ...), all on the device.
Then = Callable[[Tensor], Sequence[Tensor]]


class Update(NamedTuple):
    """z <- z * latents + v * velocity + v_previous * previous + eps * noise, eps standard normal."""

    latents: float
    velocity: float
    previous: float = 0.0
    noise: float = 0.0
    keeps: bool = False  # this velocity is v_previous from now on


class Denoise(NamedTuple):
    """What the velocity at a row does to the latents z of a slot."""

    slot: int
    update: Update
    guidance: float | None = None  # v_u + g (v_c - v_u), at the cost of an unconditional row; None: v_c
    pinned: Tensor | None = None  # (B,) bool: positions that are at time 0 and stay as they are
    noise: Tensor | None = None  # (B, d), for update.noise
    # (k, d + 2), each row a direction w, a bias b and a scale s: -s sigmoid(-(w . x0 + b)) w is added to the velocity,
    # for the x0 = z - (t/T) v that it has before. b = -inf makes the sigmoid 1. See `flow.steer`.
    steering: Tensor | None = None


class Row(NamedTuple):
    """One block of a sequence. Rows of one sequence are neighbours in a pass, earlier blocks first."""

    pages: Sequence[int]  # an array("i") with the page of each block of the sequence, this one included
    block: int  # its number in the sequence
    inputs: Tensor | None  # (B, d) float32 latents, or (B * P,) ids for an encoder; None: those of the slot
    time: float = 0.0  # t of the positions, 0..1000
    denoise: Denoise | None = None
    wanted: bool = True  # whether a decoder gives logits

    @property
    def guided(self) -> bool:
        """Whether a pass computes an unconditional row beside it."""
        return self.denoise is not None and self.denoise.guidance is not None


class Sizes(NamedTuple):
    """Of what a backend makes at start."""

    kv_bytes: int  # for pages, at most
    slots: int  # sessions that run at once
    block_size: int
    max_context: int  # positions of a sequence

    def pages(self, page_bytes: int) -> int:
        """So many fit, and no more than sessions can use."""
        return min(self.kv_bytes // page_bytes, (self.slots + 1) * (self.max_context // self.block_size + 1))


class Denoised(NamedTuple):
    """What a prior gives for a row with `denoise`; all (B, d) float32 on the device, good until the next pass."""

    latents: Tensor  # z after the update
    velocity: Tensor  # guided and steered
    clean: Tensor  # x0 = z - (t/T) v, what the block would end as
    branches: tuple[Tensor, Tensor] | None = None  # v_c and v_u of a guided row


class Pass(Protocol):
    """A pass that runs or has run."""

    @property
    def seconds(self) -> float | None:
        """That the device took, of one that is done; None: as long as it took to be done."""

    def done(self) -> bool:
        """Whether `results` would not wait."""

    def results(self) -> Sequence[Any]:
        """One for each row: `Denoised` or None (prior); logits (B * P, V) on the device or None (decoder; with `then`
        also its row of what that gave, on the CPU); mean and log variance, (B, d) each (encoder). Waits for the pass;
        raises what it failed with."""


class Failed(NamedTuple):
    """A pass that could not start."""

    error: Exception
    seconds: float | None = None

    def done(self) -> bool:
        return True

    def results(self) -> Sequence[Any]:
        raise self.error


class Backend(Protocol[P]):
    """A network on a device, and the pool of pages for its keys and values.

    A pass that raises has changed no slot: its rows can be planned and run again, some of them without the others too.
    One more may be planned and run while a pass is not done: it computes after that, or not if that raises.
    """

    pages: Pages
    page_bytes: int

    def cost(self, before: int) -> float:
        """Of a block that sees so many before it; the unit is one that sees none."""

    def plan(self, rows: Sequence[Row]) -> P:
        """What a pass over these rows needs, on its way to the device."""

    def run(self, plan: P) -> Pass:
        """Start the pass. A decoder's takes `then` beside the plan."""

    def prepare(self, times: Sequence[float]) -> None:
        """Of a prior: compute what these times do to the network, before a pass needs it."""

    def warm(self) -> Sequence[Tensor]:
        """Compute anew what the first request should not wait for; its numbers, to be looked at. Changes no session."""
