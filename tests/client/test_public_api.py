"""The public API: what is in it, what it costs to import, and that both kinds of client offer the same."""

import dataclasses
import inspect
import subprocess
import sys

import pytest

import colaserve_client

PUBLIC = """
__version__ AsyncClient AsyncDecoderClient AsyncDecodeSession AsyncEncoderClient AsyncPriorClient AsyncStream
Branch BranchBlock Cancelled ChoiceScore Client ColaserveError Connection DeadlineExceeded DecodedBlock DecodedLatents
DecoderClient DecodeSession Density Embedding EncoderClient FinishReason GenerationChunk GenerationOutcome
GenerationRequest GenerationResult
InfillResult Interpolation InterpolationPoint InvalidRequest LatentBlock Latents LatentsLike Limits load_latents
Logprobs LogprobsDtype MessageTooLarge ModelInfo ModelMismatch ModelShape NoiseSeed NotAuthenticated NotSupported
Overloaded Pooling Preview PriorClient Probes Prompt Reconstruction Retry Sampler Sampling save_latents Score
Scoring SequenceEncoding ServerError ServerInfo ServiceInfo Solver StageInfo Steering Stream TextEncoding Timing Tls
TokenLogprobs Tokens TopToken Trajectory Unavailable Usage
"""
METHODS = """
close decode_latents detokenize embed encode_text fork fork_all generate generate_many healthy infill info
interpolate latent_info logprobs reconstruct sample_latents score stream target tokenize wait_until_ready
"""
PAIRS = ["Client", "EncoderClient", "PriorClient", "DecoderClient", "DecodeSession", "Stream"]


def public_members(kind: type) -> set[str]:
    return {name for name in dir(kind) if not name.startswith("_")}


def test_the_public_api_is_the_listed_one() -> None:
    assert sorted(colaserve_client.__all__) == sorted(PUBLIC.split())
    assert sorted(public_members(colaserve_client.Client)) == sorted(METHODS.split())


@pytest.mark.parametrize("name", PAIRS)
def test_blocking_and_asyncio_clients_offer_the_same(name: str) -> None:
    sync, aio = getattr(colaserve_client, name), getattr(colaserve_client, f"Async{name}")
    assert public_members(sync) == {"close" if each == "aclose" else each for each in public_members(aio)}
    for member in public_members(sync) - {"close"}:
        if inspect.isfunction(getattr(sync, member)):
            parameters = [list(inspect.signature(getattr(kind, member)).parameters) for kind in (sync, aio)]
            assert parameters[0] == parameters[1], member


@pytest.mark.parametrize("name", [name for name in PUBLIC.split() if inspect.isclass(getattr(colaserve_client, name))])
def test_every_class_its_members_and_its_fields_are_documented_where_help_shows_it(name: str) -> None:
    kind = getattr(colaserve_client, name)
    reported = inspect.getdoc(kind) or ""
    assert reported
    assert not reported.startswith(f"{name}("), f"{name} has only what dataclass writes"
    assert [
        m for m, found in inspect.getmembers_static(kind, inspect.isfunction) if m[0] != "_" and not found.__doc__
    ] == []
    fields = dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ()
    assert [each.name for each in fields if f"\n    {each.name}: " not in reported] == []


@pytest.mark.parametrize("module", ["colaserve_client", "colaserve_client.cli.main"])
def test_importing_loads_nothing_heavy(module: str) -> None:
    heavy = ["torch", "tokenizers", "safetensors", "starlette", "transformers", "matplotlib", "colaserve_services"]
    code = f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
