"""A stage that is called directly takes what a request leaves unset from the checkpoint's generation_config.json."""

import json
import shutil
from dataclasses import replace

import pytest

from colaserve.v1 import decoder_pb2, types_pb2
from tests.services.stages.serving import serving

SAMPLER = {"steps": 3, "guidance_scale": 2.5, "guidance_start": 0.9, "guidance_end": 0.2, "resamples": 2}
SAMPLING = {"temperature": 30.0, "top_k": 400, "top_p": 0.99, "repetition_penalty": 1.5}


@pytest.fixture
def with_defaults(tiny, tmp_path):
    """The golden checkpoint with a generation_config.json of the given values."""

    def make(**values):
        directory = tmp_path / "model"
        shutil.copytree(tiny.directory, directory, dirs_exist_ok=True)
        (directory / "generation_config.json").write_text(json.dumps(values))
        return replace(tiny, directory=directory)

    return make


async def sampled(served, **sampler):
    request = served.run(known=2, blocks=1)
    request.sampler.CopyFrom(types_pb2.Sampler(**sampler))
    return [block.latents.values.data async for block in served.prior.Sample(request)]


async def decoded(served, **sampling):
    call = served.decoder.Decode()
    await call.write(decoder_pb2.DecodeRequest(open={"sampling": sampling}))
    ids = []
    for seed in range(3):
        await call.write(decoder_pb2.DecodeRequest(block=served.latents(served.shape.block_size, seed)))
        ids += (await call.read()).token_ids
    await call.done_writing()
    return ids


async def test_unset_fields_take_the_checkpoints_defaults_and_set_ones_do_not(with_defaults):
    async with serving(with_defaults(**SAMPLER, **SAMPLING, solver="heun")) as served:
        own = await sampled(served), await decoded(served)
        said = await sampled(served, **SAMPLER, solver="SOLVER_HEUN"), await decoded(served, **SAMPLING)
        brackets = (
            await sampled(served, steps=16, guidance_scale=7, solver="SOLVER_EULER"),
            await decoded(served, temperature=0),
        )
        assert own == said
        assert own[0] != brackets[0]
        assert own[1] != brackets[1]


async def test_without_any_the_brackets_of_the_contract_hold(with_defaults):
    async with serving(with_defaults()) as served:
        explicit = {"steps": 16, "guidance_scale": 7, "guidance_start": 1, "guidance_end": 0, "resamples": 1}
        assert await sampled(served) == await sampled(served, **explicit, solver="SOLVER_EULER")
