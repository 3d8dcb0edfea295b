"""A message that was changed on its way is never read as another one."""

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from colaserve.v1 import encoder_pb2, encoder_pb2_grpc, types_pb2
from colaserve_services.errors import Corrupted
from colaserve_services.rpc import checksums
from colaserve_services.rpc.channels import Stub, open_channel
from colaserve_services.rpc.settings import ChannelSettings
from tests.services.rpc.conftest import ONE, running

SERVICE = "colaserve.v1.EncoderService"
LATENTS = types_pb2.Latents(
    values=types_pb2.Tensor(dtype=types_pb2.DATA_TYPE_FLOAT32, shape=[4, 2], data=bytes(range(32))), space="0" * 16
)
SEALED = checksums.seal(LATENTS.SerializeToString())


@given(st.binary(max_size=200))
def test_a_sealed_message_opens_to_itself(message):
    assert checksums.opened(checksums.seal(message)) == message


@given(st.integers(0, len(SEALED) - 1), st.integers(1, 255))
def test_no_changed_byte_goes_unnoticed(place, change):
    changed = bytearray(SEALED)
    changed[place] ^= change
    with pytest.raises(Corrupted):
        checksums.opened(bytes(changed))


@given(st.integers(0, len(SEALED) - 1))
def test_no_message_that_was_cut_short_is_read(length):
    with pytest.raises(Corrupted):
        checksums.opened(SEALED[:length])


def test_a_reader_that_knows_no_checksums_reads_a_sealed_message():
    read = types_pb2.Latents.FromString(SEALED)
    assert (read.values, read.space) == (LATENTS.values, LATENTS.space)


def test_a_checksum_is_needed_where_it_was_announced_and_held_to_wherever_it_is():
    assert checksums.opened(b"plain", required=False) == b"plain"
    with pytest.raises(Corrupted):
        checksums.opened(SEALED[:3] + b"?" + SEALED[4:], required=False)


async def test_services_seal_what_they_say_to_each_other_and_to_nobody_else():
    async with running() as it, open_channel(f"127.0.0.1:{it.port}", ChannelSettings(), SERVICE) as channel:
        raw = channel.unary_unary(f"/{SERVICE}/Encode")
        plain = await raw(ONE.SerializeToString(), wait_for_ready=True, timeout=5)
        assert plain == encoder_pb2.EncodeResponse(encodings=[{}]).SerializeToString()
        sealed = await raw(checksums.seal(ONE.SerializeToString()), metadata=[checksums.ASKED], timeout=5)
        assert checksums.opened(sealed) == plain
        stub = Stub(encoder_pb2_grpc.EncoderServiceStub, channel, ChannelSettings())
        assert (await stub.Encode(ONE, timeout=5)).SerializeToString() == plain


async def test_a_server_refuses_a_request_that_was_changed_on_its_way():
    async with running() as it:
        call = it.channel.unary_unary(f"/{SERVICE}/Encode")
        for damaged in (ONE.SerializeToString(), b"\x00" + checksums.seal(ONE.SerializeToString())[1:]):
            with pytest.raises(grpc.aio.AioRpcError) as failure:
                await call(damaged, metadata=[checksums.ASKED], timeout=5)
            assert failure.value.code() == grpc.StatusCode.DATA_LOSS
        assert it.servicer.started == 0


async def test_a_caller_refuses_an_answer_without_a_checksum():
    async def answer(request, context):
        return encoder_pb2.EncodeResponse(encodings=[{}]).SerializeToString()

    server = grpc.aio.server()
    handler = grpc.method_handlers_generic_handler(SERVICE, {"Encode": grpc.unary_unary_rpc_method_handler(answer)})
    server.add_generic_rpc_handlers((handler,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with open_channel(f"127.0.0.1:{port}", ChannelSettings(), SERVICE) as channel:
            stub = Stub(encoder_pb2_grpc.EncoderServiceStub, channel, ChannelSettings())
            with pytest.raises(grpc.aio.AioRpcError) as failure:
                await stub.Encode(ONE, wait_for_ready=True, timeout=5)
            assert failure.value.code() == grpc.StatusCode.DATA_LOSS
    finally:
        await server.stop(0)
