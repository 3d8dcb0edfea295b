"""Passes over pages in plain torch, on any device and in any dtype: the judge of the others, and the fallback.

What a pass is made of comes from `ops`; another module with the same names makes it faster where it can run.
"""

from array import array
from collections.abc import Sequence
from itertools import groupby
from types import ModuleType
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from colaserve_services.model.backend import Denoise, Denoised, Row, Sizes, Then, Update, ops
from colaserve_services.model.backend.ops import PageShape, Rows
from colaserve_services.model.backend.pages import Pages
from colaserve_services.model.dit import TIME_SCALE, DiT, DiTBlock
from colaserve_services.model.float8 import FLOAT8
from colaserve_services.model.flow import guide, steer
from colaserve_services.model.layers import Attend, Linear, padded_rows, rotary_angles, rotary_frequencies, to_device
from colaserve_services.model.modulation import ModulationTable
from colaserve_services.model.text_vae import TextVAEDecoder, TextVAEEncoder

M = TypeVar("M", bound=DiT | TextVAEDecoder | TextVAEEncoder)
V = TypeVar("V", bound=TextVAEDecoder | TextVAEEncoder)


class Finished(NamedTuple):
    """A pass that has run."""

    found: Sequence[Any]
    seconds: float | None = None

    def done(self) -> bool:
        return True

    def results(self) -> Sequence[Any]:
        return self.found


class Layout(NamedTuple):
    """Where the rows of a pass lie."""

    rows: Rows
    positions: Tensor  # (R,) of each position in its sequence


