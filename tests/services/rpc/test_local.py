"""Local stubs behave as grpc.aio stubs of our servers do: the same test bodies run against both."""

import asyncio
from contextlib import asynccontextmanager

import grpc
import pytest

from colaserve.v1 import decoder_pb2, decoder_pb2_grpc, encoder_pb2, encoder_pb2_grpc, prior_pb2, prior_pb2_grpc
from colaserve_services.errors import ColaserveError, DeadlineExceeded, InvalidRequest, Overloaded
from colaserve_services.rpc import requests
from colaserve_services.rpc.local import LocalStub
from tests.services.servers import refusal, served
from tests.waiting import eventually


class Encoder(encoder_pb2_grpc.EncoderServiceServicer):
    def __init__(self):
        self.seen = []

    async def Encode(self, request, context):
        self.seen.append((requests.adopt(context.invocation_metadata()), context.time_remaining()))
        if not request.sequences:
            raise InvalidRequest("sequences", "got none, expected 1 to 256")
        if request.with_variance:
            raise Overloaded("full", retry_after=2.5)
        if len(request.sequences) > 1:
            raise RuntimeError("a secret")
        return encoder_pb2.EncodeResponse(encodings=[encoder_pb2.Encoding()])


class Prior(prior_pb2_grpc.PriorServiceServicer):
    def __init__(self):
        self.written, self.ended = 0, []

    async def Sample(self, request, context):
        try:
            for index in range(request.max_blocks):
                yield prior_pb2.SampleResponse(block_index=index)
                self.written += 1
                await asyncio.sleep(0)
            if request.first_block:
                raise InvalidRequest("first_block", "late")
        except BaseException as error:
            self.ended.append(type(error))
            raise
        self.ended.append(None)


class Decoder(decoder_pb2_grpc.DecoderServiceServicer):
    ended = False

    async def Decode(self, requests_, context):
        try:
            async for request in requests_:
                if request.WhichOneof("request") is None:
                    raise InvalidRequest("request", "empty")
                yield decoder_pb2.DecodeResponse(token_ids=list(request.open.history_ids))
        finally:
            self.ended = True


@pytest.fixture(params=["local", "socket"])
def connect(request):
    @asynccontextmanager
    async def local(servicer, stub):
        yield LocalStub(servicer)

    @asynccontextmanager
    async def over_a_socket(servicer, stub):
        async with served(servicer) as it:
            yield stub(it.channel)

    return local if request.param == "local" else over_a_socket


ENCODER = encoder_pb2_grpc.EncoderServiceStub
PRIOR = prior_pb2_grpc.PriorServiceStub
DECODER = decoder_pb2_grpc.DecoderServiceStub


def sequences(count):
    return encoder_pb2.EncodeRequest(sequences=[{"ids": [1]}] * count)


ENDLESS = prior_pb2.SampleRequest(max_blocks=100_000_000)


async def read_all(call):
    while await call.read() is not grpc.aio.EOF:
        pass


async def test_a_unary_call_returns_its_response_and_carries_metadata_and_deadline(connect):
    servicer = Encoder()
    async with connect(servicer, ENCODER) as stub:
        response = await stub.Encode(sequences(1), timeout=5, metadata=(("x-request-id", "abc"),))
    assert len(response.encodings) == 1
    ((request_id, remaining),) = servicer.seen
    assert request_id == "abc"
    assert 0 < remaining < 6


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (sequences(0), InvalidRequest("sequences", "got none, expected 1 to 256")),
        (encoder_pb2.EncodeRequest(sequences=[{"ids": [1]}], with_variance=True), Overloaded("full", retry_after=2.5)),
        (sequences(2), ColaserveError("INTERNAL: internal error; the server's log has it under request id find-me")),
    ],
)
async def test_errors_cross_with_their_details_and_those_that_nobody_knows_without(connect, request_, error, caplog):
    async with connect(Encoder(), ENCODER) as stub:
        crossed = await refusal(stub.Encode(request_, metadata=(("x-request-id", "find-me"),)))
    assert (type(crossed), str(crossed), vars(crossed)) == (type(error), str(error), vars(error))
    assert ("a secret" in caplog.text) is (type(error) is ColaserveError)


async def test_a_stream_gives_all_messages_in_order_and_then_its_error(connect):
    async with connect(Prior(), PRIOR) as stub:
        call = stub.Sample(prior_pb2.SampleRequest(max_blocks=3, first_block=1))
        assert [(await call.read()).block_index for _ in range(3)] == [0, 1, 2]
        assert isinstance(await refusal(call.read()), InvalidRequest)


async def test_cancelling_a_stream_ends_the_servicer(connect):
    servicer = Prior()
    async with connect(servicer, PRIOR) as stub:
        call = stub.Sample(ENDLESS)
        assert (await call.read()).block_index == 0
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await read_all(call)
        await eventually(lambda: servicer.ended)


async def test_cancelling_the_reader_ends_the_servicer(connect):
    servicer = Prior()
    async with connect(servicer, PRIOR) as stub:
        reader = asyncio.create_task(read_all(stub.Sample(ENDLESS)))
        await eventually(lambda: servicer.written > 10)
        reader.cancel()
        await eventually(lambda: servicer.ended)
        assert reader.cancelled()


async def test_a_deadline_ends_a_stream_on_both_sides(connect):
    servicer = Prior()
    async with connect(servicer, PRIOR) as stub:
        assert isinstance(await refusal(read_all(stub.Sample(ENDLESS, timeout=0.2))), DeadlineExceeded)
        await eventually(lambda: servicer.ended)


async def test_an_unread_local_stream_waits_for_its_reader():
    servicer = Prior()
    call = LocalStub(servicer).Sample(prior_pb2.SampleRequest(max_blocks=100))
    await asyncio.sleep(0.05)
    assert servicer.written <= 1
    assert [response.block_index async for response in call] == list(range(100))
    assert servicer.ended == [None]


def opened(*ids):
    return decoder_pb2.DecodeRequest(open={"history_ids": ids})


async def test_both_sides_of_a_bidirectional_stream_alternate(connect):
    servicer = Decoder()
    async with connect(servicer, DECODER) as stub:
        call = stub.Decode()
        for number in range(3):
            await call.write(opened(number))
            assert list((await call.read()).token_ids) == [number]
        call.cancel()
        await eventually(lambda: servicer.ended)


async def test_writing_to_an_ended_stream_is_an_invalid_state(connect):
    async with connect(Decoder(), DECODER) as stub:
        call = stub.Decode()
        await call.write(decoder_pb2.DecodeRequest())
        await refusal(call.read())
        with pytest.raises((asyncio.InvalidStateError, grpc.aio.AioRpcError)):
            await call.write(opened(1))
