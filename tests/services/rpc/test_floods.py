"""One connection that floods is ended; the others are served."""

import asyncio
from contextlib import suppress

import grpc
import psutil
import pytest

from colaserve_services.rpc.auth import Keys
from colaserve_services.rpc.floods import MOST_RESETS, RESET_SECONDS, Resets, end_connection
from tests.services.rpc import frames
from tests.services.rpc.conftest import ONE, running
from tests.waiting import PATIENCE

PATH = "/colaserve.v1.EncoderService/Encode"


async def ended(port: int, made, most: int) -> bool:
    """Whether the server ends a connection that sends these frames."""
    reader, writer = await frames.connect(port)
    gone = asyncio.create_task(reader.read())
    with suppress(ConnectionError):
        for number in range(most):
            writer.write(made(number))
            await writer.drain()
            if gone.done():
                break
            await asyncio.sleep(0)
    with suppress(ConnectionError):
        await asyncio.wait_for(gone, PATIENCE)
    writer.close()
    return gone.done()


@pytest.mark.parametrize("made", [lambda number: frames.rapid_reset(PATH, number), frames.ping], ids=["reset", "ping"])
async def test_a_flood_ends_its_connection_and_no_other(made):
    async with running() as it:
        assert await it.stub.Encode(ONE)
        honest = it.channel.get_state()
        assert await ended(it.port, made, 20_000)
        assert await it.stub.Encode(ONE)
        assert it.channel.get_state() is honest is grpc.ChannelConnectivity.READY


async def test_resets_without_a_key_are_counted_too():
    async with running(keys=Keys(["secret"])) as it:
        assert await ended(it.port, lambda number: frames.rapid_reset(PATH, number), 20_000)
        assert await it.stub.Encode(ONE, metadata=(("authorization", "Bearer secret"),))


async def test_a_few_pings_are_no_flood_and_are_answered():
    async with running() as it:
        reader, writer = await frames.connect(it.port)
        for number in range(10):
            writer.write(frames.ping(number))
            await asyncio.wait_for(reader.readuntil(frames.answer_to_ping(number)), PATIENCE)
        writer.close()
        assert await it.stub.Encode(ONE)


def test_calls_given_up_now_and_then_are_no_flood():
    now, cut = [0.0], []
    resets = Resets(lambda: now[0], cut.append)
    for _ in range(3):
        for _ in range(MOST_RESETS):
            resets.count("ipv4:192.0.2.1:1")
        now[0] += RESET_SECONDS
    assert not cut
    for _ in range(MOST_RESETS + 1):
        resets.count("ipv4:192.0.2.1:1")
        resets.count("ipv4:192.0.2.1:2")
    assert cut == ["ipv4:192.0.2.1:1", "ipv4:192.0.2.1:2"]


@pytest.mark.parametrize("peer", ["ipv4:192.0.2.1:1", "ipv6:%5B2001:db8::1%5D:1", "unix:", "", "unknown"])
def test_a_connection_that_is_not_there_is_none_of_ours(peer: str):
    before = psutil.Process().num_fds()
    assert not end_connection(peer)
    assert psutil.Process().num_fds() == before


async def test_a_connection_over_ipv6_is_found():
    server = await asyncio.start_server(lambda *_: None, "::1", 0)
    reader, writer = await asyncio.open_connection("::1", server.sockets[0].getsockname()[1])
    assert end_connection(f"ipv6:%5B::1%5D:{writer.get_extra_info('sockname')[1]}")
    assert await asyncio.wait_for(reader.read(), PATIENCE) == b""
    writer.close()
    server.close()
