"""The Open Inference Protocol through real engines: the same answers as the other services give, raw and typed."""

from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np

from colaserve.v1 import latent_service_pb2
from colaserve_services.inference import open_inference_pb2 as pb
from colaserve_services.rpc import arrays
from tests.services.inference.asking import asked, latents, outputs, raw, served, streaming, text
from tests.services.servers import failure
from tests.services.systems import ids_of, recorded, system, text_of

TEXT = "He looked at the river and then he said"


async def refused(call: Any) -> tuple[grpc.StatusCode, str]:
    found = await failure(call)
    return found.code(), found.details()


async def test_generate_gives_the_ids_and_texts_that_generation_gives_whole_and_by_blocks(tiny):
    case = tiny.meta["cases"][0]
    async with system(tiny, split=True) as it:
        fields = recorded(case, 0, 12)
        wanted = await it.generate(**fields)
        settings = {
            "max_new_tokens": 12, "ignore_end": True, "print_special": True, "seed": fields["seed"]["base_seed"],
            **fields["sampler"], **fields["sampling"],
        }  # fmt: skip
        whole = await it.inference.ModelInfer(asked("generate", text(fields["prompt"]), **settings))
        got = outputs(whole)
        assert (list(got["token_ids"]), got["text_output"]) == (ids_of(wanted), text_of(wanted))
        assert (got["finish_reason"], whole.id, whole.model_version) == ("length", "x", "1")
        usage = wanted[-1].usage
        counts = {name: value.int64_param for name, value in whole.parameters.items()}
        assert counts == {
            "prompt_tokens": usage.prompt_tokens, "completion_tokens": 12, "seed": settings["seed"], "sample_id": 0
        }  # fmt: skip
        each = [asked("generate", text(fields["prompt"]), streaming(flag), **settings) for flag in (True, False)]
        stream = [answer.infer_response async for answer in it.inference.ModelStreamInfer(iter(each))]
        assert [part.parameters["triton_final_response"].bool_param for part in stream] == [
            *[False] * (len(wanted) - 1), True, True
        ]  # fmt: skip
        assert [outputs(part)["text_output"] for part in stream] == [*[one.text for one in wanted], text_of(wanted)]
        blocks = np.concatenate([outputs(part)["token_ids"] for part in stream[:-1]])
        assert list(blocks) == list(outputs(stream[-1])["token_ids"]) == ids_of(wanted)


async def test_latents_go_to_and_fro_as_over_the_latent_service_raw_and_typed_and_in_half_precision(tiny):
    async with system(tiny, split=True) as it:
        answer = await it.latents.EncodeText(latent_service_pb2.EncodeTextRequest(texts=[TEXT]))
        wanted = arrays.from_message(answer.encodings[0].latents.values, "", (None, 16))
        encoded = await it.inference.ModelInfer(asked("encoder", text(TEXT)))
        values, space = outputs(encoded)["latents"], encoded.parameters["space"].string_param
        assert np.array_equal(values, wanted)
        request = latent_service_pb2.DecodeLatentsRequest(latents=arrays.latents_to_message(wanted, space))
        decoded = (await it.latents.DecodeLatents(request)).text
        bfloat16 = (values.view("<u4") >> 16).astype("<u2")
        ways = [
            asked("decoder", latents(values), raw_contents=[values.tobytes()], space=space),
            asked("decoder", latents(values, typed=True)),
            asked("decoder", latents(values, "FP16"), raw_contents=[values.astype("<f2").tobytes()]),
            asked("decoder", latents(values, "BF16"), raw_contents=[bfloat16.tobytes()]),
        ]
        texts = [outputs(await it.inference.ModelInfer(one))["text_output"] for one in ways]
        assert texts[:2] == [decoded, decoded]
        assert len(texts[3]) > 0 < len(texts[2])  # rounded latents may read otherwise
        settings = {"seed": 3, "max_blocks": 2, "steps": 2}
        sampled = await it.inference.ModelInfer(asked("prior", latents(values[:4], typed=True), **settings))
        sample = latent_service_pb2.SampleLatentsRequest(
            prefix=arrays.latents_to_message(wanted[:4], space), max_blocks=2, seed={"base_seed": 3},
            sampler={"steps": 2},
        )  # fmt: skip
        blocks = [one.latents.values async for one in it.latents.SampleLatents(sample)]
        expected = np.concatenate([arrays.from_message(block, "", (None, 16)) for block in blocks])
        assert np.allclose(outputs(sampled)["latents"], expected, atol=1e-4)
        free = asked("prior", **settings)
        parts = [one.infer_response async for one in it.inference.ModelStreamInfer(iter([free]))]
        assert [outputs(part)["latents"].shape for part in parts] == [(4, 16)] * 2


