"""What the gRPC services of encoder and decoder give is recorded; of whole generations see
test_golden_generation.py."""

import pytest
import torch

from colaserve.v1 import decoder_pb2, encoder_pb2
from colaserve_services.rpc import arrays
from tests.services.stages.serving import serving, tensor_of


def relative(got, expected):
    return ((got - expected).norm() / expected.norm()).item()


def values(message):
    return tensor_of(message.values)


@pytest.mark.parametrize("with_variance", [False, True])
async def test_encode_gives_the_recorded_latents_and_variances(golden, with_variance):
    ids = [golden.tensors[f"encode.ids.{i}"].tolist() for i in range(3)]
    async with serving(golden) as served:
        response = await served.encoder.Encode(
            encoder_pb2.EncodeRequest(sequences=[{"ids": x} for x in ids], with_variance=with_variance)
        )
        normalise = served.stages.engines["encoder"].model.normalise
    for i, encoding in enumerate(response.encodings):
        assert relative(values(encoding.latents), normalise(golden.tensors[f"encode.mean.{i}"])) < 5e-6
        assert encoding.HasField("log_variance") is with_variance
        if with_variance:
            variance = tensor_of(encoding.log_variance)
            assert relative(variance, golden.tensors[f"encode.logvar.{i}"]) < 5e-6


async def test_decode_returns_logits_and_logprobs_that_belong_together(tiny):
    lengths = tiny.tensors["decode.lengths"].tolist()
    latents, logits = tiny.tensors["decode.latents"][: lengths[0]], tiny.tensors["decode.logits"]
    async with serving(tiny) as served:
        B, P = served.shape.block_size, served.shape.patch_size
        targets = list(range(100, 100 + B * P + 2))
        call = served.decoder.Decode()
        opening = {"with_logits": True, "top_logprobs": 5, "target_ids": targets, "sampling": {"repetition_penalty": 1}}
        await call.write(decoder_pb2.DecodeRequest(open=opening))
        for start in range(0, lengths[0], B):
            block = arrays.latents_to_message(latents[start : start + B].numpy(), "")
            await call.write(decoder_pb2.DecodeRequest(block=block))
            answer = await call.read()
            got = tensor_of(answer.logits)
            assert relative(got, logits[start * P : (start + B) * P]) < 5e-6
            expected = got.log_softmax(-1)
            assert list(answer.token_ids) == got.argmax(-1).tolist()
            torch.testing.assert_close(torch.tensor(answer.logprobs), expected.max(-1).values)
            for position, top in enumerate(answer.top_logprobs):
                torch.testing.assert_close(torch.tensor(top.logprobs), expected[position].topk(5).values)
                assert list(top.token_ids) == expected[position].topk(5).indices.tolist()
            here = targets[start * P : (start + B) * P]
            torch.testing.assert_close(
                torch.tensor(answer.target_logprobs), expected[range(len(here)), here], check_dtype=False
            )
        await call.done_writing()
