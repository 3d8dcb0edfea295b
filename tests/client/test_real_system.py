"""The client, and the command line, against real services in a process of their own."""

from collections.abc import Iterator

import pytest

from colaserve_client import (
    AsyncClient,
    Client,
    DecoderClient,
    EncoderClient,
    Latents,
    NoiseSeed,
    PriorClient,
    Sampler,
    Sampling,
)
from tests.conftest import load_golden
from tests.services.launch.processes import started
from tests.waiting import wait_until as eventually

GOLDEN = load_golden("tiny_b4").meta["cases"][0]
AS_RECORDED = Sampler(steps=16, guidance_scale=7)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    ports = ("--grpc-port=0", "--http-port=0", "--metrics-port=0")
    with started(tmp_path_factory.mktemp("up"), "up", *ports) as running:
        yield running.target


@pytest.fixture
def client(target: str) -> Iterator[Client]:
    with Client(target, timeout=60) as connected:
        yield connected


def expected(sample: int) -> tuple[int, ...]:
    return tuple(GOLDEN["tokens"][sample])


async def test_the_recorded_tokens_are_generated(client: Client, target: str) -> None:
    settings = {"max_new_tokens": 16, "sampler": AS_RECORDED, "ignore_end": True}
    for sample, prompt in enumerate(GOLDEN["prompts"]):
        seed = NoiseSeed(GOLDEN["noise_base_seed"], sample)
        written = client.generate(prompt, seed=seed, **settings)
        assert written.token_ids[: len(expected(sample))] == expected(sample)
        assert written.usage.prompt_tokens == GOLDEN["prompt_lengths"][sample]
        streamed = list(client.stream(prompt, seed=seed, **settings))
        assert "".join(chunk.text for chunk in streamed) == written.text
        async with AsyncClient(target) as other:
            assert (await other.generate(prompt, seed=seed, **settings)).token_ids == written.token_ids


def test_a_loop_over_the_stages_writes_what_the_coordinator_writes(client: Client, target: str) -> None:
    settings = {"max_new_tokens": 9, "seed": 5, "sampler": AS_RECORDED, "ignore_end": True, "with_latents": True}
    whole = client.generate(GOLDEN["prompts"][4], **settings)
    ids = client.tokenize(GOLDEN["prompts"][4]).ids
    block = client.info().model.block_size
    before = len(ids) // block * block
    with EncoderClient(target) as encoder, PriorClient(target) as prior, DecoderClient(target) as decoder:
        [prompt] = encoder.encode([ids])
        session = decoder.session(prompt.latents[:before], sampling=Sampling())
        run = prior.sample(prompt.latents, max_blocks=whole.usage.blocks, seed=5, sampler=AS_RECORDED)
        with session, run:
            written = [(each.latents, session.decode(each.latents).token_ids) for each in run]
    token_ids = [token for _, block_ids in written for token in block_ids][len(ids) - before :]
    assert tuple(token_ids[:9]) == whole.token_ids
    assert whole.latents is not None
    assert whole.latents == Latents.concat(latents for latents, _ in written)[: len(whole.latents)]


def test_a_seed_and_its_noise_are_the_same_run(target: str) -> None:
    with PriorClient(target) as prior:
        model, seed = prior.info().model, NoiseSeed(5, 3)
        noise = seed.noise(2, model.block_size, model.latent_dim)
        seeded, given = (
            list(prior.sample(max_blocks=2, steps=2, **source)) for source in ({"seed": seed}, {"noise": noise})
        )
        assert [block.latents for block in seeded] == [block.latents for block in given]


def test_texts_go_through_the_latent_space(client: Client) -> None:
    text = "A guardian angel walked in"
    [encoding] = client.encode_text([text], with_variance=True)
    assert encoding.log_variance is not None
    assert client.detokenize(encoding.token_ids) == text
    [trip] = client.reconstruct([text])
    decoded = client.decode_latents(encoding.latents, token_count=len(encoding.token_ids), top_logprobs=2)
    assert decoded.token_ids == trip.token_ids
    assert len(decoded.logprobs) == len(trip.token_ids)
    first, middle, last = client.interpolate(text, encoding.latents, points=3, interpolation="lerp")
    assert first.token_ids == middle.token_ids == last.token_ids
    filled = client.infill(["A guardian ", 5, " walked in"], seed=3, sampler=Sampler(steps=4, resamples=2))
    assert (filled.segments[0], filled.segments[2]) == ("A guardian ", " walked in")
    assert [block.index for block in client.sample_latents(encoding.latents, max_blocks=3, seed=1)] == [0, 1, 2]


def test_leaving_early_frees_the_cache(client: Client, target: str) -> None:
    with PriorClient(target) as prior, DecoderClient(target) as decoder:
        with client.stream("a", max_new_tokens=2000, ignore_end=True) as stream:
            next(stream)
            assert prior.info().server.kv_bytes_used > 0
            assert decoder.info().server.kv_bytes_used > 0
        eventually(lambda: prior.info().server.kv_bytes_used == decoder.info().server.kv_bytes_used == 0)
