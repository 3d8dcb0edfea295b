"""Messages made at random: each is answered or refused by name, none is an internal error."""

import asyncio
from typing import Any

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colaserve_services.inference import open_inference_pb2 as pb
from colaserve_services.inference.models import MODELS
from tests.services.inference.serving import served

NAMES = sorted({spec.name for model in MODELS.values() for spec in (*model.inputs, *model.outputs)})
SETTINGS = sorted({name for model in MODELS.values() for name in model.parameters})
REFUSED = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION}


def often(known: list[str]) -> st.SearchStrategy[str]:
    return st.sampled_from(known) | st.text(max_size=8)


values = st.one_of(
    st.builds(pb.InferParameter, bool_param=st.booleans()),
    st.builds(pb.InferParameter, int64_param=st.integers(-(2**63), 2**63 - 1) | st.integers(0, 9)),
    st.builds(pb.InferParameter, uint64_param=st.integers(0, 2**64 - 1)),
    st.builds(pb.InferParameter, double_param=st.floats()),
    st.builds(pb.InferParameter, string_param=often(["euler", "heun"])),
    st.just(pb.InferParameter()),
)
parameters = st.dictionaries(often(SETTINGS), values, max_size=4)
contents = st.one_of(
    st.none(),
    st.builds(pb.InferTensorContents, bytes_contents=st.lists(st.binary(max_size=9) | st.just(b"a"), max_size=2)),
    st.builds(pb.InferTensorContents, fp32_contents=st.lists(st.floats(width=32), max_size=8)),
    st.builds(pb.InferTensorContents, bool_contents=st.lists(st.booleans(), max_size=2)),
    st.builds(pb.InferTensorContents, int_contents=st.lists(st.integers(-9, 9), max_size=2)),
)
shapes = st.sampled_from([[1], [0, 2], [1, 2], [2, 2], [4, 2]]) | st.lists(st.integers(-(2**63), 2**63 - 1), max_size=4)
inputs = st.builds(
    pb.ModelInferRequest.InferInputTensor,
    name=often(NAMES),
    datatype=often(["BYTES", "BOOL", "FP32", "FP16", "BF16"]),
    shape=shapes,
    parameters=st.just({}) | parameters,
    contents=contents,
)
raw = st.binary(max_size=40) | st.sampled_from([b"\1\0\0\0a", b"\1", bytes(8), bytes(32)])
TEXT = pb.ModelInferRequest.InferInputTensor(
    name="text_input", datatype="BYTES", shape=[1], contents={"bytes_contents": [b"a"]}
)
LATENTS = pb.ModelInferRequest.InferInputTensor(
    name="latents", datatype="FP32", shape=[4, 2], contents={"fp32_contents": range(8)}
)
RIGHT = {"generate": TEXT, "encoder": TEXT, "decoder": LATENTS, "prior": LATENTS}
CHANGES = {
    "model_name": st.text(max_size=8),
    "model_version": often(["1"]),
    "id": st.text(max_size=300),
    "parameters": parameters,
    "inputs": st.lists(inputs, max_size=2),
    "outputs": st.lists(st.builds(pb.ModelInferRequest.InferRequestedOutputTensor, name=often(NAMES)), max_size=2),
    "raw_input_contents": st.lists(raw, max_size=2),
}


@st.composite
def requests(draw: st.DrawFn) -> pb.ModelInferRequest:
    """A right one, with one or two of its fields made at random."""
    model = draw(st.sampled_from(list(RIGHT)))
    fields = {"model_name": model, "inputs": [RIGHT[model]]}
    changed = draw(st.lists(st.sampled_from(list(CHANGES)), min_size=1, max_size=2))
    return pb.ModelInferRequest(**fields | {name: draw(CHANGES[name]) for name in changed})


def test_no_message_is_an_internal_error_whole_or_in_a_stream():
    answered = 0

    async def answer(stub: Any, request: pb.ModelInferRequest) -> int:
        stream = stub.ModelStreamInfer()
        await stream.write(request)
        codes = []
        for call in (stub.ModelInfer(request), stream.read()):
            [found] = await asyncio.wait_for(asyncio.gather(call, return_exceptions=True), 20)
            codes.append(found.code() if isinstance(found, grpc.aio.AioRpcError) else None)
        stream.cancel()
        assert set(codes) <= {None, *REFUSED}, request
        return codes.count(None)

    with asyncio.Runner() as runner:
        stub, _ = runner.run(served(max_context=64))

        @given(requests())
        @settings(max_examples=150)
        def send(request: pb.ModelInferRequest) -> None:
            nonlocal answered
            answered += runner.run(answer(stub, request))

        send()
    assert answered > 40


async def test_a_stream_whose_caller_sends_nothing_more_is_ended():
    stream = (await served(idle_seconds=0.05))[0].ModelStreamInfer()
    await stream.write(pb.ModelInferRequest(model_name="prior"))
    assert (await stream.read()).infer_response.outputs
    with pytest.raises(grpc.aio.AioRpcError, match=r"no request came for 0\.05 s") as caught:
        await stream.read()
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
