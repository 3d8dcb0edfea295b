import asyncio
import socket
import ssl
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest

from colaserve.v1 import encoder_pb2, encoder_pb2_grpc
from colaserve_services.errors import InvalidRequest
from tests.authority import make_authority
from tests.services.servers import Served, served


class Encoder(encoder_pb2_grpc.EncoderServiceServicer):
    """Answers with as many encodings as there are sequences; waits for `gate`, a sequence, when it is closed."""

    def __init__(self):
        self.gate = asyncio.Event()
        self.gate.set()
        self.started = 0
        self.clients = []  # names in their certificates

    async def Encode(self, request, context):
        self.started += 1
        self.clients += [name.decode() for name in context.auth_context().get("x509_common_name", ())]
        if not request.sequences:
            raise InvalidRequest("sequences", "got none")
        await self.gate.wait()
        return encoder_pb2.EncodeResponse(encodings=[encoder_pb2.Encoding()] * len(request.sequences))

    async def GetInfo(self, request, context):
        return encoder_pb2.EncoderServiceGetInfoResponse(space="0123456789abcdef")


ONE = encoder_pb2.EncodeRequest(sequences=[{"ids": [1]}])


@dataclass
class Running(Served):
    servicer: Encoder
    stub: encoder_pb2_grpc.EncoderServiceStub


@asynccontextmanager
async def running(settings=None, keys=None, ready=True):
    servicer = Encoder()
    async with served(servicer, settings=settings, keys=keys, ready=ready) as it:
        yield Running(**vars(it), servicer=servicer, stub=encoder_pb2_grpc.EncoderServiceStub(it.channel))


async def encode(channel, wait_for_ready=True):
    stub = encoder_pb2_grpc.EncoderServiceStub(channel)
    return await stub.Encode(ONE, wait_for_ready=wait_for_ready, timeout=30)


async def shown_certificate(port, ca, host="127.0.0.1"):
    """The common name in the certificate that a server shows."""
    context = ssl.create_default_context(cafile=ca)
    context.set_alpn_protocols(["h2", "http/1.1"])  # gRPC takes no other
    _, writer = await asyncio.open_connection(host, port, ssl=context, family=socket.AF_INET)
    name = dict(pair[0] for pair in writer.get_extra_info("peercert")["subject"])["commonName"]
    writer.close()
    return name


@pytest.fixture
def authority(tmp_path):
    return make_authority(tmp_path)
