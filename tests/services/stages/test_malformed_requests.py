"""Requests that are half right, wrong, or no requests: each gets an answer or a named error, and the services serve on.

COLASERVE_FUZZ_REQUESTS=2000, with --timeout=0, sends so many to every service (default 75).
"""

import os

import grpc
import numpy as np
import pytest
from anyio.from_thread import start_blocking_portal
from google.protobuf.descriptor import FieldDescriptor
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from colaserve.v1 import decoder_pb2, decoder_pb2_grpc, encoder_pb2, encoder_pb2_grpc, prior_pb2, prior_pb2_grpc
from colaserve_services.inference.models import MODELS
from colaserve_services.inference.open_inference_pb2 import ModelInferRequest
from tests.conftest import load_golden
from tests.services.inference.asking import asked, latents, text
from tests.services.systems import system
from tests.services.test_every_field import merged, walks
from tests.waiting import PATIENCE, wait_until

REQUESTS = int(os.environ.get("COLASERVE_FUZZ_REQUESTS", "75"))
SECONDS = 5  # deadline of a request
BRIEF = 0.5  # of one that may ask for an hour's work
EXPECTED = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
}
FUZZ = settings(max_examples=REQUESTS, deadline=None, suppress_health_check=list(HealthCheck), print_blob=False)

NUMBERS = st.sampled_from([0, 1, 2, 3, 4, 5, 7, 8, 16, 20, 21, 63, 64, 65, 256, 511, 512, 10_000, 2**31, 2**32 - 1])
LONGS = NUMBERS | st.sampled_from([2**53, 2**63 - 1, 2**63, 2**64 - 1])
FLOATS = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 7.0, 1e-30, 1e38, float("nan"), float("inf"), float("-inf")])
BYTES = st.sampled_from(
    [b"", b"\x00", b"\x00" * 64, b"\x00" * 256, b"\x00" * 512, b"\xff" * 256, b"\x00\x00\x80\x7f" * 64]
)
SCALARS = {
    FieldDescriptor.TYPE_INT32: st.integers(-9, 9),
    FieldDescriptor.TYPE_INT64: st.integers(0, 9) | st.sampled_from([-1, -(2**63), 2**63 - 1]),
    FieldDescriptor.TYPE_UINT32: NUMBERS,
    FieldDescriptor.TYPE_UINT64: LONGS,
    FieldDescriptor.TYPE_FLOAT: FLOATS,
    FieldDescriptor.TYPE_DOUBLE: FLOATS,
    FieldDescriptor.TYPE_BOOL: st.booleans(),
    FieldDescriptor.TYPE_BYTES: BYTES,
    FieldDescriptor.TYPE_STRING: st.sampled_from(["", "0123456789abcdef", "x" * 3000, "\x00", "é\n"]),
    FieldDescriptor.TYPE_ENUM: st.integers(0, 5) | st.just(2**31 - 1),
}
PARAMETERS = st.sampled_from(["unknown", *sorted({name for model in MODELS.values() for name in model.parameters})])
LATENTS = latents(np.zeros((4, 16), np.float32), typed=True)
INFER = {
    "generate": asked("generate", text("a"), max_new_tokens=4, steps=2),
    "encoder": asked("encoder", text("a")),
    "decoder": asked("decoder", LATENTS),
    "prior": asked("prior", LATENTS, max_blocks=1, steps=2),
}


def spoil(data, message, depth=0):
    """Set some fields of a message, at any depth, to something else; the others stay."""
    for field in message.DESCRIPTOR.fields:
        inner = field.type == FieldDescriptor.TYPE_MESSAGE
        chance = data.draw(st.integers(0, 9))
        if chance > (4 if inner else 1):
            continue
        if field.is_repeated:
            spoil_repeated(data, message, field, inner, depth)
        elif inner:
            spoil(data, getattr(message, field.name), depth + 1)
            getattr(message, field.name).SetInParent()
        elif data.draw(st.booleans()):
            setattr(message, field.name, data.draw(SCALARS[field.type]))
        else:
            message.ClearField(field.name)


def spoil_repeated(data, message, field, inner, depth):
    items = getattr(message, field.name)
    if inner and field.message_type.GetOptions().map_entry:
        spoil(data, items[data.draw(PARAMETERS)], depth + 1)
        return
    if data.draw(st.booleans()):
        del items[:]
    for _ in range(data.draw(st.integers(0, 4))):
        if inner:
            spoil(data, items.add(), depth + 1)
        else:
            items.append(data.draw(SCALARS[field.type]))


