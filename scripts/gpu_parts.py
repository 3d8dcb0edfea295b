"""The parts of scripts/check-gpu, each a process of its own: `gpu_parts.py PART DEVICE FOLDER`."""

# ruff: noqa: I001
import asyncio
import json
import math
import time
from array import array
from functools import partial
from itertools import chain, product, starmap
from unittest.mock import Mock

from gpu_programs import compiled, sanitizer, up
from gpu_setup import (
    ATTENTION, BANDWIDTH, DEVICE, DTYPE, FLOPS, GOALS, KINDS, NAME, OUT, ROOT, TOY, each, engines,
    launched, network, picked, predicted, relative, rows_of, say, seconds, tried, wait, written,
)  # fmt: skip

# isort: split
import torch
import triton
from safetensors.torch import load_file
from torch.profiler import ProfilerActivity
from torch.profiler import profile as profiled

from colaserve_bench.engines import Load, run
from colaserve_services.decoder.engine import DecodeJob
from colaserve_services.engine.limits import EngineLimits
from colaserve_services.errors import Overloaded
from colaserve_services.model import float8, kernels
from colaserve_services.model.backend import Denoise, Row, Sizes, Update, cuda, ops, self_check
from colaserve_services.model.backend.buckets import ROWS
from colaserve_services.model.backend.streams import CudaStream, Stream
from colaserve_services.model.checkpoint import Checkpoint
from colaserve_services.model.config import ModelShape
from colaserve_services.model.flow import SamplerSettings
from colaserve_services.model.kernels.products import product_reference
from colaserve_services.model.loading import STAGES, load
from colaserve_services.model.sampling import Draw, SamplingSettings, sample_blocks
from colaserve_services.prior.sampling_run import SampleJob


def parity():
    said = [torch.__version__, triton.__version__]
    if not TOY:
        said += [torch.cuda.get_device_name(), torch.cuda.get_device_capability(), torch.version.cuda]
    say("versions", " ".join(map(str, said)))
    tried(attention_against_float64)
    for dtype, most in ((torch.float32, 2e-5), (torch.bfloat16, 2e-2)):
        for name in ("tiny_b4", "tiny_b4_vae1", "tiny_b16_scaled"):
            tried(golden, name, dtype, most)
    tried(float8_against_torch)
    for number in range(len(KINDS)):
        tried(against_torch, number)


def small():
    """All kernels on little."""
    attention_against_float64()
    float8_against_torch()
    for dtype in (torch.float32, torch.bfloat16):
        on = Stream(DEVICE) if TOY else CudaStream(DEVICE, graphs=False)
        apart = self_check.disagreement(picked().prior.args[0], on, dtype)
        say(f"self-check in {dtype}: {apart or 'agrees'}", float(apart is None), least=1.0)


