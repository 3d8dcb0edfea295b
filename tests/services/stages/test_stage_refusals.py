"""What a caller can get wrong is INVALID_ARGUMENT (or FAILED_PRECONDITION), names the field, and costs nothing."""

import torch

from colaserve.v1 import decoder_pb2, encoder_pb2, prior_pb2, types_pb2
from colaserve_services.engine.limits import EngineLimits
from colaserve_services.errors import InvalidRequest, ModelMismatch
from colaserve_services.rpc import arrays
from tests.services.servers import refusal
from tests.services.stages.serving import serving
from tests.waiting import eventually

NAN, HUGE = float("nan"), 2**32 - 1


def tensor(*shape, value=0.0, **changes):
    message = arrays.to_message(torch.full(shape, value).numpy())
    for name, changed in changes.items():
        setattr(message, name, changed)
    return message


def canvas(values, *spans):
    return types_pb2.Canvas(latents={"values": values}, open=[types_pb2.Span(start=a, end=b) for a, b in spans])


D, B, V = 16, 4, 512
EIGHT = tensor(8, D)
W, BIAS = tensor(D), tensor(2)


def steered(direction=W, **changes):
    return {"sampler": {"steering": [{"direction": direction, "scale": 1, **changes}]}}


SAMPLE = {  # field -> what to set in an otherwise valid SampleRequest of two blocks
    "canvas.latents.values.dtype": {"canvas": canvas(tensor(4, D, dtype=9))},
    "canvas.latents.values.shape": {"canvas": canvas(tensor(4, D + 1))},
    "canvas.latents.values.data": {"canvas": canvas(tensor(4, D, data=b"123"))},
    "canvas.latents.values.data ": {"canvas": canvas(tensor(4, D, value=NAN))},
    "canvas.latents.values.data  ": {"canvas": canvas(tensor(4, D, value=float("inf")), (0, 4))},
    "canvas.latents.values.data   ": {"canvas": canvas(tensor(4, D, value=1e20))},
    "canvas.open": {"canvas": canvas(EIGHT, (4, 4))},
    "canvas.open ": {"canvas": canvas(EIGHT, (5, 3))},
    "canvas.open  ": {"canvas": canvas(EIGHT, (4, 9))},
    "canvas.open   ": {"canvas": canvas(EIGHT, (4, 6), (5, 8))},
    "canvas.open    ": {"canvas": canvas(EIGHT, (4, HUGE))},
    "canvas.open     ": {"canvas": canvas(EIGHT, *[(0, 4)] * 257)},
    "canvas.open      ": {"canvas": canvas(EIGHT, (5, 3)), "first_block": 2},
    "max_blocks": {"max_blocks": 0},
    "max_blocks ": {"max_blocks": HUGE},
    "max_blocks  ": {"max_blocks": 65},
    "max_blocks   ": {"canvas": canvas(tensor(16, D), (0, 1))},
    "first_block": {"first_block": 1},
    "first_block ": {"first_block": HUGE},
    "sampler.steps": {"sampler": {"steps": 0}},
    "sampler.guidance_scale": {"sampler": {"guidance_scale": NAN}},
    "sampler.solver": {"sampler": {"solver": 77}},
    "sampler.guidance_end": {"sampler": {"guidance_start": 0.25, "guidance_end": 0.5}},
    "sampler.resamples ": {"noise": tensor(2, B, D), "sampler": {"resamples": 2}},
    "sampler.stable_distance": {"sampler": {"stable_steps": 1}},
    "sampler.stable_distance ": {"sampler": {"stable_distance": 1}},
    "sampler.steering": {"sampler": {"steering": [{"direction": W}] * 17}},
    "sampler.steering[0].direction.dtype": steered(None),
    "sampler.steering[0].direction.shape": steered(tensor(D + 1)),
    "sampler.steering[0].direction.shape ": steered(tensor(D, 65)),
    "sampler.steering[0].direction.shape  ": steered(tensor(D, 0)),
    "sampler.steering[0].direction.shape   ": steered(tensor(2, D)),
    "sampler.steering[0].direction.data": steered(tensor(D, value=NAN)),
    "sampler.steering[0].bias": steered(bias=tensor(1)),
    "sampler.steering[0].bias.shape": steered(bias=BIAS, logistic=True),
    "sampler.steering[0].scale": steered(scale=NAN),
    "sampler.steering[0].start": steered(start=1.5),
    "sampler.steering[0].end": steered(start=0.5, end=0.5),
    "seed.sample_id": {"seed": {"sample_id": 10_000}},
    "seed.base_seed": {"seed": {"base_seed": 2**63}},
    "seed.base_seed ": {"seed": {"base_seed": 2**63 - 1}},
    "noise.shape": {"noise": tensor(3, B, D)},
    "noise.data": {"noise": tensor(2, B, D, value=NAN)},
    "noise.data ": {"noise": tensor(2, B, D, value=-10_001.0)},
    "noise_source": {"seed": None},
}


