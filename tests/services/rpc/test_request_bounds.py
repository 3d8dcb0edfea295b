"""What a request may cost before it is accepted is bounded by its bytes on the wire."""

import asyncio
import logging
import zlib

import grpc
import pytest
from google.protobuf.message import Message
from grpc import StatusCode

from colaserve.v1 import encoder_pb2, generation_pb2, types_pb2
from colaserve_services.errors import DeadlineExceeded, InvalidRequest, NotAuthenticated
from colaserve_services.rpc.auth import Keys
from colaserve_services.rpc.request_bounds import KIB, MIB, MOST_BYTES, RequestBounds
from colaserve_services.rpc.settings import ServerSettings
from tests.services.rpc.conftest import ONE, running
from tests.services.servers import failure, refusal
from tests.waiting import PATIENCE, eventually

ENCODE = "/colaserve.v1.EncoderService/Encode"
CONTEXT = 8192 * 16 * 4  # bytes of latents
BOUNDS = {
    "Encode": 8 * MIB,
    "Sample": CONTEXT + MIB,
    "Decode": CONTEXT + MIB,
    "SampleLatents": CONTEXT + MIB,
    "DecodeLatents": CONTEXT + MIB,
    "Interpolate": 2 * CONTEXT + MIB,  # two ends
    "Fork": 16 * CONTEXT + MIB,  # of the branches, too
    "Embed": 4 * MIB,
    "Generate": 4 * MIB,
    "Tokenize": 4 * MIB,
    "Detokenize": 4 * MIB,
    "EncodeText": 4 * MIB,
    "Infill": 4 * MIB,
    "Reconstruct": 4 * MIB,
    "ModelInfer": 4 * MIB,
    "ModelStreamInfer": 4 * MIB,
    "ModelMetadata": KIB,
    "ServerReady": KIB,
    "GetInfo": KIB,
}


def fault(method: str, message: bytes, kind: type[Message] = encoder_pb2.EncodeRequest) -> str:
    """What is said against a message; empty where it passes."""
    try:
        RequestBounds(CONTEXT).check(method, message, kind.DESCRIPTOR)
    except InvalidRequest as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("method", "most"), BOUNDS.items())
def test_each_method_has_its_bound(method: str, most: int):
    assert not fault(method, b"\x0a\xff\xff\xff\x7f" + bytes(most - 5), types_pb2.Tensor)  # one field
    too_long = fault(method, bytes(most + 1))
    assert too_long.startswith(f"request: got {most + 1} bytes, expected at most {most} for {method}")


def test_no_bound_exceeds_what_the_server_takes():
    assert {RequestBounds(2**40).most_bytes(method) for method in ("Sample", "ModelInfer")} == {MOST_BYTES}


def test_what_is_not_too_long_yet_has_too_many_parts_is_refused_before_it_is_read():
    most_fields = {"Encode": 1000, "EncodeText": 1000, "Reconstruct": 1000, "Infill": 16_384, "ModelInfer": 1000}
    for method, most in most_fields.items():
        assert not fault(method, b"\x0a\x00" * most)
        assert f"more than {most} fields" in fault(method, b"\x0a\x00" * (most + 1))


def test_parts_of_parts_count_too():
    def generation(probes: int) -> bytes:
        sampler = types_pb2.Sampler(steering=[types_pb2.Steering()] * probes)
        return generation_pb2.GenerateRequest(prompt="x", sampler=sampler).SerializeToString()

    assert not fault("Generate", generation(16_382), generation_pb2.GenerateRequest)
    assert "more than 16384 fields" in fault("Generate", generation(16_383), generation_pb2.GenerateRequest)
    assert "more than 16384 fields" in fault("Generate", generation(1_000_000), generation_pb2.GenerateRequest)


@pytest.mark.parametrize(
    "message",
    [
        encoder_pb2.EncodeRequest(sequences=[{"ids": range(1000)}] * 256, with_variance=True),
        generation_pb2.GenerateRequest(prompt="x" * 10_000, stop=["a"] * 16, seed={"base_seed": 2**62}),
        generation_pb2.DetokenizeRequest(token_ids=range(100_000)),
        types_pb2.Tensor(shape=[3] * 50, data=b"\x0a\x00" * 10_000, dtype=1),
    ],
    ids=lambda message: type(message).__name__,
)
def test_what_a_client_sends_passes(message):
    method = type(message).__name__.removesuffix("Request")
    assert not fault(method, message.SerializeToString(), type(message))


@pytest.mark.parametrize(
    "junk", [b"", b"\xff" * 100, b"\x0a", b"\x0a\xff\xff\xff\xff\x0f", b"\x0b\x0b\x0c", b"\x0d\x01"]
)
def test_bytes_that_are_no_message_are_left_to_protobuf(junk: bytes):
    assert not fault("Generate", junk)


