"""What a pass of the backend for GPUs launches: few kernels a layer, none a session, on memory that stays where it is.

Counted on a CPU; the kernels are recorded where they would be launched.
"""

import asyncio
from array import array
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from colaserve_services.decoder.engine import DecodeJob
from colaserve_services.model.backend import Denoise, Row, Sizes, Update, cuda
from colaserve_services.model.backend.buckets import KEYS
from colaserve_services.model.backend.pick import Picked
from colaserve_services.model.backend.streams import Event, Stream
from colaserve_services.model.checkpoint import Checkpoint
from colaserve_services.model.float8 import FLOAT8
from colaserve_services.model.loading import load
from colaserve_services.model.sampling import Draw, SamplingSettings, sample_blocks
from colaserve_services.model.text_vae import TextVAEDecoder, TextVAEEncoder
from tests.conftest import Golden
from tests.services.engines.conftest import CPU, Engines, engines
from tests.services.engines.runs import freed, job, noise, sample
from tests.services.fake_gpus import Replayed
from tests.services.kernel_references import references
from tests.services.model.checkpoints import write_checkpoint

B, D, SESSIONS = 4, 8, 32
KERNELS_A_LAYER = 9
STAGES = [("prior", torch.float32), ("decoder", torch.float32), ("encoder", torch.float32)]
WAIT = {"aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::is_nonzero", "aten::equal"}
ALLOCATE = {"aten::empty", "aten::new_empty", "aten::empty_like", "aten::empty_strided", "aten::detach"}


class Launches(TorchDispatchMode):
    """Each operation that computes, with the addresses of what it reads or writes and no other made."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, tuple[int, ...]]] = []
        self._made: list[Any] = []  # kept, so that no address is used twice

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.name().partition(".")[0]
        made = {each.untyped_storage().data_ptr() for each in self._made}
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor) and not each.is_mkldnn]
        if not func.is_view and name not in ALLOCATE:
            outside = (each.data_ptr() for each in tensors if each.untyped_storage().data_ptr() not in made)
            self.found.append((name, tuple(outside)))
        if not func.is_view:
            self._made += [each for each in tree_leaves(result) if not any(each is given for given in tensors)]
        return result

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.found]


@pytest.fixture(scope="module")
def backends(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str, int], Any]]:
    """A stage's backend with so many layers, whose kernels launch nothing."""
    pytest.importorskip("triton")
    from colaserve_services.model import kernels
    from colaserve_services.model.kernels.registry import recording

    def made(stage: str, layers: int, dtype: torch.dtype = torch.float32, on: Stream | None = None) -> Any:
        vae = {"encoder_num_blocks": layers, "decoder_num_blocks": layers}
        folder: Path = tmp_path_factory.mktemp("checkpoint")
        checkpoint = Checkpoint.open(write_checkpoint(folder, vae, {"num_layers": layers, "heads": 4}))
        kind = {"prior": cuda.Prior, "decoder": cuda.Decoder, "encoder": cuda.Encoder}[stage]
        network = {"decoder": TextVAEDecoder, "encoder": TextVAEEncoder}.get(stage)
        if network is None or dtype == FLOAT8:
            model = load(checkpoint, stage, CPU, dtype)
        else:  # with weights as they are on a GPU, not packed
            model = network(checkpoint.vae_config).requires_grad_(False)
        return kind(model, Sizes(1 << 22, SESSIONS, B, 512), kernels, on)

    with recording(), torch.no_grad():
        yield made