def sample_request(changes):
    fields = {"canvas": canvas(tensor(3, D)), "max_blocks": 2, "sampler": {"steps": 1}, "seed": {"base_seed": 1}}
    fields |= changes
    if "noise" in changes:
        del fields["seed"]
    return prior_pb2.SampleRequest(**{name: value for name, value in fields.items() if value is not None})


async def test_sample_names_each_field_that_is_wrong(tiny):
    async with serving(tiny) as served:
        assert (served.shape.latent_dim, served.shape.block_size, served.shape.vocab_size) == (D, B, V)
        for field, changes in SAMPLE.items():
            error = await refusal(served.prior.Sample(sample_request(changes)).read())
            assert (type(error), getattr(error, "field", "")) == (InvalidRequest, field.strip()), str(error)
        error = await refusal(served.prior.Sample(sample_request({"max_blocks": 65})).read())
        assert "65" in str(error)
        assert "256" in str(error) or "64" in str(error)
        await eventually(lambda: served.kv_bytes("prior") == 0)
        blocks = [block.block_index async for block in served.prior.Sample(sample_request({}))]
        assert blocks == [0, 1]


ALL_OPEN = canvas(EIGHT, (0, 8))
SCORE = {
    "canvas.latents": {"canvas": canvas(tensor(6, D), (0, 4))},
    "canvas.latents ": {"canvas": canvas(tensor(260, D), (0, 4))},
    "canvas.latents.values.data": {"canvas": canvas(tensor(4, D, value=NAN), (0, 4))},
    "canvas.open": {"canvas": canvas(EIGHT)},
    "canvas.open ": {"canvas": canvas(EIGHT, (4, 9))},
    "canvas.open  ": {"canvas": canvas(EIGHT, (HUGE, 9))},
    "canvas.open   ": {"canvas": canvas(EIGHT, *[(0, 4)] * 257)},
    "canvas.open    ": {"canvas": canvas(tensor(0, D), (0, 4))},
    "probes": {"canvas": ALL_OPEN, "probes": 0},
    "probes ": {"canvas": ALL_OPEN, "probes": 257},
    "steps": {"canvas": ALL_OPEN, "steps": 1001},
    "solver": {"canvas": ALL_OPEN, "solver": 9},
    "seed.sample_id": {"canvas": ALL_OPEN, "seed": {"sample_id": 10_000}},
    "seed.base_seed": {"canvas": ALL_OPEN, "seed": {"base_seed": 2**63 - 1}},
}


async def test_score_names_each_field_that_is_wrong_and_needs_float32(tiny):
    async with serving(tiny) as served:
        for field, changes in SCORE.items():
            error = await refusal(served.prior.Score(prior_pb2.PriorServiceScoreRequest(**changes)))
            assert (type(error), getattr(error, "field", "")) == (InvalidRequest, field.strip()), str(error)
        request = prior_pb2.PriorServiceScoreRequest(canvas=canvas(tensor(12, D), (5, 7)), steps=2, probes=3)
        found = await served.prior.Score(request)
        assert (len(found.log_densities), found.evaluations) == (2, 4 * 7)
        assert found.standard_errors[0] > 0
        assert (found.log_densities[1], found.standard_errors[1]) == (0, 0)  # no position of the last block is open
        await eventually(lambda: served.kv_bytes("prior") == 0)
    async with serving(tiny, dtype="bfloat16") as served:
        error = await refusal(served.prior.Score(request))
        assert isinstance(error, ModelMismatch), error
        assert "float32" in str(error)


async def test_latents_of_another_space_are_a_failed_precondition_everywhere(tiny):
    async with serving(tiny) as served:
        foreign = types_pb2.Latents(values=tensor(B, D), space="0123456789abcdef")
        request = sample_request({"canvas": types_pb2.Canvas(latents=foreign)})
        assert isinstance(await refusal(served.prior.Sample(request).read()), ModelMismatch)
        for messages in ([{"open": {"prefix": foreign}}], [{"open": {}}, {"block": foreign}]):
            assert isinstance(await refusal(decode(served, messages)), ModelMismatch)


