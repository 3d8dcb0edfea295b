"""What hostile and faulty clients do. Each attack is one round, repeated as long as it lasts."""

from __future__ import annotations

import asyncio
import contextlib
import json
import struct
from collections.abc import Callable

import grpc

from colaserve.v1 import generation_pb2, prior_pb2, types_pb2
from tests.abuse.server import KEY
from tests.abuse.target import AUTHORIZED, MIB, Target, attack
from tests.services.rpc import frames

WRONG = 1_000_000  # items


# --- oversized and malformed over gRPC ---


@attack("Encode: a million empty sequences, gzip", short=True)
async def _(target: Target) -> None:
    await target.call("EncoderService/Encode", b"\x0a\x00" * 1_000_000, grpc.Compression.Gzip)


@attack("Encode: a million empty sequences", short=True)
async def _(target: Target) -> None:
    await target.call("EncoderService/Encode", b"\x0a\x00" * 1_000_000)


@attack("Infill: 63 MiB of empty segments")
async def _(target: Target) -> None:
    await target.call("LatentService/Infill", b"\x0a\x00" * (63 * MIB // 2))


@attack("Infill: 4 MiB of empty segments")
async def _(target: Target) -> None:
    await target.call("LatentService/Infill", b"\x0a\x00" * (4 * MIB // 2))


def _nested(tag: bytes, content: bytes) -> bytes:
    length, encoded = len(content), b""
    while length > 127:
        encoded, length = encoded + bytes([length & 127 | 128]), length >> 7
    return tag + encoded + bytes([length]) + content


@attack("Sample: 60 MiB of open spans")
async def _(target: Target) -> None:
    await target.call("PriorService/Sample", _nested(b"\x0a", b"\x12\x00" * (30 * MIB)))


@attack("Sample: a canvas of 1e20")
async def _(target: Target) -> None:
    values = types_pb2.Tensor(dtype=1, shape=[16, 16], data=struct.pack("<f", 1e20) * 256)
    request = prior_pb2.SampleRequest(canvas={"latents": {"values": values}}, max_blocks=2, seed={"base_seed": 1})
    await target.call("PriorService/Sample", request.SerializeToString())


@attack("bytes that are no messages", short=True)
async def _(target: Target) -> None:
    for method in ("GenerationService/Generate", "EncoderService/Encode", "PriorService/Sample"):
        await target.call(method, b"\xff" * 1000)


# --- oversized and malformed over HTTP ---

_LISTS = (
    ("/v1/completions", b'{"prompt": "x", "stop": [%b0]}', b"0,"),
    ("/v1/completions", b'{"prompt": [%b0]}', b"{},"),
    ("/v1/chat/completions", b'{"messages": [%b0]}', b"0,"),
    ("/v1/chat/completions", b'{"messages": [{"role": "user", "content": [%b0]}]}', b"0,"),
    ("/detokenize", b'{"tokens": [%b""]}', b'"",'),
)


@attack("JSON: a million wrong items in stop, prompt, messages, parts, tokens", short=True)
async def _(target: Target) -> None:
    for path, frame, item in _LISTS:
        await target.post(path, frame % (item * WRONG))


@attack("JSON: a million empty lists")
async def _(target: Target) -> None:
    await target.post("/v1/completions", b'{"prompt": "x", "tools": [%b[]]}' % (b"[]," * WRONG))


@attack("bodies of 64 MiB, chunked")
async def _(target: Target) -> None:
    await target.post("/v1/completions", bytes(64 * MIB), chunked=True)


@attack("4 MiB to /health on 100 connections, without a key, unfinished", short=True)
async def _(target: Target) -> None:
    body = bytes(4 * MIB - 1)
    await asyncio.gather(*(target.post("/health", body, key="", hold=True) for _ in range(100)))
    await asyncio.sleep(1)
    await target.hang_up()


@attack("4 MiB bodies without a key")
async def _(target: Target) -> None:
    await asyncio.gather(*(target.post("/v1/completions", b"[" * (4 * MIB), key="wrong") for _ in range(4)))


@attack("malformed HTTP", short=True)
async def _(target: Target) -> None:
    for bad in (b"nonsense\r\n\r\n", b"GET / HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n", b"\x16\x03\x01\r\n\r\n"):
        reader, writer = await target.connect(target.server.http_port)
        writer.write(bad)
        target.sent += len(bad)
        await target.answer(reader)
        await target.hang_up(writer)


async def _ask_often(target: Target, path: str, body: bytes | None = None) -> None:
    async def ask() -> None:
        reader, writer = await target.connect(target.server.http_port)
        method = "GET" if body is None else "POST"
        head = f"{method} {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY if body else ''}\r\n"
        kind = f"content-type: application/json\r\nconnection: close\r\ncontent-length: {len(body or b'')}\r\n\r\n"
        writer.write((head + kind).encode() + (body or b""))
        target.sent += len(head) + len(kind) + len(body or b"")
        await target.answer(reader)
        await target.hang_up(writer)

    await asyncio.gather(*(ask() for _ in range(16)))


@attack("/ready without a key, 16 at once")
async def _(target: Target) -> None:
    await _ask_often(target, "/ready")


@attack("/metrics without a key, 16 at once")
async def _(target: Target) -> None:
    await _ask_often(target, "/metrics")


@attack("/tokenize with 30,000 characters, 16 at once", sessions=16)
async def _(target: Target) -> None:
    await _ask_often(target, "/tokenize", json.dumps({"prompt": "word " * 6000}).encode())


@attack("/detokenize with 8,000 ids, 16 at once", sessions=16)
async def _(target: Target) -> None:
    await _ask_often(target, "/detokenize", json.dumps({"tokens": [300] * 8000}).encode())


# --- unread, unsent ---


async def _held(target: Target, count: int, port: int, sent: bytes) -> None:
    """Connections that say this much and then nothing; for 2 s."""
    for _ in range(count):
        _, writer = await target.connect(port)
        writer.write(sent)
        target.sent += len(sent)
    await asyncio.sleep(2)
    await target.hang_up()


@attack("500 HTTP connections with half a head")
async def _(target: Target) -> None:
    await _held(target, 500, target.server.http_port, b"GET /health HTTP/1.1\r\nhost: x\r\n")


@attack("300 silent connections to the metrics port")
async def _(target: Target) -> None:
    await _held(target, 300, target.server.metrics_port, b"GET")


@attack("1,100 Decode streams without a message", short=True)
async def _(target: Target) -> None:
    async with contextlib.AsyncExitStack() as stack:
        calls = []
        for _ in range(11):
            channel = await stack.enter_async_context(target.channel())
            decode = channel.stream_stream("/colaserve.v1.DecoderService/Decode")
            calls += [decode(metadata=AUTHORIZED) for _ in range(100)]
            target.sent += 100 * 200
        await asyncio.sleep(5)
        for call in calls:
            if call.done():
                target.answers[(await call.code()).name] += 1
            call.cancel()


LONG = generation_pb2.GenerateRequest(prompt="Once", max_new_tokens=6000, ignore_end=True)


UNREAD_SECONDS = 60.0


@attack("44 gRPC streams that nobody reads", sessions=44)
async def _(target: Target) -> None:
    await target.calls("GenerationService/Generate", [LONG] * 44, read=False, seconds=UNREAD_SECONDS)


@attack("44 HTTP streams that nobody reads", sessions=44)
async def _(target: Target) -> None:
    body = json.dumps({"prompt": "Once", "max_tokens": 6000, "stream": True, "ignore_eos": True}).encode()
    for _ in range(44):
        await target.post("/v1/completions", body[:-1], hold=True)
        target._open[-1].write(body[-1:])
    await asyncio.sleep(UNREAD_SECONDS)
    await target.hang_up()


@attack("calls that are given up at once")
async def _(target: Target) -> None:
    async with target.channel() as channel:
        generate = channel.unary_stream("/colaserve.v1.GenerationService/Generate")
        for number in range(20):
            call = generate(LONG.SerializeToString(), metadata=AUTHORIZED)
            target.sent += LONG.ByteSize()
            await asyncio.sleep(0.005 * (number % 8))
            call.cancel()


# --- floods of one connection ---


async def _flood(target: Target, made: Callable[[int], bytes], count: int) -> None:
    reader, writer = await frames.connect(target.server.grpc_port)
    ended = asyncio.create_task(reader.read())
    try:
        for number in range(count):
            if ended.done() or writer.is_closing():
                break
            data = made(number)
            writer.write(data)
            target.sent += len(data)
            if number % 16 == 0:
                with contextlib.suppress(ConnectionError):
                    await writer.drain()
                await asyncio.sleep(0)
        await asyncio.wait([ended], timeout=5)
        target.answers["connection ended" if ended.done() else "connection kept"] += 1
    finally:
        ended.cancel()
        await asyncio.gather(ended, return_exceptions=True)
        writer.transport.abort()


@attack("rapid reset: 20,000 calls reset at once on one connection", short=True)
async def _(target: Target) -> None:
    await _flood(target, lambda number: frames.rapid_reset("/colaserve.v1.GenerationService/Generate", number), 20_000)


@attack("20,000 pings on one connection", short=True)
async def _(target: Target) -> None:
    await _flood(target, frames.ping, 20_000)


# --- honest load; more in heavy.py ---


async def _generations(target: Target, count: int, request: generation_pb2.GenerateRequest) -> None:
    message = request.SerializeToString()
    await asyncio.gather(*(target.call("GenerationService/Generate", message) for _ in range(count)))


async def short_generations(target: Target, count: int) -> None:
    """What honest load is compared with."""
    await _generations(target, count, generation_pb2.GenerateRequest(prompt="Once", max_new_tokens=8, ignore_end=True))


@attack("2 requests with a large max_tokens", sessions=2)
async def _(target: Target) -> None:
    await _generations(target, 2, LONG)


@attack("8 prompts of 7,000 tokens", sessions=8)
async def _(target: Target) -> None:
    ids = {"ids": [300 + number % 50 for number in range(7000)]}
    await _generations(target, 8, generation_pb2.GenerateRequest(prompt_ids=ids, max_new_tokens=8, ignore_end=True))
