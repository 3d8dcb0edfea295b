"""HTTP/2 by hand: what a hostile client sends."""

import asyncio
import struct

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RESET, SETTINGS, PING = 0, 1, 3, 4, 6
END_HEADERS, ACK = 4, 1


def frame(kind: int, payload: bytes = b"", flags: int = 0, stream: int = 0) -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def headers(path: str, stream: int, more: tuple[tuple[str, str], ...] = ()) -> bytes:
    """Those of a gRPC call; literals without indexing, shorter than 127 bytes."""
    fields = (
        (":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "x"),
        ("content-type", "application/grpc"), ("te", "trailers"), *more,
    )  # fmt: skip
    block = b"".join(b"\0" + bytes([len(k)]) + k.encode() + bytes([len(v)]) + v.encode() for k, v in fields)
    return frame(HEADERS, block, END_HEADERS, stream)


def rapid_reset(path: str, number: int) -> bytes:
    stream = 1 + 2 * number
    return headers(path, stream) + frame(RESET, struct.pack(">I", 8), stream=stream)


def ping(number: int) -> bytes:
    return frame(PING, struct.pack(">Q", number))


def answer_to_ping(number: int) -> bytes:
    return frame(PING, struct.pack(">Q", number), ACK)


async def connect(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(PREFACE + frame(SETTINGS))
    return reader, writer
