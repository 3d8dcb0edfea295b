"""Forks and embeddings through real stages."""

from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest

from colaserve.v1 import latent_service_pb2 as pb
from colaserve.v1 import types_pb2
from colaserve_client.arrays import array_from_tensor, tensor_from_array
from colaserve_client.settings import NoiseSeed
from tests.conftest import load_golden
from tests.services.systems import System, ids_of, system

TEXT = "He looked at the river and then he said"
SHARED: dict[str, Any] = {
    "sampler": {"steps": 4, "guidance_scale": 2}, "sampling": {"temperature": 0}, "seed": {"base_seed": 5},
    "max_new_tokens": 21, "ignore_end": True,
}  # fmt: skip


@pytest.fixture
async def served() -> AsyncIterator[System]:
    async with system(load_golden("tiny_b4"), split=True) as found:
        yield found


async def forked(stub: Any, **fields: Any) -> list[list[pb.ForkResponse]]:
    request = pb.ForkRequest(**{"text": TEXT} | SHARED | fields)
    found: list[list[pb.ForkResponse]] = [[] for _ in request.branches]
    async for response in stub.Fork(request):
        found[response.branch].append(response)
    return found


def joined(responses: list[pb.ForkResponse]) -> types_pb2.Latents:
    rows = np.concatenate([array_from_tensor(each.latents.values) for each in responses])
    return types_pb2.Latents(values=tensor_from_array(rows), space=responses[0].latents.space)


def assert_same(found: list[list[pb.ForkResponse]], expected: list[list[pb.ForkResponse]]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert ids_of(ours) == ids_of(theirs)
        np.testing.assert_allclose(*(array_from_tensor(joined(each).values) for each in (ours, theirs)), atol=1e-4)


async def test_a_branch_is_replayed_from_its_noise_and_from_each_of_its_blocks(served: System) -> None:
    sampling = {"temperature": 1.5, "repetition_penalty": 3}
    [whole] = await forked(served.latents, branches=[{"sampling": sampling}])
    noise = NoiseSeed(5).noise(len(whole), served.stages.shape.block_size, served.stages.shape.latent_dim)
    assert_same(
        await forked(served.latents, branches=[{"sampling": sampling, "noise": tensor_from_array(noise)}]), [whole]
    )
    for blocks in range(1, len(whole) + 1):
        branches = [{"sampling": sampling, "written": joined(whole[:blocks])}]
        [again] = await forked(served.latents, branches=branches)
        assert_same([again], [whole])
        assert (again[-1].usage.completion_tokens, again[-1].usage.blocks) == (21, len(whole) - blocks)


async def test_embeddings_are_means_of_the_latents(served: System) -> None:
    texts = [TEXT, "a", "He looked"]
    encoded = (await served.latents.EncodeText(pb.EncodeTextRequest(texts=texts))).encodings
    latents = [array_from_tensor(each.latents.values) for each in encoded]
    size = served.stages.shape.block_size

    async def embedded(**fields: Any) -> list[np.ndarray]:
        found = (await served.latents.Embed(pb.EmbedRequest(**{"texts": texts} | fields))).embeddings
        assert [each.token_count for each in found] == [len(each.token_ids) for each in encoded]
        return [array_from_tensor(each.values) for each in found]

    blocks = [[rows[start : start + size] for start in range(0, len(rows), size)] for rows in latents]
    for got, rows, own in zip(await embedded(), latents, await embedded(pooling=pb.POOLING_PER_BLOCK), strict=True):
        np.testing.assert_allclose(got, rows.mean(axis=0), rtol=1e-5, atol=1e-6)
        assert own.shape == (-(-len(rows) // size), rows.shape[1])
    for got, parts in zip(await embedded(pooling=pb.POOLING_LAST_BLOCK), blocks, strict=True):
        np.testing.assert_allclose(got, parts[-1].mean(axis=0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose([np.linalg.norm(each) for each in await embedded(normalize=True)], 1, rtol=1e-5)
    ids = [{"ids": each.token_ids} for each in encoded]
    for one, other in zip(await embedded(texts=[], sequences=ids), await embedded(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
