# ruff: noqa: E402
"""What the parts of scripts/check-gpu share: imports of this tree, lines of the report, networks, engines."""

import contextlib
import importlib.util
import json
import math
import os
import sys
import time
import traceback
from array import array
from functools import cache, partial
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock


def found(name):
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # its parent is not there
        return False


ROOT = Path(__file__).resolve().parents[1]
SOURCES = [str(ROOT / name) for name in ("services", "client", "protos/gen", "")]
WIRE = (
    "grpc", "grpc_status", "grpc_health", "grpc_reflection", "google.protobuf", "prometheus_client", "click",
    "pydantic", "starlette", "uvicorn", "huggingface_hub", "tokenizers", "tqdm",
)  # fmt: skip
LACKING = {name.partition(".")[0] for name in WIRE if not found(name)}
TOY = sys.argv[2:3] == ["cpu"]
BANDWIDTH, FLOPS = 4.3e12, 700e12  # of an H200: a measured copy; bfloat16 products of this width, assumed
ATTENTION, LAUNCH, HOST = 3e12, 1.5e-6, (150e-6, 15e-6)  # bytes/s, s a kernel, s a pass and a session: assumed
GOALS = {1: 1000, 8: 4500, 32: 5500, 128: 5500}  # tokens/s at context 512


class StandIn(MetaPathFinder, Loader):
    """For packages of the wire that a bare machine lacks: the engines import their names and call none."""

    def find_spec(self, name, path=None, target=None):
        root = name.partition(".")[0]
        lacks = root in LACKING or (root == "colaserve" and LACKING & {"grpc", "google"})
        return ModuleSpec(name, self, is_package=True) if lacks else None

    def create_module(self, spec):
        module = MagicMock(__path__=[], __name__=spec.name)
        names = ("SOLVER_UNSPECIFIED", "SOLVER_EULER", "SOLVER_AB2", "SOLVER_HEUN")  # as in types.proto
        values = {number: SimpleNamespace(name=name) for number, name in enumerate(names)}
        module.types_pb2.Solver.DESCRIPTOR.values_by_number = values
        return module

    def exec_module(self, module):
        pass


os.environ |= {"TRITON_INTERPRET": "1"} if TOY else {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}  # as roles
sys.path[:0] = SOURCES
sys.meta_path.insert(0, StandIn())

import torch

from colaserve_bench.engines import DeviceCalls, StepRecorder
from colaserve_services.decoder.engine import DecoderEngine
from colaserve_services.encoder.engine import EncoderEngine
from colaserve_services.engine.device import DeviceThread
from colaserve_services.model.backend import Denoise, Row, Update, cuda, reference
from colaserve_services.model.backend.buckets import ROWS
from colaserve_services.model.backend.pick import bucketed, pick
from colaserve_services.model.backend.streams import CudaStream
from colaserve_services.model.config import DiTConfig, TextVAEConfig
from colaserve_services.model.dit import DiT
from colaserve_services.model.layers import Linear
from colaserve_services.model.text_vae import TextVAEDecoder, TextVAEEncoder
from colaserve_services.prior.engine import PriorEngine

KINDS = (
    ("prior", cuda.Prior, reference.Prior), ("decoder", cuda.Decoder, reference.Decoder),
    ("encoder", cuda.Encoder, reference.Encoder),
)  # fmt: skip
NAME, DEVICE, OUT = sys.argv[1], torch.device(sys.argv[2]), Path(sys.argv[3]).resolve()
DTYPE = torch.float32 if TOY else torch.bfloat16
if not TOY:
    DEVICE = torch.device("cuda", DEVICE.index or 0)
    torch.cuda.set_device(DEVICE)


def say(what, value, unit="", predicted=None, ceiling=None, most=None, least=None, ok=None):
    """One line: a figure with what was predicted and what the card allows, and what it may be at most or must be at
    least."""
    if (most, least) != (None, None):
        ok = not math.isnan(value) and (most is None or value <= most) and (least is None or value >= least)
    found = {
        "part": NAME,
        "what": what,
        "value": value,
        "unit": unit,
        "predicted": predicted,
        "ceiling": ceiling,
        "ok": ok,
    }
    found["limit"] = most if least is None else least
    print(json.dumps(found), flush=True)
    with open(OUT / "lines.jsonl", "a") as file:
        file.write(json.dumps(found) + "\n")


def tried(call, *given):
    """Do it: what it raises is a line, and others go on; after a CUDA error they raise the same."""
    try:
        call(*given)
    except Exception as error:
        traceback.print_exc()
        shown = (str(each) for each in given if isinstance(each, str | int | torch.dtype))
        what = " ".join((call.__name__, *shown))
        say(f"{what}: {type(error).__name__}: {str(error).partition(chr(10))[0]}"[:300], None, ok=False)


def wait():
    if not TOY:
        torch.cuda.synchronize()