class Paged(Generic[M]):
    """The pages, their storage, and the layout of rows. A block is one row of the prior, and B / Bv of a VAE."""

    _rounding: tuple[int, ...] = ()  # of `padded_rows`, where it is another than usual

    def __init__(self, model: M, sizes: Sizes, layers: int, heads: int, head_dim: int, kernels: ModuleType = ops):
        """`kernels` has the functions of `ops`, and is used for pages that it takes."""
        self.model: M = model
        shape = PageShape(layers, sizes.block_size, heads, head_dim, model.dtype)
        self.sizes, self._kernels = sizes, kernels if kernels.takes(shape) else ops
        linear = next(each for each in model.blocks.modules() if isinstance(each, Linear))
        self._inputs = linear.inputs  # dtype of what products of layers read
        float8 = self._inputs == FLOAT8
        self._attention = self._kernels.float8_attention if float8 else self._kernels.attention
        self._row: int = model.config.block_size  # positions of a row
        operations = 2 * sizes.block_size * heads * head_dim  # of attending to a block, beside a row's own products
        self._key_cost = self._kernels.key_cost(model.dtype) * operations / model.config.layer_weights
        self.page_bytes: int = self._kernels.Storage.page_bytes(shape)
        self.pages = Pages(sizes.pages(self.page_bytes))
        self._spare = self.pages.count + sizes.slots  # a page whose content nobody reads
        self.storage = self._kernels.Storage(shape, self._spare + 1, model.device)

    def _layout(self, rows: Sequence[Row], alone: int = 0, padding: int = 0) -> Layout:
        """The given rows, then `alone` ones that see only themselves, then as many as `padding` positions take."""
        numbers = self._numbers(rows, alone, padding)
        tables, table, history, own, positions = (to_device(torch.from_numpy(x), self.model.device) for x in numbers)
        longest = int(numbers[2].max(initial=0))
        return Layout(Rows(self._row, tables, table, history, own, self._rotary(positions), longest), positions)

    def _numbers(self, rows: Sequence[Row], alone: int, padding: int) -> tuple[NDArray[Any], ...]:
        """The first four of `Rows`, and the number of each position in its sequence; int32."""
        B = self.sizes.block_size
        n: int = self._row
        sequences = [list(group) for _, group in groupby(rows, key=lambda row: id(row.pages))]
        tables = np.zeros((len(sequences), 1 + max((each[-1].block for each in sequences), default=0)), np.int32)
        for table, each in zip(tables, sequences, strict=True):
            table[: each[-1].block + 1] = each[-1].pages[: each[-1].block + 1]
        pieces = B // n
        blocks = np.array([row.block for row in rows], np.int32)
        which = np.repeat(np.arange(len(sequences), dtype=np.int32), [len(each) for each in sequences])
        own = np.array([row.pages[row.block] for row in rows], np.int32)
        history = (B * blocks[:, None] + n * np.arange(pieces, dtype=np.int32)).ravel()
        scratch = [*range(self.pages.count, self.pages.count + alone), *[self._spare] * -(-padding // n)]
        history = np.concatenate((history, np.zeros(len(scratch), np.int32)))
        table_of = np.concatenate((np.repeat(which, pieces), np.full(len(scratch), -1, np.int32)))
        own = np.concatenate((np.repeat(own, pieces), np.array(scratch, np.int32)))
        positions = (history[:, None] + np.arange(n)).ravel()
        return tables, table_of, history, own, positions.astype(np.int32)

    def cost(self, before: int) -> float:
        """See `Backend`."""
        return 1 + before * self._key_cost

    def _lacking(self, rows: int) -> int:
        """How many more `padded_rows` asks for."""
        return padded_rows(rows, self.model.dtype, self.model.device, *self._rounding) - rows

    def _rotary(self, positions: Tensor) -> Tensor:
        return torch.empty(0)

    def _attend(self, rows: Rows) -> Attend:
        """Of a network that brings queries and keys after norm and rotary."""

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self._kernels.write(self.storage, layer, k, v, rows)
            return self._kernels.attention(self.storage, layer, q, rows).view(v.shape)

        return attend

    def _alone(self) -> "array[int]":
        """The pages of a sequence that is nobody's."""
        return array("i", [self._spare])


class Steps(NamedTuple):
    """What the velocities at some rows of a pass do; E of them, G guided."""

    rows: list[int]  # E: number of each in the pass
    slots: Tensor  # (E,)
    times: Tensor  # (E, 1, 1): t / T
    coefficients: Tensor  # (4, E, 1, 1): of `Update`
    keeps: Tensor  # (E, 1, 1)
    begins: Tensor  # (E, 1, 1): no velocity came before
    branches: list[int]  # G: which of the E are guided
    guided: Tensor  # (G,): the same
    scales: Tensor  # (G, 1, 1)
    pinned: Tensor | None  # (E, B, 1)
    noise: Tensor | None  # (E, B, d)
    steering: Tensor | None  # (E, most k, d + 2)

    @classmethod
    def of(cls, rows: Sequence[Row], shape: tuple[int, int], device: torch.device) -> "Steps":
        """`shape`: (B, d)."""
        numbers = [i for i, row in enumerate(rows) if row.denoise]
        wanted = [row.denoise for row in rows if row.denoise]
        guided = [i for i, each in enumerate(wanted) if each.guidance is not None]
        columns = [
            (rows[i].time / TIME_SCALE, *each.update, rows[i].inputs is not None)
            for i, each in zip(numbers, wanted, strict=True)
        ]
        values = to_device(torch.tensor(columns).T[..., None, None], device) if columns else torch.zeros(7, 0, 1, 1)
        scales = torch.tensor([each.guidance for each in wanted if each.guidance is not None])[:, None, None]

        def stacked(name: str, default: Tensor) -> Tensor | None:
            given = [getattr(each, name) for each in wanted]
            if all(value is None for value in given):
                return None
            moved = [default if value is None else to_device(value, device) for value in given]
            return pad_sequence(moved, batch_first=True)

        pinned = stacked("pinned", torch.zeros(shape[0], dtype=torch.bool, device=device))
        return cls(
            numbers,
            to_device(torch.tensor([each.slot for each in wanted], dtype=torch.int64), device),
            values[0], values[1:5], values[5].bool(), values[6].bool(), guided,
            to_device(torch.tensor(guided, dtype=torch.int64), device),
            to_device(scales, device),
            None if pinned is None else pinned[..., None],
            stacked("noise", torch.zeros(shape, device=device)),
            stacked("steering", torch.zeros(1, shape[1] + 2, device=device)),
        )  # fmt: skip


class PriorPlan(NamedTuple):
    """Rows of a pass: those asked for, then the unconditional ones, then some that make their number a round one."""

    asked: int
    layout: Layout
    latents: Tensor  # (rows, B, d)
    times: Tensor  # (rows, B): of the modulation table
    steps: Steps


class Prior(Paged[DiT]):
    """Velocities of the flow, and what solvers do with them. The latents z of each slot stay on the device."""

    _rounding = 1, 16  # rows are blocks

    def __init__(self, model: DiT, sizes: Sizes, kernels: ModuleType = ops):
        config = model.config
        super().__init__(model, sizes, config.num_layers, config.heads, config.head_dim, kernels)
        self.table = ModulationTable(model, model.device, sizes.slots + 2)
        angles = rotary_angles(torch.arange(sizes.max_context), rotary_frequencies(config.rope_dim, 10000.0))
        self._turns = torch.stack(angles, dim=1).to(model.device)
        size = (sizes.slots + 1, config.block_size, config.txt_in_channels)
        self._z, self._previous = (torch.zeros(size, device=model.device) for _ in range(2))

    def _rotary(self, positions: Tensor) -> Tensor:
        return self._turns.index_select(0, positions)

    def prepare(self, times: Sequence[float]) -> None:
        """Compute what these times do to the network, before a pass needs it."""
        self.table.prepare(times)

    def plan(self, rows: Sequence[Row]) -> PriorPlan:
        device, B = self.model.device, self.sizes.block_size
        guided = [i for i, row in enumerate(rows) if row.guided]
        latents = [self._latents(row) for row in rows]
        spare = self._lacking(len(rows) + len(guided))
        taken = [*range(len(rows)), *guided, *[0] * spare]
        zero, *times = self.table.rows([0.0, *(row.time for row in rows)])
        index = torch.tensor(times, dtype=torch.int32)[:, None].repeat(1, B)
        for i, row in enumerate(rows):
            if row.denoise and row.denoise.pinned is not None:
                index[i].masked_fill_(row.denoise.pinned.cpu(), zero)
        return PriorPlan(
            len(rows),
            self._layout(rows, len(guided), spare * B),
            torch.stack([latents[i] for i in taken]),
            to_device(index.index_select(0, torch.tensor(taken)), device),
            Steps.of(rows, (B, self.model.config.txt_in_channels), device),
        )

    def _latents(self, row: Row) -> Tensor:
        if row.inputs is not None:
            return to_device(row.inputs, self.model.device)
        assert row.denoise is not None, "only the latents of a slot may be left out"
        return self._z[row.denoise.slot]

    def run(self, plan: PriorPlan) -> Finished:
        index = plan.times.flatten()
        x, y, gate = self._transformed(plan.latents.flatten(0, 1), plan.layout.rows, index)
        if not plan.steps.rows:
            return Finished([None] * plan.asked)
        points = [*plan.steps.rows, *range(plan.asked, plan.asked + len(plan.steps.branches))]
        points += [0] * self._lacking(len(points))
        x, y, index = self._of(points, x), None if y is None else self._of(points, y), self._of(points, index)
        velocities = self._velocities(x, y, gate, index)
        denoised = iter(self._denoised(plan, velocities.unflatten(0, (len(points), -1))))
        asked = set(plan.steps.rows)
        return Finished([next(denoised) if i in asked else None for i in range(plan.asked)])

    def _transformed(self, latents: Tensor, rows: Rows, index: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(R, d) through all layers: x, and what is still to be added to it, y times the rows of a gate."""
        model, kernels = self.model, self._kernels
        eps, dtype = model.config.norm_eps, self._inputs
        x = model.txt_in(latents).float()
        y = gate = None
        layer: DiTBlock
        for number, layer in enumerate(model.blocks):  # type: ignore[assignment]
            m, msa = self.table.layer(number).unbind(1), layer.msa
            h = kernels.adaln(x, y, gate, m[1], m[0], index, eps, dtype)
            norms = ((norm.weight, norm.bias) for norm in (msa.norm_q, msa.norm_k))
            q = kernels.qkv(self.storage, number, msa.proj_qkv(h), *norms, eps, rows)
            y = msa.proj_out(self._attention(self.storage, number, q, rows))
            h = kernels.adaln(x, y, m[2], m[4], m[3], index, eps, dtype)
            y, gate = layer.mlp(h), m[5]
        return x, y, gate

    def _velocities(self, x: Tensor, y: Tensor | None, gate: Tensor | None, index: Tensor) -> Tensor:
        """(R, d) float32, of what `_transformed` gave."""
        shift, scale = self.table.output.unbind(1)
        model = self.model
        return model.velocity(self._kernels.adaln(x, y, gate, scale, shift, index, model.config.norm_eps, model.dtype))

    def _of(self, rows: list[int], values: Tensor) -> Tensor:
        """The positions of some rows."""
        index = to_device(torch.tensor(rows), values.device)
        return values.unflatten(0, (-1, self.sizes.block_size)).index_select(0, index).flatten(0, 1)

    def _denoised(self, plan: PriorPlan, velocities: Tensor) -> list[Denoised]:
        """Guidance, the solver's update, and what is pinned, for all slots at once; the last thing that a pass does."""
        steps, count = plan.steps, len(plan.steps.rows)
        v, unguided = velocities[:count], velocities[count : count + len(steps.branches)]
        if len(steps.guided):
            guided = guide(v.index_select(0, steps.guided), unguided, steps.scales)
            v = v.index_copy(0, steps.guided, guided)
        z = torch.stack([plan.latents[i] for i in steps.rows])
        if steps.steering is not None:
            v = v + steer(z - steps.times * v, steps.steering)
        previous = self._previous.index_select(0, steps.slots).masked_fill_(steps.begins, 0.0)
        a, b, c, d = steps.coefficients
        new, clean = a * z + b * v + c * previous, z - steps.times * v
        if steps.noise is not None:
            new += d * steps.noise
        if steps.pinned is not None:
            new, clean = (torch.where(steps.pinned, z, values) for values in (new, clean))
        kept = torch.where(steps.keeps, v, previous)
        self._z.index_copy_(0, steps.slots, new)
        self._previous.index_copy_(0, steps.slots, kept)
        branches: list[tuple[Tensor, Tensor] | None] = [None] * count
        for i, unconditional in zip(steps.branches, unguided, strict=True):
            branches[i] = velocities[i], unconditional
        return [Denoised(*each) for each in zip(new, v, clean, branches, strict=True)]

    def warm(self) -> list[Tensor]:
        self.table.forget()
        B, d, spare = self.sizes.block_size, self.model.config.txt_in_channels, self.sizes.slots
        denoise = Denoise(spare, Update(1.0, -1.0))
        row = Row(self._alone(), 0, torch.zeros(B, d), TIME_SCALE, denoise)
        (denoised,) = self.run(self.plan([row])).results()
        return [denoised.velocity]


class VAEPlan(NamedTuple):
    """Rows of a pass, rounded up for the device."""

    asked: Sequence[Row]
    layout: Layout
    inputs: Tensor  # (R, d) latents, or (R * P,) ids


class VAE(Paged[V]):
    """Either half, whose rows are rounded up for the device."""

    def __init__(self, model: V, sizes: Sizes, kernels: ModuleType = ops):
        config = model.config
        super().__init__(model, sizes, model.num_layers, config.num_heads, config.head_dim, kernels)

    def plan(self, rows: Sequence[Row]) -> VAEPlan:
        inputs = torch.cat([row.inputs for row in rows if row.inputs is not None])
        count = self.sizes.block_size * len(rows)  # of positions, each of one latent or of P ids
        layout = self._layout(rows, padding=self._lacking(count))
        lacking = len(inputs) // count * len(layout.positions) - len(inputs)
        padded = F.pad(to_device(inputs, self.model.device), (*[0, 0] * (inputs.ndim - 1), 0, lacking))
        return VAEPlan(rows, layout, padded)


class Decoder(VAE[TextVAEDecoder]):
    """Latents to logits."""

    def run(self, plan: VAEPlan, then: Then | None = None) -> Finished:
        model, B = self.model, self.sizes.block_size
        rotary = model.rotary(plan.layout.positions)
        hidden = model.transform(model.in_layer(plan.inputs), rotary, self._attend(plan.layout.rows))
        wanted = [i for i, row in enumerate(plan.asked) if row.wanted]
        if not wanted:
            return Finished([None] * len(plan.asked))
        rows = torch.tensor(wanted)[:, None] * B + torch.arange(B)
        hidden = hidden.index_select(0, to_device(rows.flatten(), model.device))
        hidden = F.pad(hidden, (0, 0, 0, self._lacking(len(hidden))))
        ids = B * model.config.patch_size
        logits = model.logits(hidden)[: len(wanted) * ids].view(len(wanted), ids, -1)
        found = iter(logits if then is None else zip(logits, *(each.cpu() for each in then(logits)), strict=True))
        return Finished([next(found) if row.wanted else None for row in plan.asked])

    def warm(self) -> list[Tensor]:
        latents = torch.zeros(self.sizes.block_size, self.model.config.latent_dim)
        return list(self.run(self.plan([Row(self._alone(), 0, latents)])).results())


class Encoder(VAE[TextVAEEncoder]):
    """Token ids to the posterior."""

    def run(self, plan: VAEPlan) -> Finished:
        attend, B = self._attend(plan.layout.rows), self.sizes.block_size
        mean, logvar = self.model(plan.inputs, plan.layout.positions, attend)
        count = len(plan.asked)
        logvars = [None] * count if logvar is None else logvar.split(B)[:count]
        return Finished(list(zip(mean.split(B)[:count], logvars, strict=True)))

    def warm(self) -> list[Tensor]:
        ids = torch.zeros(self.sizes.block_size * self.model.config.patch_size, dtype=torch.int64)
        ((mean, logvar),) = self.run(self.plan([Row(self._alone(), 0, ids)])).results()
        return [mean] if logvar is None else [mean, logvar]
