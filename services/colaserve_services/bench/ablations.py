"""Each exact saving of the prior, switched off from outside: the engine has no switches for it.

A variant is a context manager over started stages; while it is entered and no session runs, parts of the engine are
replaced by others that give the same numbers without one of the savings. It gives a count of the replacement's calls:
what is never called measures nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from colaserve_services.bench.plain_attention import History, PlainAttention
from colaserve_services.bench.stages import Stages
from colaserve_services.model import cpu_attention
from colaserve_services.model.attention import Segment
from colaserve_services.model.dit import DiTAttention, Modulation
from colaserve_services.model.kv_cache import KVCache
from colaserve_services.model.layers import Linear
from colaserve_services.model.modulation import ModulationTable
from colaserve_services.prior import engine as prior_engine


@dataclass
class Calls:
    """How often a replacement ran."""

    count: int = 0


Forward = Callable[[Tensor], Tensor]
Pass = Callable[[list[Any]], Tensor]  # turns to velocities
Variant = Callable[[Stages], AbstractContextManager[list[Calls]]]


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """`owner.name` is `value` inside."""
    own = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)


class _FromWeights:
    """In place of the modulation table: all of it anew from the time embedding, at every step, for every token."""

    def __init__(self, stages: Stages, table: ModulationTable, calls: Calls):
        self._dit, self._table, self._calls = stages.prior.model, table, calls
        self._block_size = stages.prior.shape.block_size
        self._times: dict[int, float] = {}

    def prepare(self, times: Any) -> None:
        """Nothing is kept."""

    def rows(self, times: list[float]) -> list[int]:
        """An id for each time."""
        known = {t: row for row, t in self._times.items()}
        for t in times:
            known.setdefault(t, len(known))
        self._times = {row: t for t, row in known.items()}
        return [known[t] for t in times]

    def layers(self, index: Tensor) -> Iterator[Modulation]:
        """As the table's, for every token by itself."""
        e = self._embed(index)
        for block in self._dit.blocks:
            self._calls.count += 1
            yield block.modulation(e)  # type: ignore[operator]

    def output(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """As the table's."""
        return self._dit.output_modulation(self._embed(index))

    def _embed(self, index: Tensor) -> Tensor:
        times = [self._times[row] for row in index.flatten().tolist()]
        t = torch.tensor(times, device=index.device).view(index.shape)
        return self._dit.emb_in(t.expand(len(index), self._block_size))


@contextmanager
def modulation_from_weights(stages: Stages) -> Iterator[list[Calls]]:
    """The modulation Linears run at every step, for every token."""
    calls = Calls()
    table = _FromWeights(stages, stages.prior.table, calls)
    with _replaced(stages.prior, "table", table):
        yield [calls]


@contextmanager
def _passes(stages: Stages, make: Callable[[Pass, Calls], Pass]) -> Iterator[list[Calls]]:
    calls = Calls()
    with _replaced(stages.prior, "_velocities", make(stages.prior._velocities, calls)):
        yield [calls]


def two_passes(stages: Stages) -> AbstractContextManager[list[Calls]]:
    """A pass for each guidance branch."""

    def make(one_pass: Pass, calls: Calls) -> Pass:
        def velocities(turns: list[Any]) -> Tensor:
            guided = [turn for turn in turns if turn.guided]
            conditional = one_pass([replace(turn, guided=False) for turn in turns])
            if not guided:
                return conditional
            calls.count += 1
            alone = [_without_history(turn) for turn in guided]
            return torch.cat((conditional, one_pass(alone)))

        return velocities

    return _passes(stages, make)


def _without_history(turn: Any) -> Any:
    return replace(turn, commits=[], guided=False, evaluated=Segment(turn.evaluated.rows))


def commit_alone(stages: Stages) -> AbstractContextManager[list[Calls]]:
    """A block enters the cache in a pass of its own."""

    def make(one_pass: Pass, calls: Calls) -> Pass:
        def velocities(turns: list[Any]) -> Tensor:
            both = [turn for turn in turns if turn.commits and turn.point is not None]
            if both:
                calls.count += 1
                one_pass([replace(turn, point=None, guided=False) for turn in both])
            return one_pass([replace(turn, commits=[]) if turn in both else turn for turn in turns])

        return velocities

    return _passes(stages, make)


@contextmanager
def _attention(stages: Stages, *, rotates: bool, dense: bool) -> Iterator[list[Calls]]:
    history = History(stages.prior.model.config.rope_dim, rotates, dense)
    calls = Calls()

    def attention(segments: Any, block_size: int, device: torch.device) -> PlainAttention:
        calls.count += 1
        return PlainAttention(history, segments, block_size)

    with ExitStack() as stack:
        stack.enter_context(_replaced(prior_engine, "RaggedAttention", attention))
        stack.enter_context(_replaced(stages.prior.kv_pool, "grown", _as_it_is))  # the history knows it by its cache
        if rotates:
            stack.enter_context(_replaced(DiTAttention, "forward", _without_rotary))
        yield [calls]


def _as_it_is(cache: KVCache, held: int, positions: int) -> KVCache:
    """KVPool.grown for caches that nothing is written to."""
    return cache


def _without_rotary(self: DiTAttention, x: Tensor, rotary: Any, attend: Any) -> Tensor:
    """DiTAttention.forward that leaves rotary to `attend`."""
    qkv = self.proj_qkv(x).unflatten(-1, (3, self.config.heads, self.config.head_dim))
    q, k, v = qkv.unbind(-3)
    out: Tensor = self.proj_out(attend(self.layer, self.norm_q(q), self.norm_k(k), v).flatten(-2))
    return out


def concatenated_keys(stages: Stages) -> AbstractContextManager[list[Calls]]:
    """The cache holds keys before rotary, is concatenated and turned as a whole at every step."""
    return _attention(stages, rotates=True, dense=False)


def dense_mask(stages: Stages) -> AbstractContextManager[list[Calls]]:
    """One attention over all rows and keys of the batch, with one mask."""
    return _attention(stages, rotates=False, dense=True)


def dense_and_concatenated(stages: Stages) -> AbstractContextManager[list[Calls]]:
    """Both."""
    return _attention(stages, rotates=True, dense=True)


@contextmanager
def products_for_attention(stages: Stages) -> Iterator[list[Calls]]:
    """Attention by torch's products and softmax. Only in bfloat16 on CPUs that have a compiled one is it another."""
    calls = Calls()

    def takes(*of_values: Any) -> bool:
        calls.count += 1
        return False

    with _replaced(cpu_attention, "takes", takes):
        yield [calls]


def _linears(stages: Stages) -> dict[str, Linear]:
    """The layers' Linears that run at every step, by name."""
    return {
        name: module
        for name, module in stages.prior.model.named_modules()
        if isinstance(module, Linear) and name.startswith("blocks.") and ".ada." not in name
    }


@contextmanager
def _forwards(stages: Stages, make: Callable[[Linear, Tensor], Forward]) -> Iterator[list[Calls]]:
    """`make(linear, weight as stored)` gives each linear's new forward."""
    calls, linears = Calls(), _linears(stages)

    def counted(forward: Forward) -> Forward:
        def run(x: Tensor) -> Tensor:
            calls.count += 1
            return forward(x)

        return run

    with ExitStack() as stack:
        for name, stored in stages.checkpoint.dit.read([f"{name}.weight" for name in linears]):
            linear = linears[name.removesuffix(".weight")]
            stack.enter_context(_replaced(linear, "forward", counted(make(linear, stored))))
        yield [calls]


def unpacked_weights(stages: Stages) -> AbstractContextManager[list[Calls]]:
    """Weights in rows as stored, cast once: the same products, GELU fused, without a layout made for them.

    Only in bfloat16 on the CPU are there packed weights; elsewhere it changes nothing.
    """

    def make(linear: Linear, stored: Tensor) -> Forward:
        weight = stored.to(stages.prior.model.device, stages.dtype, copy=True)
        if stages.dtype != torch.bfloat16 or weight.device.type != "cpu":
            return lambda x: _activated(linear, F.linear(x.to(weight.dtype), weight, linear.bias))
        fused: tuple[str, list[float], str] = (
            ("gelu", [], "tanh") if linear.activation == "gelu_tanh" else ("none", [], "")
        )
        return lambda x: torch.ops.mkldnn._linear_pointwise(x.to(weight.dtype), weight, linear.bias, *fused)

    return _forwards(stages, make)


def cast_weights(stages: Stages) -> AbstractContextManager[list[Calls]]:
    """float32 weights that are cast at every product, so neither packed nor with GELU fused."""

    def make(linear: Linear, stored: Tensor) -> Forward:
        weight = stored.to(stages.prior.model.device, torch.float32, copy=True)
        dtype = stages.dtype
        return lambda x: _activated(linear, F.linear(x.to(dtype), weight.to(dtype), linear.bias))

    return _forwards(stages, make)


def _activated(linear: Linear, x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh") if linear.activation == "gelu_tanh" else x


@contextmanager
def separate_gelu(stages: Stages) -> Iterator[list[Calls]]:
    """GELU as an operation of its own after its product."""
    calls, fused = Calls(), [linear for linear in _linears(stages).values() if linear.activation == "gelu_tanh"]

    def gelu(module: Any, inputs: Any, output: Tensor) -> Tensor:
        calls.count += 1
        return F.gelu(output, approximate="tanh")

    hooks = [linear.register_forward_hook(gelu) for linear in fused]
    for linear in fused:
        linear.activation = "none"
    try:
        yield [calls]
    finally:
        for linear, hook in zip(fused, hooks, strict=True):
            linear.activation = "gelu_tanh"
            hook.remove()


@contextmanager
def everything_off(stages: Stages) -> Iterator[list[Calls]]:
    """All of these at once, near to how the public implementation works."""
    with ExitStack() as stack:
        variants = (modulation_from_weights, two_passes, commit_alone, dense_and_concatenated, cast_weights)
        yield [calls for variant in variants for calls in stack.enter_context(variant(stages))]


VARIANTS: dict[str, Variant] = {
    "modulation from its weights at every step": modulation_from_weights,
    "a pass for each guidance branch": two_passes,
    "a pass of its own for the commit": commit_alone,
    "keys concatenated and turned anew": concatenated_keys,
    "one dense mask over the batch": dense_mask,
    "attention by torch's products": products_for_attention,
    "weights not packed": unpacked_weights,
    "weights cast at every product": cast_weights,
    "GELU apart from its product": separate_gelu,
    "all of these": everything_off,
}
