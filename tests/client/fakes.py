"""A real gRPC server with tiny deterministic services: a token is a byte, its latent is (byte, 0), the prior writes a
fixed story. `Behaviour` makes it fail, wait, and tell what reached it."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import grpc
import numpy as np
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from colaserve.v1 import (
    decoder_pb2,
    decoder_pb2_grpc,
    encoder_pb2,
    encoder_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    latent_service_pb2,
    latent_service_pb2_grpc,
    prior_pb2,
    prior_pb2_grpc,
    types_pb2,
)
from tests import bytes_model
from tests.bytes_model import BLOCK, PROBES, SPACE, TIMING, latents_of, spelt, text_of, texts_of, tops
from tests.client.behaviour import Behaviour, Failure, invalid

STORY = b" there was a fox that wrote."
SHAPE = types_pb2.ModelShape(
    latent_dim=2, block_size=BLOCK, vae_block_size=BLOCK, patch_size=1, vocab_size=256, parameters=1000
)
LIMITS = types_pb2.Limits(max_context=64, max_message_bytes=1 << 26, max_running=4, max_waiting=8, kv_bytes=1 << 20)
SERVER = types_pb2.ServerInfo(
    version="0.0.0", device="cpu", dtype="float32", running=1, waiting=2, kv_bytes_used=512, backend="plain: for tests"
)


def ids_of(latents: types_pb2.Latents, context: grpc.ServicerContext) -> list[int]:
    if latents.space not in ("", SPACE):
        Failure(grpc.StatusCode.FAILED_PRECONDITION, f"latents of space {latents.space}, expected {SPACE}").abort(
            context
        )
    values = np.frombuffer(latents.values.data, np.float32).reshape(-1, 2)
    return [round(float(token)) for token in values[:, 0]]


class Fake:
    """What all of them share."""

    info: Any  # what GetInfo answers beside what is the same for all

    def __init__(self, behaviour: Behaviour):
        self.behaviour = behaviour

    def GetInfo(self, request, context):
        self.behaviour.enter(request, context)
        about = type(self.info)(model=SHAPE, space=SPACE, limits=LIMITS, server=SERVER)
        about.MergeFrom(self.info)
        return about


class Generation(Fake, generation_pb2_grpc.GenerationServiceServicer):
    info = generation_pb2.GenerationServiceGetInfoResponse(
        model_name="fake",
        default_sampler=types_pb2.Sampler(steps=16, guidance_scale=7, solver=types_pb2.SOLVER_EULER),
        default_sampling=types_pb2.Sampling(temperature=0, top_k=50, top_p=0.9),
        default_max_new_tokens=32,
        chat_frame="Question: {prompt} Answer:",
        end_ids=[0],
        pad_id=1,
        stages=[
            generation_pb2.StageInfo(
                stage=name, serving=True, server=SERVER, limits=LIMITS, space=SPACE, target="in-process"
            )
            for name in ("encoder", "prior", "decoder")
        ],
    )

    def Generate(self, request, context):
        self.behaviour.enter(request, context)
        if request.HasField("max_new_tokens") and request.max_new_tokens < 1:
            invalid("max_new_tokens", f"got {request.max_new_tokens}, expected 1 or more").abort(context)
        blocks = bytes_model.blocks_of(request, STORY.decode(), self.behaviour.logprob)
        yield from self.behaviour.messages(blocks, context)

    def Tokenize(self, request, context):
        self.behaviour.enter(request, context)
        ids = request.text.encode()
        return generation_pb2.TokenizeResponse(token_ids=ids, tokens=texts_of(ids))

    def Detokenize(self, request, context):
        self.behaviour.enter(request, context)
        return generation_pb2.DetokenizeResponse(text=text_of(request.token_ids))


class LatentSpace(Fake, latent_service_pb2_grpc.LatentServiceServicer):
    info = latent_service_pb2.LatentServiceGetInfoResponse()

    def EncodeText(self, request, context):
        self.behaviour.enter(request, context)
        if not all(request.texts):
            invalid(f"texts[{list(request.texts).index('')}]", "must not be empty").abort(context)
        response = latent_service_pb2.EncodeTextResponse(timing=TIMING)
        for ids in (text.encode() for text in request.texts):
            variance = latents_of(ids).values if request.with_variance else None
            response.encodings.add(latents=latents_of(ids), token_ids=ids, tokens=texts_of(ids), log_variance=variance)
        return self.behaviour.sent(response)

    def DecodeLatents(self, request, context):
        self.behaviour.enter(request, context)
        ids = ids_of(request.latents, context)[: request.token_count or None]
        wanted = request.HasField("top_logprobs")
        return latent_service_pb2.DecodeLatentsResponse(
            **spelt(ids),
            logprobs=[-0.25] * len(ids) if wanted else [],
            top_logprobs=tops(ids, request.top_logprobs),
            target_logprobs=[-0.75] * len(request.target_ids),
            timing=TIMING,
        )

    def Logprobs(self, request, context):
        self.behaviour.enter(request, context)
        return bytes_model.scored(request.text.encode() or request.ids.ids or ids_of(request.latents, context), request)

    def Score(self, request, context):
        self.behaviour.enter(request, context)
        return latent_service_pb2.LatentServiceScoreResponse(
            log_likelihood=-12.5,
            standard_error=0.25,
            evaluations=64 * (1 + 2 * request.probes),
            seed=bytes_model.seed_of(request),
            timing=TIMING,
        )

    def SampleLatents(self, request, context):
        self.behaviour.enter(request, context)
        blocks = (
            latent_service_pb2.SampleLatentsResponse(
                block_index=index,
                latents=latents_of(STORY[index * BLOCK :][:BLOCK]),
                timing=TIMING,
                seed=bytes_model.seed_of(request),
                provisional=provisional,
                step=2 if provisional else 4,
                probes=PROBES if request.with_probes else None,
            )
            for index in range(request.max_blocks)
            for provisional in ([True, False] if request.preview_every else [False])
        )
        yield from self.behaviour.messages(blocks, context)

    def Fork(self, request, context):
        self.behaviour.enter(request, context)
        answers = [
            [bytes_model.block_of_branch(number, index, block) for index, block in enumerate(blocks)]
            for number in range(len(request.branches))
            for blocks in [
                bytes_model.blocks_of(bytes_model.branch_of(request, number), STORY.decode(), self.behaviour.logprob)
            ]
        ]
        yield from self.behaviour.messages(
            (block for turn in zip_longest(*answers) for block in turn if block), context
        )

    def Embed(self, request, context):
        self.behaviour.enter(request, context)
        response = latent_service_pb2.EmbedResponse(timing=TIMING)
        for ids in [each.ids for each in request.sequences] or [text.encode() for text in request.texts]:
            values = latents_of([round(sum(ids) / len(ids))]).values
            if request.pooling != latent_service_pb2.POOLING_PER_BLOCK:
                values.shape[:] = [2]
            response.embeddings.add(values=values, token_count=len(ids), space=SPACE)
        return response

    def Interpolate(self, request, context):
        self.behaviour.enter(request, context)
        start, end = (
            np.array(list(point.text.encode()) if point.text else ids_of(point.latents, context), float)
            for point in (request.start, request.end)
        )
        points = []
        for weight in np.linspace(0, 1, request.points):
            ids = [round(token) for token in (1 - weight) * start + weight * end]
            points.append({"weight": weight, "latents": latents_of(ids), **spelt(ids)})
        return latent_service_pb2.InterpolateResponse(points=points, timing=TIMING)

    def Infill(self, request, context):
        self.behaviour.enter(request, context)
        return bytes_model.filled(request)

    def Reconstruct(self, request, context):
        self.behaviour.enter(request, context)
        response = latent_service_pb2.ReconstructResponse(timing=TIMING)
        for ids in (text.encode() for text in request.texts):
            response.reconstructions.add(**spelt(ids), original_ids=ids, token_accuracy=1, bits_per_token=0.5)
        return response


class Encoder(Fake, encoder_pb2_grpc.EncoderServiceServicer):
    info = encoder_pb2.EncoderServiceGetInfoResponse(has_variance=True)

    def Encode(self, request, context):
        self.behaviour.enter(request, context)
        encodings = [encoder_pb2.Encoding(latents=latents_of(each.ids)) for each in request.sequences]
        return self.behaviour.sent(encoder_pb2.EncodeResponse(encodings=encodings, timing=TIMING))


class Prior(Fake, prior_pb2_grpc.PriorServiceServicer):
    info = prior_pb2.PriorServiceGetInfoResponse()

    def Sample(self, request, context):
        self.behaviour.enter(request, context)
        written = [(request.first_block + i, latents_of(STORY[i * BLOCK :][:BLOCK])) for i in range(request.max_blocks)]
        blocks = (prior_pb2.SampleResponse(block_index=i, latents=block, timing=TIMING) for i, block in written)
        yield from self.behaviour.messages(blocks, context)

    def Score(self, request, context):
        self.behaviour.enter(request, context)
        return prior_pb2.PriorServiceScoreResponse(log_densities=[-3.5], standard_errors=[0.25], evaluations=64)


class Decoder(Fake, decoder_pb2_grpc.DecoderServiceServicer):
    info = decoder_pb2.DecoderServiceGetInfoResponse()

    def Decode(self, request_iterator, context):
        opening = next(request_iterator)
        self.behaviour.enter(opening, context)
        if not opening.HasField("open"):
            invalid("request", "the first message must set open").abort(context)
        answers = (self._answer(opening.open, request, context) for request in request_iterator)
        yield from self.behaviour.messages(answers, context)

    def _answer(self, opening, request, context):
        provisional = request.HasField("preview")
        ids = ids_of(request.preview if provisional else request.block, context)
        return decoder_pb2.DecodeResponse(
            token_ids=ids,
            logprobs=[-0.25] * len(ids),
            top_logprobs=tops(ids, opening.top_logprobs),
            logits=latents_of(ids).values if opening.with_logits else None,
            timing=TIMING,
            provisional=provisional,
            probes=PROBES if opening.with_probes else None,
        )


SERVICES: dict[Any, Any] = {
    Generation: generation_pb2_grpc.add_GenerationServiceServicer_to_server,
    LatentSpace: latent_service_pb2_grpc.add_LatentServiceServicer_to_server,
    Encoder: encoder_pb2_grpc.add_EncoderServiceServicer_to_server,
    Prior: prior_pb2_grpc.add_PriorServiceServicer_to_server,
    Decoder: decoder_pb2_grpc.add_DecoderServiceServicer_to_server,
}


@dataclass
class FakeServer:
    """Everything on one port."""

    server: grpc.Server
    port: int
    behaviour: Behaviour
    health: health.HealthServicer

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    def stop(self) -> None:
        self.behaviour.go_on.set()
        self.server.stop(0).wait()


def start_server(credentials: grpc.ServerCredentials | None = None, port: int = 0, *only: type[Fake]) -> FakeServer:
    """All services, or some."""
    server = grpc.server(ThreadPoolExecutor(16), options=[("grpc.so_reuseport", 0)])
    behaviour, healthy = Behaviour(), health.HealthServicer()
    for service in only or SERVICES:
        SERVICES[service](service(behaviour), server)
    health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
    healthy.set("", health_pb2.HealthCheckResponse.SERVING)
    address = f"127.0.0.1:{port}"
    port = server.add_insecure_port(address) if credentials is None else server.add_secure_port(address, credentials)
    server.start()
    return FakeServer(server, port, behaviour, healthy)