class Server:
    """A coordinator and its stages in an event loop of their own, called from here without one."""

    def __init__(self, portal, running):
        self._portal, self._running, self.served = portal, running, running.stages
        self.channel = grpc.insecure_channel(self.served.target)
        self.encoder = encoder_pb2_grpc.EncoderServiceStub(self.channel)
        self.prior = prior_pb2_grpc.PriorServiceStub(self.channel)
        self.decoder = decoder_pb2_grpc.DecoderServiceStub(self.channel)

    def ask(self, method, request, timeout):
        """Run a call of the coordinator to its end."""

        async def run():
            services = self._running.generation, self._running.latents, self._running.inference
            call = next(getattr(each, method) for each in services if hasattr(each, method))(request, timeout=timeout)
            return [each async for each in call] if hasattr(call, "__aiter__") else await call

        return self._portal.call(run)


@pytest.fixture(scope="module")
def server():
    with (
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(system(load_golden("tiny_b4"), split=True)) as running,
    ):
        made = Server(portal, running)
        yield made
        for stage, engine in made.served.stages.engines.items():
            wait_until(lambda engine=engine: engine.load().running == engine.load().kv_bytes_used == 0)
            assert made.served.kv_bytes(stage) == 0
        made.channel.close()


def answered(call):
    """Run a call to its end; its status, OK included, must be one that a caller's mistake may have."""
    failure = None
    try:
        call()
    except grpc.RpcError as error:
        failure = error
    assert failure is None or failure.code() in EXPECTED, f"{failure.code()}: {failure.details()}"


def test_nothing_malformed_harms_the_prior(server):
    still_serves = server.served.run(known=4, blocks=1, steps=1)

    @FUZZ
    @given(st.data())
    def send(data):
        request = server.served.run(known=6, blocks=2, steps=1, preview_every=1, with_probes=True)
        spoil(data, request)
        answered(lambda: list(server.prior.Sample(request, timeout=SECONDS)))
        canvas = {"latents": server.served.latents(8), "open": [{"start": 5, "end": 8}]}
        scored = prior_pb2.PriorServiceScoreRequest(canvas=canvas, probes=2, steps=1)
        spoil(data, scored)
        answered(lambda: server.prior.Score(scored, timeout=BRIEF))

    send()
    assert len(list(server.prior.Sample(still_serves, timeout=PATIENCE))) == 1


def test_nothing_malformed_harms_the_decoder(server):
    def valid():
        block = server.served.latents(4)
        opening = {"prefix": server.served.latents(4), "max_latents": 16, "history_ids": [1, 2, 3, 4]}
        return [decoder_pb2.DecodeRequest(open=opening), *(decoder_pb2.DecodeRequest(block=block) for _ in range(3))]

    @FUZZ
    @given(st.data())
    def send(data):
        requests = valid()
        for request in requests:
            spoil(data, request)
        kept = data.draw(st.lists(st.sampled_from(requests), max_size=4)) if data.draw(st.booleans()) else requests
        answered(lambda: list(server.decoder.Decode(iter(kept), timeout=SECONDS)))
        junk = server.channel.stream_stream("/colaserve.v1.DecoderService/Decode")
        answered(lambda: list(junk(iter([data.draw(st.binary(max_size=200))] * 2), timeout=SECONDS)))

    send()
    assert len(list(server.decoder.Decode(iter(valid()), timeout=PATIENCE))) == 3


def test_nothing_malformed_harms_the_encoder(server):
    @FUZZ
    @given(st.data())
    def send(data):
        request = encoder_pb2.EncodeRequest(sequences=[{"ids": [1, 2, 3]}, {"ids": range(100)}])
        spoil(data, request)
        answered(lambda: server.encoder.Encode(request, timeout=SECONDS))

    send()
    assert server.encoder.Encode(encoder_pb2.EncodeRequest(sequences=[{"ids": [1]}]), timeout=PATIENCE)


def test_nothing_malformed_harms_the_coordinator(server):
    """Neither generations nor what is asked of latents, from each request of the walk over every field."""
    walked = walks(server.served.latents(7), server.served.latents(7, seed=1))
    kind, base, _ = walked["Generate"]
    undisturbed = server.ask("Generate", kind(**base), PATIENCE)

    @FUZZ
    @given(st.data())
    def send(data):
        method = data.draw(st.sampled_from(sorted(walked)))
        kind, base, changes = walked[method]
        request = kind(**merged(base, data.draw(st.sampled_from(list(changes.values())))))
        spoil(data, request)
        answered(lambda: server.ask(method, request, BRIEF))

    send()
    again = server.ask("Generate", kind(**base), PATIENCE)
    assert [each.token_ids for each in again] == [each.token_ids for each in undisturbed]


def test_nothing_malformed_harms_the_open_inference_protocol(server):
    """Whole or in a stream."""

    @FUZZ
    @given(st.data())
    def send(data):
        request = ModelInferRequest()
        request.CopyFrom(INFER[data.draw(st.sampled_from(sorted(INFER)))])
        spoil(data, request)
        answered(lambda: server.ask("ModelInfer", request, BRIEF))
        answered(lambda: server.ask("ModelStreamInfer", iter([request]), BRIEF))

    send()
    for right in INFER.values():
        assert server.ask("ModelInfer", right, PATIENCE).outputs