async def test_callers_of_older_builds_get_the_checksum_that_they_ask_for_and_theirs_is_skipped():
    asked, sealed = [("x-colaserve-checksum", "crc32")], ONE.SerializeToString() + b"\x9d\xa4\xe8\x03abcd"
    async with running() as it:
        call = it.channel.unary_unary(ENCODE)
        plain = await call(sealed)
        assert plain == encoder_pb2.EncodeResponse(encodings=[{}]).SerializeToString()
        answer = await call(sealed, metadata=asked)
    assert answer == plain + b"\x9d\xa4\xe8\x03" + zlib.crc32(plain).to_bytes(4, "little")


async def test_too_long_a_request_is_refused_unread_and_the_server_lives_on():
    async with running() as it:
        it.server.bound_latents(CONTEXT)
        raw = it.channel.unary_unary(ENCODE)
        for message in (b"\xff" * (8 * MIB + 1), b"\x0a\x00" * 1_000_000):
            error = await refusal(raw(message))
            assert isinstance(error, InvalidRequest)
            assert error.field == "request"
            assert "that are no request" not in str(error)
        assert await it.stub.Encode(ONE)
        assert it.servicer.started == 1


async def test_messages_and_metadata_beyond_the_servers_limits_are_refused_and_it_lives_on():
    async with running() as it:
        long = (
            it.channel.unary_unary(ENCODE)(bytes(MOST_BYTES + 1)),
            it.stub.Encode(ONE, metadata=(("a", "x" * 20_000),)),
        )
        for call in long:
            assert (await failure(call)).code() is StatusCode.RESOURCE_EXHAUSTED
            assert await it.stub.Encode(ONE)


@pytest.mark.parametrize(
    ("compression", "name"), [(grpc.Compression.Gzip, "gzip"), (grpc.Compression.Deflate, "deflate")]
)
async def test_compressed_messages_are_refused_by_name(compression, name: str):
    async with running() as it:
        zeros = encoder_pb2.EncodeRequest(sequences=[{"ids": [0] * 100_000}])
        refused = await failure(it.stub.Encode(zeros, compression=compression))
        assert refused.code() is StatusCode.UNIMPLEMENTED
        assert name.lower() in refused.details()
        assert it.servicer.started == 0


def opened(channel: grpc.aio.Channel):
    """A call that sends no message."""
    return channel.stream_unary(ENCODE)()


async def test_the_key_is_looked_at_before_any_message():
    async with running(keys=Keys(["secret"])) as it:
        assert isinstance(await refusal(opened(it.channel)), NotAuthenticated)
        too_long = it.channel.unary_unary(ENCODE)(bytes(8 * MIB + 1))
        assert isinstance(await refusal(too_long), NotAuthenticated)


async def test_a_first_message_that_does_not_come_is_not_waited_for():
    async with running(ServerSettings(first_message_seconds=0.1)) as it:
        error = await refusal(opened(it.channel))
        assert isinstance(error, DeadlineExceeded)
        assert "no message of Encode came within 0.1 s" in str(error)
        assert await it.stub.Encode(ONE)


async def test_a_connection_that_says_nothing_is_not_waited_for():
    async with running(ServerSettings(first_message_seconds=0.2)) as it:
        reader, writer = await asyncio.open_connection("127.0.0.1", it.port)
        await asyncio.wait_for(reader.read(), PATIENCE)
        assert reader.at_eof()
        writer.close()


async def test_calls_that_send_nothing_take_no_slots_and_are_counted_but_not_logged_once_given_up(caplog):
    caplog.set_level(logging.INFO, "colaserve_services.access")
    async with running(ServerSettings(max_calls=1)) as it:
        silent = [opened(it.channel) for _ in range(20)]
        labels = {"service": "EncoderService", "method": "Encode"}
        value = it.metrics.registry.get_sample_value
        await eventually(lambda: value("colaserve_requests_in_progress", labels) == len(silent))
        assert await it.stub.Encode(ONE)
        for call in silent:
            call.cancel()
        await asyncio.gather(*silent, return_exceptions=True)
        await eventually(lambda: value("colaserve_requests_in_progress", labels) == 0)
        given_up = value("colaserve_request_seconds_count", labels | {"code": "CANCELLED"})
        lines = [record for record in caplog.records if record.name == "colaserve_services.access"]
        assert given_up  # the others' end came before their cancellation
        assert len(lines) == 1 + len(silent) - given_up


async def test_a_call_that_ends_without_its_message_is_refused():
    async with running() as it:
        call = opened(it.channel)
        await call.done_writing()
        error = await refusal(call)
        assert isinstance(error, InvalidRequest)
        assert "got no message" in str(error)