def rows(backend: Any, stage: str, sessions: int, seed: int = 0) -> list[Row]:
    """What a pass serves when all are in the middle of a text, each at its own place."""
    generator, found = torch.Generator().manual_seed(seed), []
    for slot in range(sessions):
        pages = array("i", backend.pages.reserve(KEYS // B + 1 + slot % 2))  # keys take two splits
        backend.pages.free(pages)
        z = torch.randn(2, B, D, generator=generator)
        if stage == "prior":
            pinned = torch.arange(B) < slot % 3 if slot % 3 else None
            denoise = Denoise(slot, Update(1.0, -0.1, 0.05, 0.1, slot % 2 > 0), 7.0, pinned, z[1])
            found.append(Row(pages, len(pages) - 2, z[0]))
            found.append(Row(pages, len(pages) - 1, None, 900.0 - slot, denoise))
        elif stage == "decoder":
            found.append(Row(pages, len(pages) - 1, z[0]))
        else:
            found.append(Row(pages, len(pages) - 1, torch.randint(0, 500, (B,), generator=generator)))
    return found


def sampled(count: int) -> Callable[[Tensor], Sequence[Tensor]]:
    draws = [Draw(SamplingSettings(temperature=0.5, seed=i), {i, 7}, i) for i in range(count)]
    return lambda logits: sample_blocks(logits, draws)


@torch.inference_mode()
def launched(backend: Any, stage: str, sessions: int, seed: int = 0) -> Launches:
    from colaserve_services.model.kernels.registry import launches

    plan = backend.plan(rows(backend, stage, sessions, seed))
    before = launches.total()
    with Launches() as found:
        backend.run(plan, *([sampled(sessions)] if stage == "decoder" else ())).results()
    count = launches.total() - before
    of_kernels = sum(name.startswith("colaserve::") for name in found.names)
    found.found += [("triton", ())] * (count - of_kernels)  # an operation may launch several
    return found


@pytest.mark.parametrize(("stage", "dtype"), [*STAGES, ("prior", FLOAT8), ("decoder", FLOAT8)])
def test_kernels_are_few_a_layer_and_none_a_session(
    backends: Callable[..., Any], stage: str, dtype: torch.dtype
) -> None:
    few, many = backends(stage, 2, dtype), backends(stage, 3, dtype)
    alone = launched(few, stage, 1)
    assert len(launched(many, stage, 1).found) - len(alone.found) <= KERNELS_A_LAYER
    assert launched(few, stage, SESSIONS).names == alone.names
    assert not WAIT & set(alone.names)
    if stage == "prior":
        assert alone.names.count("aten::copy_") == 1
        assert alone.names.count("aten::clone") == 1  # what is fetched


@pytest.mark.parametrize("stage", ["prior", "decoder", "encoder"])
def test_passes_of_one_size_do_the_same_on_the_same_memory(backends: Callable[[str, int], Any], stage: str) -> None:
    backend = backends(stage, 2)
    found = [launched(backend, stage, sessions, seed) for sessions, seed in ((9, 0), (1, 0), (10, 1))]
    assert found.pop(1).found[0] != found[0].found[0], "the memory of a pass that may run is not filled again"
    assert any(backend.storage.memory.data_ptr() in addresses for _, addresses in found[0].found)
    last = found[0].names.index("aten::cat") if stage == "decoder" else None  # then come logits, as many as are wanted
    assert found[0].found[:last] == found[1].found[:last]


@pytest.mark.parametrize("stage", ["prior", "decoder", "encoder"])
def test_a_pass_is_one_graph_between_two_events(backends: Callable[..., Any], stage: str) -> None:
    on = Replayed()
    backend = backends(stage, 1, on=on)
    before = on.replays, on.events
    backend.run(backend.plan(rows(backend, stage, 9)), *([sampled(9)] if stage == "decoder" else ())).results()
    assert (on.replays, on.events) == (before[0] + 1, before[1] + 2)
    left = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for found in on.left for each in found}
    if stage == "decoder":  # those of the released one would hold 0.4 GB in a memory for each graph
        assert len(on.left) > 1 == len(left)


class Looked(Stream):
    """Whose events are done when they were queried often enough; once it serves, waiting for one fails."""

    serves = False

    class Event:
        def __init__(self, looks: int) -> None:
            self._looks = looks

        def done(self) -> bool:
            self._looks -= 1
            return self._looks <= 0

        def wait(self) -> None:
            assert self._looks <= 0, "the device is waited for"

        def since(self, earlier: Event) -> float | None:
            return 0.25

    def record(self) -> Any:
        return self.Event(3 if self.serves else 0)


async def test_nothing_of_an_engine_waits_for_the_device(tiny: Golden) -> None:
    kernels, on = references(), Looked(CPU)

    async def ask(stages: Engines) -> Any:
        async with stages.decoder.session(decoding) as decoder:
            decoded = [await decoder.decode(noise(4, i)) for i in range(3)]
        encoded, _ = await stages.encoder.encode([range(30), range(3)])
        blocks = await asyncio.gather(*(sample(stages, job(i, blocks=3)) for i in range(3)))
        ids = [(block.token_ids, block.top, block.target_logprobs) for block in decoded]
        return ids, [x.latents.tolist() for x in encoded], [[x.latents.tolist() for x in run] for run in blocks]

    decoding = DecodeJob(noise(8), SamplingSettings(temperature=0.7, seed=3), top_logprobs=3, target_ids=[4, 5])
    makers = [partial(kind, kernels=kernels, on=on) for kind in (cuda.Prior, cuda.Decoder, cuda.Encoder)]
    plain = [partial(kind, kernels=kernels) for kind in (cuda.Prior, cuda.Decoder, cuda.Encoder)]
    found = []
    for kinds in (plain, makers):
        on.serves = False
        with engines(tiny.directory, picked=Picked("cuda", "", 32, *kinds)) as stages:
            on.serves = True
            found.append(await ask(stages))
            await freed(stages)
    assert found[0] == found[1]
    assert {x for each in (stages.encoder, stages.prior, stages.decoder) for x in each.observer.seconds} == {0.25}
