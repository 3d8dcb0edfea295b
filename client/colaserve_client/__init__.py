"""The client of colaserve: generate text and work with latents over gRPC, blocking or with asyncio.

`Client` and `AsyncClient` talk to a coordinator; `EncoderClient`, `PriorClient`, `DecoderClient` and their asyncio
twins to a stage. Everything here is public and stays; what is not in `__all__` may change.
docs/client.md is the guide.

>>> from colaserve_client import Client
>>> with Client(target) as client:
...     print(client.generate("Once upon a time", max_new_tokens=12).text)
 there was a
"""

from inspect import ismodule as _ismodule

from colaserve_client.about import Limits as Limits
from colaserve_client.about import ModelInfo as ModelInfo
from colaserve_client.about import ModelShape as ModelShape
from colaserve_client.about import ServerInfo as ServerInfo
from colaserve_client.about import ServiceInfo as ServiceInfo
from colaserve_client.about import StageInfo as StageInfo
from colaserve_client.base import client_version as _version
from colaserve_client.blocking import Client as Client
from colaserve_client.blocking import DecoderClient as DecoderClient
from colaserve_client.blocking import DecodeSession as DecodeSession
from colaserve_client.blocking import EncoderClient as EncoderClient
from colaserve_client.blocking import PriorClient as PriorClient
from colaserve_client.blocking import Stream as Stream
from colaserve_client.calls import AsyncDecodeSession as AsyncDecodeSession
from colaserve_client.calls import AsyncStream as AsyncStream
from colaserve_client.client import AsyncClient as AsyncClient
from colaserve_client.errors import Cancelled as Cancelled
from colaserve_client.errors import ColaserveError as ColaserveError
from colaserve_client.errors import DeadlineExceeded as DeadlineExceeded
from colaserve_client.errors import InvalidRequest as InvalidRequest
from colaserve_client.errors import MessageTooLarge as MessageTooLarge
from colaserve_client.errors import ModelMismatch as ModelMismatch
from colaserve_client.errors import NotAuthenticated as NotAuthenticated
from colaserve_client.errors import NotSupported as NotSupported
from colaserve_client.errors import Overloaded as Overloaded
from colaserve_client.errors import ServerError as ServerError
from colaserve_client.errors import Unavailable as Unavailable
from colaserve_client.latents import Latents as Latents
from colaserve_client.latents import LatentsLike as LatentsLike
from colaserve_client.latents import load_latents as load_latents
from colaserve_client.latents import save_latents as save_latents
from colaserve_client.pictures import Trajectory as Trajectory
from colaserve_client.results import BranchBlock as BranchBlock
from colaserve_client.results import ChoiceScore as ChoiceScore
from colaserve_client.results import DecodedBlock as DecodedBlock
from colaserve_client.results import DecodedLatents as DecodedLatents
from colaserve_client.results import Density as Density
from colaserve_client.results import Embedding as Embedding
from colaserve_client.results import FinishReason as FinishReason
from colaserve_client.results import GenerationChunk as GenerationChunk
from colaserve_client.results import GenerationOutcome as GenerationOutcome
from colaserve_client.results import GenerationResult as GenerationResult
from colaserve_client.results import InfillResult as InfillResult
from colaserve_client.results import InterpolationPoint as InterpolationPoint
from colaserve_client.results import LatentBlock as LatentBlock
from colaserve_client.results import Logprobs as Logprobs
from colaserve_client.results import Preview as Preview
from colaserve_client.results import Probes as Probes
from colaserve_client.results import Reconstruction as Reconstruction
from colaserve_client.results import Score as Score
from colaserve_client.results import SequenceEncoding as SequenceEncoding
from colaserve_client.results import TextEncoding as TextEncoding
from colaserve_client.results import Timing as Timing
from colaserve_client.results import TokenLogprobs as TokenLogprobs
from colaserve_client.results import Tokens as Tokens
from colaserve_client.results import TopToken as TopToken
from colaserve_client.results import Usage as Usage
from colaserve_client.settings import Branch as Branch
from colaserve_client.settings import Connection as Connection
from colaserve_client.settings import GenerationRequest as GenerationRequest
from colaserve_client.settings import Interpolation as Interpolation
from colaserve_client.settings import LogprobsDtype as LogprobsDtype
from colaserve_client.settings import NoiseSeed as NoiseSeed
from colaserve_client.settings import Pooling as Pooling
from colaserve_client.settings import Prompt as Prompt
from colaserve_client.settings import Retry as Retry
from colaserve_client.settings import Sampler as Sampler
from colaserve_client.settings import Sampling as Sampling
from colaserve_client.settings import Scoring as Scoring
from colaserve_client.settings import Solver as Solver
from colaserve_client.settings import Steering as Steering
from colaserve_client.settings import Tls as Tls
from colaserve_client.stages import AsyncDecoderClient as AsyncDecoderClient
from colaserve_client.stages import AsyncEncoderClient as AsyncEncoderClient
from colaserve_client.stages import AsyncPriorClient as AsyncPriorClient

__version__ = _version()

__all__ = ["__version__"]
__all__ += [name for name, value in [*globals().items()] if name[0] != "_" and not _ismodule(value)]
