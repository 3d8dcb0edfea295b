"""The client of colaserve: generate text and work with latents over gRPC, blocking or with asyncio.

`Client` and `AsyncClient` talk to a coordinator; `EncoderClient`, `PriorClient`, `DecoderClient` and their asyncio
twins to a stage. Everything here is public and stays; what is not in `__all__` may change.
docs/client.md is the guide.

>>> from colaserve_client import Client
>>> with Client(target) as client:
...     print(client.generate("Once upon a time", max_new_tokens=12).text)
 there was a
"""

from colaserve_client.blocking import Client, DecoderClient, DecodeSession, EncoderClient, PriorClient, Stream
from colaserve_client.calls import AsyncStream
from colaserve_client.channel import client_version
from colaserve_client.client import AsyncClient
from colaserve_client.errors import (
    Cancelled,
    ColaserveError,
    DeadlineExceeded,
    InvalidRequest,
    MessageTooLarge,
    ModelMismatch,
    NotAuthenticated,
    NotSupported,
    Overloaded,
    ServerError,
    Unavailable,
)
from colaserve_client.latents import Latents, LatentsLike, load_latents, save_latents
from colaserve_client.results import (
    DecodedBlock,
    DecodedLatents,
    FinishReason,
    GenerationChunk,
    GenerationOutcome,
    GenerationResult,
    InfillResult,
    InterpolationPoint,
    LatentBlock,
    Limits,
    ModelInfo,
    ModelShape,
    Reconstruction,
    SequenceEncoding,
    ServerInfo,
    ServiceInfo,
    StageInfo,
    TextEncoding,
    Timing,
    TokenLogprobs,
    Tokens,
    TopToken,
    Usage,
)
from colaserve_client.settings import (
    Connection,
    GenerationRequest,
    Interpolation,
    NoiseSeed,
    Prompt,
    Retry,
    Sampler,
    Sampling,
    Solver,
    Tls,
)
from colaserve_client.stages import AsyncDecoderClient, AsyncDecodeSession, AsyncEncoderClient, AsyncPriorClient

__version__ = client_version()

__all__ = [
    "AsyncClient",
    "AsyncDecodeSession",
    "AsyncDecoderClient",
    "AsyncEncoderClient",
    "AsyncPriorClient",
    "AsyncStream",
    "Cancelled",
    "Client",
    "ColaserveError",
    "Connection",
    "DeadlineExceeded",
    "DecodeSession",
    "DecodedBlock",
    "DecodedLatents",
    "DecoderClient",
    "EncoderClient",
    "FinishReason",
    "GenerationChunk",
    "GenerationOutcome",
    "GenerationRequest",
    "GenerationResult",
    "InfillResult",
    "Interpolation",
    "InterpolationPoint",
    "InvalidRequest",
    "LatentBlock",
    "Latents",
    "LatentsLike",
    "Limits",
    "MessageTooLarge",
    "ModelInfo",
    "ModelMismatch",
    "ModelShape",
    "NoiseSeed",
    "NotAuthenticated",
    "NotSupported",
    "Overloaded",
    "PriorClient",
    "Prompt",
    "Reconstruction",
    "Retry",
    "Sampler",
    "Sampling",
    "SequenceEncoding",
    "ServerError",
    "ServerInfo",
    "ServiceInfo",
    "Solver",
    "StageInfo",
    "Stream",
    "TextEncoding",
    "Timing",
    "Tls",
    "TokenLogprobs",
    "Tokens",
    "TopToken",
    "Unavailable",
    "Usage",
    "__version__",
    "load_latents",
    "save_latents",
]