def seconds(call, repeats=5):
    """Of one call, the least of three rounds."""
    call()
    best = math.inf
    for _ in range(3):
        wait()
        began = time.perf_counter()
        for _ in range(repeats):
            call()
        wait()
        best = min(best, (time.perf_counter() - began) / repeats)
    return best


def launched(call):
    """Seconds of the device for what a call launches: from a graph, since launching it takes longer."""
    if TOY:
        return seconds(call, 1)
    stream = CudaStream(DEVICE, graphs=True)
    stream.join()
    with torch.inference_mode(), stream.on():
        took = seconds(stream.captured(call), 20)
    torch.cuda.empty_cache()  # of the graph
    return took


def each(call, given):
    """Those of a call, over different arguments."""
    return launched(lambda: [call(*some) for some in given]) / len(given)


@cache
def picked():
    """The backend for GPUs; on a CPU with the kernels' references in their place."""
    if TOY:
        from tests.services.kernel_references import references

        return bucketed(references(), DEVICE)
    found = pick(DEVICE, DTYPE)
    if found.name != "cuda":
        say(f"the kernels are not chosen: {found.why}", 0.0, least=1.0)
        sys.exit(1)
    return found


def network(stage, layers=None):
    """Random weights of the released shape, or fewer layers of it, made on the device."""
    dit, vae = {"block_size": 16}, {"block_size": 16}
    if layers:
        dit["num_layers"] = vae["encoder_num_blocks"] = vae["decoder_num_blocks"] = layers
    if TOY:
        dit |= {"txt_dim": 64, "emb_dim": 64, "heads": 2, "head_dim": 32, "num_layers": 2, "rope_dim": 24}
        vae |= {"vocab_size": 512, "encoder_num_blocks": 1, "decoder_num_blocks": 1, "dim": 64, "ffn_dim": 128}
        vae["num_heads"] = 2
    kind = {"prior": DiT, "decoder": TextVAEDecoder, "encoder": TextVAEEncoder}[stage]
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = kind(DiTConfig(**dit) if stage == "prior" else TextVAEConfig(**vae)).requires_grad_(False)
    for module in model.modules():
        if isinstance(module, Linear | torch.nn.Embedding):
            module.to(DTYPE)
        if isinstance(module, Linear):
            module.pack()
    return model.eval()


def rows_of(backend, k, context, t, first):
    """A pass of k sessions at one time, over pages of any content."""
    B, d = backend.sizes.block_size, backend.model.config.txt_in_channels
    pages = [array("i", range(i * (context // B + 1), (i + 1) * (context // B + 1))) for i in range(k)]
    z = torch.randn(k, B, d, generator=torch.Generator().manual_seed(1)) if first else [None] * k
    return [Row(pages[i], context // B, z[i], t, Denoise(i, Update(1.0, -1 / 16), 7.0)) for i in range(k)]


def predicted(k, context):
    """Of k sessions out of step, at released size: tokens a second, seconds of a pass, most rows of one, and the floor
    of a step, from bytes, operations and launches.

    A block is 16 passes and one that its session is left out of, as it needs the last one's result. Other sessions'
    passes hide what the host does; one alone waits for that once a block."""
    total, most, weights = 0.0, 0, 2.416e9
    for now in range(17):
        at = [(now + 17 * i // k) % 17 for i in range(k)]
        served = sum(each < 16 for each in at)
        rows = 16 * next(size for size in ROWS if size >= min(2 * served + at.count(0), ROWS[-1]))
        products = max(weights / BANDWIDTH, weights * rows / FLOPS)
        between = 40 * 2048 * 24 * rows / BANDWIDTH / 2
        device = products + between + 196_608 * context * served / ATTENTION + (9 * 24 + 12) * LAUNCH
        total, most = total + max(device * bool(served), HOST[0] + HOST[1] * served), max(most, rows)
    floor = max(weights / BANDWIDTH, weights * 32 * k / 790e12) + 196_608 * context * k / BANDWIDTH
    return 16 * k / total, total / 17, most, floor


def relative(got, expected):
    got, expected = got.float().cpu(), expected.float().cpu()
    return ((got - expected).norm() / expected.norm()).item()


@contextlib.contextmanager
def engines(networks, shape, limits):
    """Engines of some stages, by name, with what benchmarks of `colaserve_bench.engines` take beside them."""
    thread, steps = DeviceThread(), StepRecorder()
    kinds = {"prior": PriorEngine, "decoder": DecoderEngine, "encoder": partial(EncoderEngine, pad_id=2)}
    made = {"decoder": None, "steps": steps, "device_calls": DeviceCalls(thread)}
    made["block_tokens"] = shape.block_size * shape.patch_size
    for stage, network in networks.items():
        observer = {"observer": steps} if stage == "prior" else {}
        made[stage] = kinds[stage](network, shape, thread, limits, picked=picked(), **observer)
    thread.start()
    try:
        yield SimpleNamespace(**made)
    finally:
        thread.stop()


async def written(prior, job):
    async with prior.session(job) as session:
        return [block.latents async for block in session]
