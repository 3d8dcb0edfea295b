"""The networks on a GPU, in the kernels of model/kernels: what `reference` computes, in buffers that never move.

A pass is one copy of a pinned buffer, one graph for its bucket of rows and keys, and one copy back; nothing waits for
the device. Not run on a GPU: on a CPU the same code runs with `streams.Stream`.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from colaserve_services.model.backend import Denoised, Row, Sizes, Then, reference
from colaserve_services.model.backend.buckets import KEYS, STEERING, Bucket, Buckets, Filled, Shapes, UnderWay
from colaserve_services.model.backend.ops import BEGINS, KEEPS, Rows
from colaserve_services.model.backend.streams import Stream, stream
from colaserve_services.model.dit import TIME_SCALE, DiT
from colaserve_services.model.float8 import Scaled
from colaserve_services.model.text_vae import TextVAEBlock, TextVAEDecoder, TextVAEEncoder

_ROWS_A_SESSION = 4  # a point, the same without a condition, a finished block, and one of a context
_F32, _I32, _BOOL = torch.float32, torch.int32, torch.bool

Plan = list[Filled]


class NotTaken(ValueError):
    """The kernels do not compute with a model's pages."""


class _Bucketed(reference.Paged[Any]):
    """Rows in arrays of buckets."""

    _buckets: Buckets
    _odd = False

    def _capture(self, stream: Stream, kernels: ModuleType) -> None:
        if self._kernels is not kernels:
            raise NotTaken(f"pages of {self.sizes.block_size} positions in {self.model.dtype}")
        slots, context = self.sizes.slots, self.sizes.max_context
        most = Bucket(_ROWS_A_SESSION * slots, -(-context // KEYS))
        self._buckets = Buckets(stream, most, self._shapes, self._body)
        self._buckets.capture(lambda bucket: self._filled((), bucket.rows, 0))

    def plan(self, rows: Sequence[Row]) -> Any:  # a Plan, where `reference` has others
        self._odd = not self._odd  # a pass may run whose copy of the other memory is not done
        pieces = enumerate(self._buckets.cut(rows))
        return [self._filled(piece, self._buckets.size(piece), 2 * i + self._odd) for i, piece in pieces]

    def _shapes(self, rows: int) -> Shapes:
        B, n, pages = self.sizes.block_size, self._row, self.sizes.max_context // self.sizes.block_size + 1
        pieces = dict.fromkeys(("table", "history", "own"), (_I32, (rows * B // n,)))
        return {"tables": (_I32, (rows, pages)), **pieces, "positions": (_I32, (rows * B,))}

    def _body(self, bucket: Bucket, fields: dict[str, Tensor]) -> Sequence[Tensor]:
        raise NotImplementedError

    def _filled(self, rows: Sequence[Row], size: int, number: int) -> Filled:
        raise NotImplementedError

    def _laid(self, rows: Sequence[Row], size: int, number: int, alone: int = 0) -> tuple[dict[str, Any], int]:
        """The arrays with the layout of rows filled in, and the positions that the longest reads."""
        host = self._buckets.host(size, number)
        tables, *arrays = self._numbers(rows, alone, (size - len(rows) - alone) * self.sizes.block_size)
        host["tables"][: len(tables), : tables.shape[1]] = tables
        for name, values in zip(("table", "history", "own", "positions"), arrays, strict=True):
            host[name][:] = values
        return host, int(arrays[1].max(initial=0)) + self._row

    def _rows(self, bucket: Bucket, fields: dict[str, Tensor], turns: Tensor) -> Rows:
        """`turns`: cos and sin by position."""
        layout = {name: fields[name] for name in ("tables", "table", "history", "own")}
        rotary = turns.index_select(0, fields["positions"])
        return Rows(n=self._row, **layout, rotary=rotary, most=KEYS * bucket.splits - self._row)


class Prior(_Bucketed, reference.Prior):
    """As `reference.Prior`; results are on the CPU, and good until the next pass."""

    def __init__(self, model: DiT, sizes: Sizes, kernels: ModuleType, on: Stream | None = None):
        reference.Prior.__init__(self, model, sizes, kernels)
        self._capture(on or stream(model.device), kernels)

    def _shapes(self, rows: int) -> Shapes:
        B, d = self.sizes.block_size, self.model.config.txt_in_channels
        return {
            **super()._shapes(rows), "index": (_I32, (rows * B,)), "given": (_BOOL, (rows, 1, 1)),
            "slots": (_I32, (rows,)), "entries": (_I32, (rows, 8)), "numbers": (_F32, (rows, 8)),
            "pinned": (_BOOL, (rows, B)), "latents": (_F32, (rows, B, d)), "noise": (_F32, (rows, B, d)),
            "steering": (_F32, (STEERING, d + 2)),
        }  # fmt: skip

    def _body(self, bucket: Bucket, fields: dict[str, Tensor]) -> Sequence[Tensor]:
        own = self._z.index_select(0, fields["slots"])
        latents = torch.where(fields["given"], fields["latents"], own)
        rows = self._rows(bucket, fields, self._turns)
        velocities = self._velocities(*self._transformed(latents.flatten(0, 1), rows, fields["index"]), fields["index"])
        steps = (fields[name] for name in ("entries", "numbers", "pinned", "noise", "steering"))
        return [self._kernels.update(velocities, latents, self._z, self._previous, *steps)]

    def prepare(self, times: Sequence[float]) -> None:
        with self._buckets.stream.on():
            super().prepare(times)

    def plan(self, rows: Sequence[Row]) -> Plan:  # type: ignore[override]
        with self._buckets.stream.on():
            self.table.rows([0.0, *(row.time for row in rows)])
        return super().plan(rows)

    def _filled(self, rows: Sequence[Row], size: int, number: int) -> Filled:
        guided = [i for i, row in enumerate(rows) if row.guided]
        host, longest = self._laid(rows, size, number, len(guided))
        zero, *times = self.table.rows([0.0, *(row.time for row in rows)])
        index = host["index"].reshape(size, -1)
        index[len(rows) :], host["given"][len(rows) :], host["slots"][:], host["entries"][:] = zero, True, 0, -1
        host["pinned"][:], host["latents"][len(rows) :] = False, 0.0
        unconditional = {row: len(rows) + i for i, row in enumerate(guided)}
        entry = noises = columns = 0
        for i, row in enumerate(rows):
            index[i], step = times[i], row.denoise
            host["given"][i] = row.inputs is not None
            if row.inputs is not None:
                host["latents"][i] = row.inputs.numpy()
            if step is None:
                continue
            host["slots"][i] = step.slot
            if step.pinned is not None:
                host["pinned"][entry] = step.pinned.numpy()
                index[i][host["pinned"][entry]] = zero
            noise = noises if step.noise is not None else -1
            if step.noise is not None:
                host["noise"][noises], noises = step.noise.numpy(), noises + 1
            steers = 0 if step.steering is None else len(step.steering)
            if step.steering is not None:
                host["steering"][columns : columns + steers] = step.steering.numpy()
            flags = KEEPS * step.update.keeps + BEGINS * (row.inputs is not None)
            other = unconditional.get(i, -1)
            host["entries"][entry] = i, other, step.slot, flags, noise, columns, steers, 0
            host["numbers"][entry] = row.time / TIME_SCALE, *step.update[:4], step.guidance or 0.0, 0.0, 0.0
            if other >= 0:
                for name in ("given", "slots", "latents"):
                    host[name][other] = host[name][i]
                index[other] = index[i]
            entry, columns = entry + 1, columns + steers
        last = "steering" if columns else "noise" if noises else "latents"
        return self._buckets.filled(rows, size, number, longest, last)

    def run(self, plan: Plan) -> UnderWay:  # type: ignore[override]
        stream = self._buckets.stream
        with stream.on():
            begin = stream.record()
            before = (self._z.clone(), self._previous.clone()) if len(plan) > 1 else None
            try:
                found = [stream.fetched(self._buckets.start(filled)[0]) for filled in plan]
            except Exception:
                if before is not None:  # a piece may have done its part
                    self._z.copy_(before[0]), self._previous.copy_(before[1])
                raise
            end = stream.record()
        return UnderWay(
            begin, end, lambda: [each for pair in zip(plan, found, strict=True) for each in _denoised(*pair)]
        )


def _denoised(filled: Filled, found: Tensor) -> list[Denoised | None]:
    entries = iter(found)
    of_rows: list[Denoised | None] = []
    for row in filled.rows:
        if row.denoise is None:
            of_rows.append(None)
            continue
        z, v, clean, conditional, unconditional = next(entries)
        branches = (conditional, unconditional) if row.guided else None
        of_rows.append(Denoised(z, v, clean, branches))
    return of_rows


class _VAE(_Bucketed, reference.VAE[Any]):
    """Either half."""

    def __init__(
        self, model: TextVAEDecoder | TextVAEEncoder, sizes: Sizes, kernels: ModuleType, on: Stream | None = None
    ):
        super().__init__(model, sizes, kernels)
        turns = model.rotary(torch.arange(sizes.max_context, device=model.device))
        self._turns = torch.stack(turns, dim=1)
        self._fused = model.config.post_norm and model.config.rope_full_precision
        self._capture(on or stream(model.device, priority=-1), kernels)

    def _filled(self, rows: Sequence[Row], size: int, number: int) -> Filled:
        host, longest = self._laid(rows, size, number)
        inputs = host["inputs"].reshape(size, self.sizes.block_size, -1)
        for i, row in enumerate(rows):
            if row.inputs is not None:
                inputs[i] = row.inputs.numpy().reshape(inputs[i].shape)
        inputs[len(rows) :] = 0
        wanted = [i for i, row in enumerate(rows) if row.wanted]
        host["wanted"][:] = (*wanted, *[0] * (size - len(wanted)))
        return self._buckets.filled(rows, size, number, longest, "wanted")

    def _transformed(self, x: Tensor, rows: Rows) -> Tensor:
        """(R, D) through all layers, float32."""
        if not self._fused:
            cos, sin = rows.rotary.unbind(1)
            return self.model.transform(x, (cos, sin), self._attend(rows))
        x = x.float()
        h: Tensor | Scaled = x
        block: TextVAEBlock
        for number, block in enumerate(self.model.blocks):
            h = self._block(number, block, x, h, rows)
        return x

    def _block(self, number: int, block: TextVAEBlock, x: Tensor, h: Tensor | Scaled, rows: Rows) -> Any:
        """A layer; x in place, and given as products read it."""
        config, kernels, dtype = block.config, self._kernels, self._inputs
        norms = (_affine(block.q_norm), _affine(block.k_norm)) if config.qk_norm else None
        eps = config.layer_norm_eps
        q = kernels.wide_qkv(self.storage, number, block.qkv_proj(h), norms, eps, rows, config.clip_qkv)
        y = block.attn_out_proj(self._attention(self.storage, number, q, rows))
        h = kernels.residual_norm(x, y, *_affine(block.norm_attn), eps, dtype, "x")
        y = block.ffn_out(kernels.activated(block.ffn_proj, h))
        return kernels.residual_norm(x, y, *_affine(block.norm_ffn), eps, dtype, "y")


def _affine(norm: Any) -> tuple[Tensor | None, Tensor | None]:
    return norm.weight, norm.bias


class Decoder(_VAE, reference.Decoder):
    """Latents to logits."""

    def _shapes(self, rows: int) -> Shapes:
        B, config = self.sizes.block_size, self.model.config
        given = {**super()._shapes(rows), "inputs": (_F32, (rows * B, config.latent_dim)), "wanted": (_I32, (rows,))}
        return {**given, "hidden": (_F32, (rows, B, config.dim))}  # what graphs leave; with one each it would be 0.4 GB

    def _body(self, bucket: Bucket, fields: dict[str, Tensor]) -> Sequence[Tensor]:
        rows = self._rows(bucket, fields, self._turns)
        hidden = self._transformed(self.model.in_layer(fields["inputs"]), rows).unflatten(0, (bucket.rows, -1))
        return [torch.index_select(hidden, 0, fields["wanted"], out=fields["hidden"])]

    def run(self, plan: Plan, then: Then | None = None) -> UnderWay:  # type: ignore[override]
        stream, ids = self._buckets.stream, self.sizes.block_size * self.model.config.patch_size
        asked = [row for filled in plan for row in filled.rows]
        with stream.on():
            begin = stream.record()
            hidden = []
            for filled in plan:
                count = sum(row.wanted for row in filled.rows)
                hidden.append(self._buckets.start(filled)[0][:count].clone())
            found: Sequence[Any] = ()
            if any(row.wanted for row in asked):
                logits = self.model.logits(torch.cat(hidden).flatten(0, 1)).view(-1, ids, self.model.config.vocab_size)
                values = () if then is None else [stream.fetched(each) for each in then(logits)]
                found = logits if then is None else list(zip(logits, *values, strict=True))
            end = stream.record()

        def results() -> list[Any]:
            answers = iter(found)
            return [next(answers) if row.wanted else None for row in asked]

        return UnderWay(begin, end, results)


class Encoder(_VAE, reference.Encoder):
    """Token ids to the posterior."""

    def _shapes(self, rows: int) -> Shapes:
        ids = rows * self.sizes.block_size * self.model.config.patch_size
        return {**super()._shapes(rows), "inputs": (_I32, (ids,)), "wanted": (_I32, (rows,))}

    def _body(self, bucket: Bucket, fields: dict[str, Tensor]) -> Sequence[Tensor]:
        rows = self._rows(bucket, fields, self._turns)
        mean, logvar = self.model.posterior(self._transformed(self.model.embed(fields["inputs"]), rows))
        return [mean] if logvar is None else [mean, logvar]

    def run(self, plan: Plan) -> UnderWay:  # type: ignore[override]
        stream, B = self._buckets.stream, self.sizes.block_size
        with stream.on():
            begin = stream.record()
            found = [[stream.fetched(each) for each in self._buckets.start(filled)] for filled in plan]
            end = stream.record()

        def results() -> list[tuple[Tensor, Tensor | None]]:
            blocks: list[tuple[Tensor, Tensor | None]] = []
            for filled, values in zip(plan, found, strict=True):
                for i in range(len(filled.rows)):
                    mean, *logvar = (each[i * B : (i + 1) * B] for each in values)
                    blocks.append((mean, logvar[0] if logvar else None))
            return blocks

        return UnderWay(begin, end, results)