async def decode(served, messages):
    """The last response of a Decode stream of these messages."""

    async def requests():
        for message in messages:
            yield decoder_pb2.DecodeRequest(**message)

    return [response async for response in served.decoder.Decode(requests())]


BLOCK = {"block": {"values": tensor(B, D)}}
PREVIEW = {"preview": BLOCK["block"]}
DECODE = {
    "request": [],
    "request ": [{}],
    "request  ": [BLOCK],
    "request   ": [{"open": {}}, {"open": {}}],
    "request    ": [{"open": {}}, {}],
    "open.prefix": [{"open": {"prefix": {"values": tensor(3, D)}}}],
    "open.prefix.values.shape": [{"open": {"prefix": {"values": tensor(4, D + 1)}}}],
    "open.prefix.values.data": [{"open": {"prefix": {"values": tensor(4, D, value=NAN)}}}],
    "open.prefix.values.data ": [{"open": {"prefix": {"values": tensor(4, D, value=1e20)}}}],
    "open.max_latents": [{"open": {"prefix": {"values": EIGHT}, "max_latents": 4}}],
    "open.max_latents ": [{"open": {"max_latents": 3}}],
    "open.max_latents  ": [{"open": {"max_latents": HUGE // 4 * 4}}],
    "open.history_ids": [{"open": {"history_ids": [1, 2, 3]}}],
    "open.history_ids ": [{"open": {"history_ids": [1, 2, 3, V]}}],
    "open.history_ids  ": [{"open": {"history_ids": [1] * 260}}],
    "open.top_logprobs": [{"open": {"top_logprobs": 21}}],
    "open.target_ids": [{"open": {"target_ids": [HUGE]}}],
    "open.logprob_ids": [{"open": {"logprob_ids": [HUGE]}}],
    "open.logprob_ids ": [{"open": {"logprob_ids": [1] * (V + 1)}}],
    "open.all_logprobs": [{"open": {"logprob_ids": [1], "all_logprobs": True}}],
    "open.logprobs_dtype": [{"open": {"logprobs_dtype": 2}}],
    "open.target_ids ": [{"open": {"max_latents": 4, "target_ids": [1] * 5}}],
    "sampling.temperature": [{"open": {"sampling": {"temperature": NAN}}}],
    "block.values.shape": [{"open": {}}, {"block": {"values": tensor(3, D)}}],
    "block.values.dtype": [{"open": {}}, {"block": {}}],
    "block.values.data ": [{"open": {}}, {"block": {"values": tensor(B, D, value=10_001.0)}}],
    "block.values.data": [{"open": {}}, {"block": {"values": tensor(B, D, value=NAN)}}],
    "block": [{"open": {"max_latents": 4}}, BLOCK, BLOCK],
    "request     ": [PREVIEW],
    "preview.values.shape": [{"open": {}}, {"preview": {"values": tensor(17 * B, D)}}],
    "preview.values.data": [{"open": {}}, {"preview": {"values": tensor(B, D, value=NAN)}}],
    "preview": [{"open": {"max_latents": 4}}, PREVIEW, BLOCK, PREVIEW],
}


async def test_decode_names_each_field_that_is_wrong(tiny):
    async with serving(tiny) as served:
        for field, messages in DECODE.items():
            error = await refusal(decode(served, messages))
            assert (type(error), getattr(error, "field", "")) == (InvalidRequest, field.strip()), str(error)
        assert len(await decode(served, [{"open": {"max_latents": 8}}, BLOCK, BLOCK])) == 2
        await eventually(lambda: served.kv_bytes("decoder") == 0)


ENCODE = {
    "sequences": {},
    "sequences ": {"sequences": [{"ids": [1]}] * 257},
    "sequences[1]": {"sequences": [{"ids": [1]}, {"ids": []}]},
    "sequences[0]": {"sequences": [{"ids": [1] * 257}]},
    "sequences[0].ids": {"sequences": [{"ids": [1, V]}]},
    "sequences[1].ids": {"sequences": [{"ids": [1]}, {"ids": [HUGE]}]},
}


async def test_encode_names_each_field_that_is_wrong(tiny):
    async with serving(tiny, EngineLimits(max_context=256)) as served:
        for field, changes in ENCODE.items():
            error = await refusal(served.encoder.Encode(encoder_pb2.EncodeRequest(**changes)))
            assert (type(error), getattr(error, "field", "")) == (InvalidRequest, field.strip()), str(error)
        assert await served.encoder.Encode(encoder_pb2.EncodeRequest(sequences=[{"ids": [1]}] * 256))