def paged(shape, histories):
    """Rows with so many positions before their own, each a sequence with pages in any order; queries for them."""
    n, longest = shape.positions, max(histories) // shape.positions + 1
    storage = kernels.Storage(shape, len(histories) * longest, DEVICE)
    storage.memory.copy_(torch.randn(storage.memory.shape, device=DEVICE))
    tables = torch.randperm(len(histories) * longest).view(-1, longest).int()
    history, number = torch.tensor(histories, dtype=torch.int32), torch.arange(len(histories), dtype=torch.int32)
    moved = (x.to(DEVICE) for x in (tables, number, history, tables[number, history // n].contiguous()))
    rows = ops.Rows(n, *moved, torch.empty(0), max(histories))
    return storage, rows, torch.randn(len(histories) * n, shape.heads, shape.head_dim, device=DEVICE).to(shape.dtype)


def attention_against_float64():
    """The kernel on memory full of NaN, ragged histories, pages in any order."""
    longest = 16 * (1 if TOY else 39)
    for dtype, most in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        shape = ops.PageShape(1, 16, 2, 64, dtype)
        storage, rows, q = paged(shape, [0, 16, longest // 32 * 16, longest])
        poison = torch.full((1 << 20,), math.nan, device=DEVICE)
        del poison  # an output that nobody writes holds it
        got = kernels.attention(storage, 0, q, rows)
        exact = ops.Storage(shape._replace(dtype=torch.float64), storage.memory.shape[2], DEVICE)
        exact.memory.copy_(storage.memory)
        say(f"attention {dtype}", relative(got, ops.attention(exact, 0, q.double(), rows)), most=most)


def float8_against_torch():
    """Every kind of tile. The interpreter cuts numbers off where a GPU rounds them."""
    if not TOY and (reason := float8.missing(DEVICE)):
        say("float8", reason)
        return
    for rows, activation in product((3,) if TOY else (3, 24, 100, 300), ("gelu_tanh", "swiglu")):
        x, weight = (torch.randn(count, 64 if TOY else 2048, device=DEVICE) for count in (rows, 512))
        given = *kernels.quantize(x), *float8.quantized(weight), None, activation, float8.FLOAT8
        hidden = kernels.product(*given)
        apart = relative(float8.widened(hidden), float8.widened(product_reference(*given)))
        say(f"float8 with {activation}, {rows} rows", apart, most=0.1 if TOY else 2e-2)
        given = *hidden, *float8.quantized(torch.randn_like(hidden.rows, dtype=torch.float32)), None, "none", DTYPE
        say(f"float8, {rows} rows", relative(kernels.product(*given), product_reference(*given)), most=2e-2)


@torch.inference_mode()
def against_torch(number):
    """A layer of the released size: a sequence of more keys than one split, all its blocks in a pass."""
    stage, kind, plain = KINDS[number]
    model, blocks, B = network(stage, 1), 18, 16
    sizes, found = Sizes(1 << 30, 1, B, B * blocks), []
    inputs = torch.randint(500, (blocks, B)) if stage == "encoder" else torch.randn(blocks, B, 16)
    for backend in (kind(model, sizes, picked().prior.args[0]), plain(model, sizes)):
        pages = array("i", backend.pages.reserve(blocks))
        rows = [Row(pages, i, inputs[i]) for i in range(blocks)]
        if stage == "prior":
            rows[-1] = rows[-1]._replace(time=700.0, denoise=Denoise(0, Update(1.0, -0.1), 3.0))
        found.append(backend.run(backend.plan(rows)).results())
    if stage != "decoder":
        found = [[each[-1][stage == "prior"]] for each in found]
    say(f"{stage}, a layer of the released size", max(map(relative, *found)), most=3e-2)


def attention_alone():
    """Of one layer of the released prior."""
    for k, context in ((1, 64),) if TOY else ((1, 512), (8, 512), (32, 512), (128, 512), (8, 2048), (128, 2048)):
        shape = ops.PageShape(1, 16, 1 if TOY else 16, 128, DTYPE)
        storage, rows, q = paged(shape, [context] * k)
        took = launched(partial(kernels.attention, storage, 0, q, rows))
        size = 2 * k * (context + 16) * shape.heads * shape.head_dim * DTYPE.itemsize
        say(f"attention, {k} rows, {context} before", size / took / 1e9, "GB/s", predicted=ATTENTION / 1e9)


def golden(name, dtype, most):
    """Blocks and tokens of all recorded texts at once, and texts with pinned positions alone and among others."""
    folder = ROOT / "tests" / "data" / "golden" / name
    tensors, meta = load_file(folder / "golden.safetensors"), json.loads((folder / "golden.json").read_text())
    checkpoint = Checkpoint.open(folder)
    networks = {stage: load(checkpoint, stage, DEVICE, dtype) for stage in STAGES}
    shape, B, P, same = checkpoint.shape, checkpoint.shape.block_size, checkpoint.shape.patch_size, []

    async def text(made, case, sample):
        ids = case["prompt_ids"][sample]
        (encoded,), _ = await made.encoder.encode([ids])
        settings = {"steps": case["params"]["timestep_num"], "guidance_scale": case["params"]["guidance_scale"]}
        seed = {"base_seed": case["noise_base_seed"], "sample_id": sample}
        job = SampleJob(encoded.latents, case["n_blocks"], sampler=SamplerSettings(**settings), **seed)
        blocks, m = await written(made.prior, job), len(encoded.latents)
        sampling = SamplingSettings(repetition_penalty=case["params"].get("repetition_penalty", 1.1))
        prefix, tokens = encoded.latents[: m // B * B], []
        async with made.decoder.session(DecodeJob(prefix, sampling)) as decoder:
            for block in blocks:
                tokens += (await decoder.decode(block)).token_ids
        same.append(tokens[len(ids) - len(prefix) * P if m % B else 0 :] == case["tokens"][sample])
        recorded = (tensors[f"gen{case['index']}.block_latents.{b}"][sample] for b in range(len(blocks)))
        return max(map(relative, blocks, recorded))

    def pinned(i):
        z = torch.randn(B * 3 + B // 2, shape.latent_dim, generator=torch.Generator().manual_seed(i))
        return SampleJob(z, 2 + i % 2, sampler=SamplerSettings(steps=3 + i, solver="ab2"), base_seed=i)

    async def everything(made):
        apart = [await text(made, case, 0) for case in meta["cases"]]
        for case in meta["cases"]:
            apart += await asyncio.gather(*(text(made, case, i) for i in range(len(case["prompts"]))))
        alone = [await written(made.prior, pinned(i)) for i in range(6)]
        among = await asyncio.gather(*(written(made.prior, pinned(i)) for i in range(6)))
        return max(apart), max(starmap(relative, zip(chain(*alone), chain(*among), strict=True)))

    with engines(networks, shape, EngineLimits(max_context=512, max_running=8)) as made:
        apart, among = asyncio.run(everything(made))
    kind = f"{name} {str(dtype).removeprefix('torch.')}"
    say(f"{kind}: latents", apart, most=most)
    say(f"{kind}: among others against alone", among, most=1e-4 if dtype == torch.float32 else 3e-2)
    say(f"{kind}: texts with the recorded tokens", sum(same) / len(same), least=1.0 if most < 1e-3 else None)


def prior_of(stream=None, slots=32, context=512):
    """Over pages of any content."""
    backend = cuda.Prior(network("prior"), Sizes(1 << 40, slots, 16, context + 32), picked().prior.args[0], stream)
    torch.manual_seed(3)
    for layer in backend.storage.memory.flatten(0, 1):
        layer.copy_(torch.randn(layer.shape, device=DEVICE))
    wait()
    return backend


def passes(backend, count, context):
    """Of as many sessions as run there; the latents after the last one. On a GPU nothing in them may wait."""
    for step in range(count):
        rows = rows_of(backend, backend.sizes.slots, context, 500.0 * (1 + step % 2), step == 0)
        under_way = backend.run(backend.plan(rows))
        while not under_way.done():
            pass
        last = under_way.results()
    return torch.stack([each.latents for each in last])


def graphs():
    found = []
    for with_graphs in (True, False):
        tried(passes_with, with_graphs, found)
    one, other = found
    say("graph against eager, largest difference", (one - other).abs().max().item(), most=0.0)


@torch.inference_mode()
def passes_with(with_graphs, found):
    context, began = 64 if TOY else 512, time.perf_counter()
    backend = prior_of(Stream(DEVICE) if TOY else CudaStream(DEVICE, graphs=with_graphs), 8, context)
    say(f"start with graphs {with_graphs}", time.perf_counter() - began, "s")
    backend.prepare([1000.0, 500.0])
    wait()
    if not TOY:
        torch.cuda.set_sync_debug_mode("error")
    try:
        found.append(passes(backend, 4 if TOY else 50, context))
    finally:
        if not TOY:
            torch.cuda.set_sync_debug_mode("default")
    say(f"nothing waited, graphs {with_graphs}", 1.0, least=1.0)
    some = [backend.run(backend.plan(rows_of(backend, k, context, 500.0, True))).results() for k in (1, 4, 8)]
    say("a row in other passes", max(relative(each[0].velocity, some[0][0].velocity) for each in some))


def ceilings():
    size = 1 << (20 if TOY else 32)
    one, other = (torch.zeros(size, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    say("copy", 2 * size / seconds(lambda: other.copy_(one), 5) / 1e9, "GB/s", predicted=BANDWIDTH / 1e9)
    D = 64 if TOY else 2048
    for name, out, inner in (("qkv", 3 * D, D), ("out", D, D), ("mlp in", 4 * D, D), ("mlp out", D, 4 * D)):
        tried(products, name, out, inner)
    tried(attention_alone)


def products(name, out, inner):
    """Of one of a layer's four, by rows of a pass."""
    weights = [(torch.randn(out, inner, device=DEVICE, dtype=DTYPE),) for _ in range(8)]  # more than a cache
    rest = (None, "gelu_tanh", float8.FLOAT8) if name == "mlp in" else (None, "none", DTYPE)
    quantized = [(*float8.quantized(*weight), *rest) for weight in weights[: 1 if TOY else 8]]
    for rows in ROWS[:: 8 if TOY else 3]:
        x = torch.randn(16 * rows, inner, device=DEVICE, dtype=DTYPE)
        took = each(partial(torch.nn.functional.linear, x), weights)
        floor = max(2 * 16 * rows * out * inner / FLOPS, 2 * out * inner / BANDWIDTH)
        say(f"{name}, {16 * rows} rows", took * 1e6, "us", predicted=floor * 1e6)
        if rows == 1 if TOY else not float8.missing(DEVICE):
            read = kernels.quantize(x)
            if name == "mlp out":  # what a product with an activation writes
                read = read._replace(scales=read.scales[:, None].repeat(1, -(-inner // float8.GROUP)))
            took = each(partial(kernels.product, *read), quantized)
            say(f"{name} in float8, {16 * rows} rows", took * 1e6, "us", predicted=floor * 1e6 / 2)


def engine():
    loads, contexts = ((1, 3), (32,)) if TOY else ((1, 8, 32, 128), (512, 64, 2048))
    began = time.perf_counter()
    kv_bytes = 1 << 28 if TOY else int(0.6 * torch.cuda.mem_get_info()[0])
    limits = EngineLimits(max_context=2304, max_running=max(loads), kv_bytes=kv_bytes)
    with engines({"prior": network("prior")}, ModelShape(16, 16, 16, 1, 512), limits) as made:
        say("the engine starts", time.perf_counter() - began, "s")
        for seed, (context, k) in enumerate(product(contexts, loads)):
            tried(loaded, k, context, made, seed)
        tried(memory_runs_out, made)
    if not TOY:
        say("memory, most", torch.cuda.max_memory_allocated() / 2**30, "GiB")


def loaded(k, context, made, seed):
    """An engine by its sessions."""
    what, goal = f"{k} sessions, context {context}", GOALS.get(k) if context == 512 else None
    try:
        asyncio.run(run(made, Load(k, 32, 2), 2 * seed))  # warm-up
        got = asyncio.run(run(made, Load(k, context, 5), 2 * seed + 1))
    except Overloaded as error:  # a smaller card
        say(f"{what}: left out, {error}", None)
        return
    tokens, (expected, step, _, floor) = got["tokens_per_second"], predicted(k, context)
    say(f"{what}: tokens a second", tokens, predicted=expected, ceiling=k / floor, least=None if TOY else goal)
    say(f"{what}: step", got["step_ms_p50"], "ms", predicted=step * 1e3, ceiling=floor * 1e3)


def memory_runs_out(made):
    asyncio.run(without_memory(made.prior))


async def without_memory(prior):
    """A newcomer whose times take memory that is not there is refused, and the others do not notice."""

    async def wrote(i, steps, begun):
        z = torch.randn(32, 16, generator=torch.Generator().manual_seed(i))
        job, blocks = SampleJob(z, 3 if TOY else 64, sampler=SamplerSettings(steps=steps), base_seed=i), []
        async with prior.session(job) as session:
            async for block in session:
                blocks.append(block.latents)
                begun.set()
        return torch.stack(blocks)

    found, refused = [], 0.0
    for lacking in (False, True):
        begun = [asyncio.Event() for _ in range(3)]
        writing = [asyncio.ensure_future(wrote(i, 16, each)) for i, each in enumerate(begun)]
        await asyncio.gather(*(each.wait() for each in begun))
        if lacking:
            held = filled(prior.backend)
            try:
                await wrote(9, 200, asyncio.Event())
            except Overloaded:
                refused = 1.0
            del held
        found.append(await asyncio.gather(*writing))
    say("no memory left: the newcomer is refused", refused, least=1.0)
    say("no memory left: the others' latents", max(map(relative, *found)), most=0.2)  # passes of other sizes


def filled(backend):
    """All memory that is left; a CPU's backend only says so."""
    if TOY:
        backend.prepare = Mock(side_effect=torch.OutOfMemoryError())
    held, size = [], 0 if TOY else 1 << 34
    while size > 1 << 20:
        try:
            held.append(torch.empty(size, dtype=torch.uint8, device=DEVICE))
        except torch.OutOfMemoryError:
            size //= 2
    return held


def stage_pass(backend, stage, count):
    """Milliseconds of one over so many blocks without a history."""
    pages = [array("i", backend.pages.reserve(1)) for _ in range(count)]
    inputs = torch.zeros(16, 16) if stage == "decoder" else torch.zeros(16, dtype=torch.int64)
    draws = [Draw(SamplingSettings(temperature=0.7), {1, 2}, i) for i in range(count)]
    then = (lambda logits: sample_blocks(logits, draws),) if stage == "decoder" else ()
    rows = [Row(each, 0, inputs) for each in pages]
    took = seconds(lambda: backend.run(backend.plan(rows), *then).results())
    backend.pages.free([page for each in pages for page in each])
    return took * 1e3


def stages():
    for number, counts in ((1, (1, 16, 64)), (2, (1, 32, 256))):
        tried(stage_of, number, counts[: 1 if TOY else 3])


@torch.inference_mode()
def stage_of(number, counts):
    stage, kind, _ = KINDS[number]
    backend = kind(network(stage), Sizes(4 << 30, 4 if TOY else 64, 16, 128), picked().prior.args[0])
    for count in counts:
        say(f"{stage}, a pass of {count} blocks", stage_pass(backend, stage, count), "ms")


def profile():
    activities = [ProfilerActivity.CPU] + ([] if TOY else [ProfilerActivity.CUDA])
    with torch.inference_mode():
        backend = prior_of(None, 32, 64 if TOY else 512)
        for k in (1,) if TOY else (1, 32):
            with profiled(activities=activities) as trace:
                for step in range(3):
                    backend.run(backend.plan(rows_of(backend, k, 64 if TOY else 512, 500.0, step == 0))).results()
            trace.export_chrome_trace(str(OUT / f"trace_{k}.json.gz"))
            say(f"trace_{k}.json.gz", None)


OF_ALL = compiled, parity, small, graphs, engine, ceilings, stages, up, profile, sanitizer
PARTS = {part.__name__: part for part in OF_ALL}

if __name__ == "__main__":
    PARTS[NAME]()
