"""The public API: what is in it, what it costs to import, and that both kinds of client offer the same."""

import dataclasses
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import colaserve_client

ROOT = Path(__file__).resolve().parents[2]

PUBLIC = {
    *("AsyncClient", "AsyncDecodeSession", "AsyncDecoderClient", "AsyncEncoderClient", "AsyncPriorClient"),
    *("AsyncStream", "Cancelled", "Client", "ColaserveError", "Connection", "DeadlineExceeded", "DecodeSession"),
    *("DecodedBlock", "DecodedLatents", "DecoderClient", "EncoderClient", "FinishReason", "GenerationChunk"),
    *("GenerationOutcome", "GenerationRequest", "GenerationResult", "InfillResult", "Interpolation"),
    *(
        "InterpolationPoint",
        "InvalidRequest",
        "LatentBlock",
        "Latents",
        "LatentsLike",
        "Limits",
        "MessageTooLarge",
        "ModelInfo",
    ),
    *("ModelMismatch", "ModelShape", "NoiseSeed", "NotAuthenticated", "NotSupported", "Overloaded", "PriorClient"),
    *("Prompt", "Reconstruction", "Retry", "Sampler", "Sampling", "SequenceEncoding", "ServerError", "ServerInfo"),
    *("ServiceInfo", "Solver", "StageInfo", "Stream", "TextEncoding", "Timing", "Tls", "TokenLogprobs", "Tokens"),
    "TopToken",
    *("Unavailable", "Usage", "__version__", "load_latents", "save_latents"),
}
METHODS = {
    *("close", "decode_latents", "detokenize", "encode_text", "generate", "generate_many", "healthy", "infill"),
    *("info", "interpolate", "latent_info", "reconstruct", "sample_latents", "stream", "target", "tokenize"),
    "wait_until_ready",
}
PAIRS = ["Client", "EncoderClient", "PriorClient", "DecoderClient", "DecodeSession", "Stream"]


def public_members(kind: type) -> set[str]:
    return {name for name in dir(kind) if not name.startswith("_")}


def test_the_public_api_is_the_listed_one() -> None:
    assert sorted(colaserve_client.__all__) == sorted(PUBLIC)
    assert all(hasattr(colaserve_client, name) for name in PUBLIC)


def test_clients_have_the_listed_methods() -> None:
    assert public_members(colaserve_client.Client) == METHODS


@pytest.mark.parametrize("name", PAIRS)
def test_blocking_and_asyncio_clients_offer_the_same(name: str) -> None:
    sync, aio = getattr(colaserve_client, name), getattr(colaserve_client, f"Async{name}")
    assert public_members(sync) == {"close" if each == "aclose" else each for each in public_members(aio)}
    for member in public_members(sync) - {"close"}:
        if inspect.isfunction(getattr(sync, member)):
            parameters = [list(inspect.signature(getattr(kind, member)).parameters) for kind in (sync, aio)]
            assert parameters[0] == parameters[1], member


def test_everything_public_says_what_it_is() -> None:
    for name in sorted(PUBLIC):
        value = getattr(colaserve_client, name)
        if inspect.isclass(value):
            assert value.__doc__, name
            assert not value.__doc__.startswith(f"{name}("), f"{name} has only what dataclass writes"
            for member in public_members(value):
                if inspect.isfunction(found := inspect.getattr_static(value, member)):
                    assert found.__doc__, f"{name}.{member}"


def test_every_field_is_documented_where_help_shows_it() -> None:
    kinds = [getattr(colaserve_client, name) for name in sorted(PUBLIC)]
    for kind in filter(dataclasses.is_dataclass, kinds):
        reported = inspect.getdoc(kind) or ""
        assert [each.name for each in dataclasses.fields(kind) if f"\n    {each.name}: " not in reported] == [], kind


def test_the_version_is_the_packages() -> None:
    assert re.fullmatch(r"\d+\.\d+\S*|unknown", colaserve_client.__version__)


@pytest.mark.parametrize("module", ["colaserve_client", "colaserve_client.cli.main"])
def test_importing_loads_nothing_heavy(module: str) -> None:
    heavy = ["torch", "tokenizers", "safetensors", "starlette", "transformers", "matplotlib", "colaserve_services"]
    code = f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment())
    assert done.stdout.strip() == "[]"


def environment() -> dict[str, str]:
    paths = [str(ROOT / folder) for folder in ("client", "services", "protos/gen")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