async def test_metadata_name_what_each_model_takes_and_returns(tiny):
    async with system(tiny, split=True) as it:
        for name, takes, returns in (
            ("generate", {"text_input": [1], "streaming": [1]}, {"text_output": [1], "finish_reason": [1]}),
            ("encoder", {"text_input": [1]}, {"latents": [-1, 16]}),
            ("decoder", {"latents": [-1, 16]}, {"text_output": [1]}),
            ("prior", {"latents": [-1, 16]}, {"latents": [-1, 16]}),
        ):
            found = await it.inference.ModelMetadata(pb.ModelMetadataRequest(name=name))
            assert {tensor.name: list(tensor.shape) for tensor in found.inputs} == takes
            assert {tensor.name: list(tensor.shape) for tensor in found.outputs}.items() >= returns.items()
            assert (await it.inference.ModelReady(pb.ModelReadyRequest(name=name, version="1"))).ready
        assert not (await it.inference.ModelReady(pb.ModelReadyRequest(name="other"))).ready
        assert (await it.inference.ServerLive(pb.ServerLiveRequest())).live
        assert (await it.inference.ServerReady(pb.ServerReadyRequest())).ready
        assert (await it.inference.ServerMetadata(pb.ServerMetadataRequest())).name == "colaserve"
        unknown = await refused(it.inference.ModelMetadata(pb.ModelMetadataRequest(name="generate", version="2")))
        assert unknown == (grpc.StatusCode.INVALID_ARGUMENT, "version: got '2', expected '1', or none")


def wrong() -> Iterator[tuple[str, pb.ModelInferRequest]]:
    """What is said, and of what."""
    here = np.zeros((4, 16), np.float32)
    yield "model_name: got 'gpt', expected one of", asked("gpt", text(TEXT))
    yield "inputs: got [], expected text_input among them", asked("generate")
    yield "inputs[0].name: got 'prompt', expected one of", asked("generate", text(TEXT, "prompt"))
    yield "inputs[1].name: got 'text_input', expected one of ['streaming']", asked("generate", *[text(TEXT)] * 2)
    yield "inputs[0].datatype: got 'INT8', expected BYTES", asked("generate", text(TEXT) | {"datatype": "INT8"})
    yield "inputs[0].shape: got [1, 1], expected [1]", asked("generate", text(TEXT) | {"shape": [1, 1]})
    yield "inputs[0]: got bytes that are no UTF-8 at 0", asked("generate", text(b"\xff"))
    more = {"name": "text_input", "datatype": "BYTES", "shape": [1]}
    yield "contents.bytes_contents: got 0 elements, expected 1", asked("generate", more)
    yield "its raw contents: got 3 bytes, expected one element", asked("generate", more, raw_contents=[b"abc"])
    yield "inputs[0].contents: got raw contents too", asked("generate", text(TEXT), raw_contents=[raw(b"a")])
    yield "raw_input_contents: got 2, expected one for each of the 1", asked("generate", more, raw_contents=[b""] * 2)
    yield "streaming: got true, which only ModelStreamInfer takes", asked("generate", text(TEXT), streaming())
    yield "outputs[0].name: got 'logits'", asked("generate", text(TEXT), outputs=["logits"])
    yield "parameters.foo: is unknown, expected seed,", asked("generate", text(TEXT), foo=1)
    yield "parameters.seed: got 'x', expected an int64 or uint64", asked("generate", text(TEXT), seed="x")
    yield "parameters.steps: got 0, expected 1 to 1000", asked("generate", text(TEXT), steps=0)
    yield "parameters.max_new_tokens: a prompt of", asked("generate", text(TEXT), max_new_tokens=10_000)
    yield "parameters.stop: got an empty string", asked("generate", text(TEXT), stop="")
    yield "parameters.temperature: is unknown, expected none", asked("encoder", text(TEXT), temperature=1.0)
    yield "text_input: got an empty text", asked("encoder", text(""))
    yield "latents.shape: got [4, 3], expected [any, 16]", asked("decoder", latents(here[:, :3], typed=True))
    yield "latents.data: got 4 bytes", asked("decoder", latents(here), raw_contents=[b"abcd"])
    yield "latents.data: got nan at [0, 0]", asked("decoder", latents(here * np.nan, typed=True))
    yield "inputs[0].contents: got FP16, expected raw_input_contents", asked("decoder", latents(here, "FP16", True))
    yield "inputs[0].shape: got [-4, 16], expected", asked("decoder", latents(here, typed=True) | {"shape": [-4, 16]})
    yield "latents.space: got latents of space 'other'", asked("decoder", latents(here, typed=True), space="other")


async def test_what_cannot_be_served_is_refused_by_name_whole_and_in_a_stream(tiny):
    async with system(tiny, split=True) as it:
        for message, request in wrong():
            code, said = await refused(it.inference.ModelInfer(request))
            other = "space" in message
            assert code is (grpc.StatusCode.FAILED_PRECONDITION if other else grpc.StatusCode.INVALID_ARGUMENT)
            assert message in said
        call = it.inference.ModelStreamInfer(iter([asked("generate"), asked("generate", text(TEXT))]))
        code, said = await refused(call.read())
        assert (code, said[:7]) == (grpc.StatusCode.INVALID_ARGUMENT, "inputs:")


async def test_a_stream_whose_caller_sends_nothing_more_is_ended():
    stream = (await served(idle_seconds=0.05))[0].ModelStreamInfer()
    await stream.write(pb.ModelInferRequest(model_name="prior"))
    assert (await stream.read()).infer_response.outputs
    code, said = await refused(stream.read())
    assert (code, "no request came for 0.05 s" in said) == (grpc.StatusCode.UNAVAILABLE, True)
