"""Log-probabilities of all ids at every position, through real stages: those of the decoder's raw logits."""

from typing import Any

import numpy as np
import pytest

from colaserve.v1 import decoder_pb2, types_pb2
from colaserve.v1 import latent_service_pb2 as pb
from colaserve_services.rpc import arrays
from tests.conftest import load_golden
from tests.services.systems import System, system

TEXT = "He looked at the river and then"


@pytest.fixture(params=["tiny_b4_vae1", "tiny_b16_scaled"])
async def served(request: pytest.FixtureRequest) -> Any:
    async with system(load_golden(request.param), split=True) as found:
        yield found


async def encoded(served: System) -> types_pb2.Latents:
    response = await served.latents.EncodeText(pb.EncodeTextRequest(texts=[TEXT]))
    return response.encodings[0].latents


async def raw_logits(served: System, latents: types_pb2.Latents) -> np.ndarray:
    """Of the latents, block by block, from the decoder itself."""
    values = arrays.from_message(latents.values, "latents", (None, None))
    size = served.stages.shape.block_size
    values = np.concatenate((values, np.zeros((-len(values) % size, values.shape[1]), np.float32)))
    call = served.stages.decoder.Decode()
    await call.write(decoder_pb2.DecodeRequest(open=decoder_pb2.OpenDecode(with_logits=True)))
    found = []
    for block in values.reshape(-1, size, values.shape[1]):
        await call.write(decoder_pb2.DecodeRequest(block=arrays.latents_to_message(block, "")))
        found.append(arrays.from_message((await call.read()).logits, "logits", (None, None)))
    call.cancel()
    return np.concatenate(found)[: latents.values.shape[0]]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))


async def test_every_id_has_the_log_softmax_of_the_raw_logits_at_every_position(served: System) -> None:
    latents = await encoded(served)
    expected = log_softmax(await raw_logits(served, latents))
    whole = await served.latents.Logprobs(pb.LogprobsRequest(latents=latents, all_logprobs=True))
    found = np.frombuffer(whole.position_logprobs.data, "<f4").reshape(whole.position_logprobs.shape)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert list(whole.token_ids) == expected.argmax(-1).tolist()
    np.testing.assert_allclose(whole.logprobs, expected.max(-1), atol=1e-5)
    chosen = pb.LogprobsRequest(text=TEXT, logprob_ids=[9, 3, 9], logprobs_dtype=types_pb2.DATA_TYPE_FLOAT16)
    some = await served.latents.Logprobs(chosen)
    assert list(some.position_logprobs.shape) == [len(expected), 3]
    assert some.position_logprobs.dtype == types_pb2.DATA_TYPE_FLOAT16
    found = np.frombuffer(some.position_logprobs.data, "<f2").reshape(-1, 3)
    np.testing.assert_allclose(found, expected[:, [9, 3, 9]], rtol=1e-3)
    targets = expected[range(len(expected)), list(some.token_ids)]
    np.testing.assert_allclose(some.logprobs, targets, atol=1e-5)
