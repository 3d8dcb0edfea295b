"""The asyncio client's calls for likelihood."""

from collections.abc import Sequence
from typing import Unpack

from colaserve.v1 import latent_service_pb2
from colaserve_client.base import AsyncBaseClient
from colaserve_client.latents import LatentsLike
from colaserve_client.messages import one, request
from colaserve_client.results import Logprobs, Score
from colaserve_client.settings import CallFields, LogprobsDtype, Prompt, ScoringFields


class AsyncLikelihood(AsyncBaseClient):
    """`logprobs` and `score` of `AsyncClient`: how likely the model finds a text, and each of its tokens."""

    async def logprobs(
        self,
        text: Prompt | None = None,
        *,
        latents: LatentsLike | None = None,
        top_logprobs: int = 0,
        logprob_ids: Sequence[int] = (),
        all_logprobs: bool = False,
        logprobs_dtype: LogprobsDtype | None = None,
        cache_salt: str = "",
        **call: Unpack[CallFields],
    ) -> Logprobs:
        """Log-probabilities of a text's tokens as the model reconstructs it, or of the likeliest tokens of latents.

        Each block is decoded with those before it. Log-probabilities are log-softmax of the raw logits. This says how
        well latents hold a token; `score` says how likely the prior finds a text.

        Args:
            text: a text, or its token ids; or
            latents: n >= 1 positions of the server's space, or an array (n, d).
            top_logprobs: 0 to 20: how many likely tokens to return beside each.
            logprob_ids: ids whose log-probability is wanted at every position.
            all_logprobs: that of the whole vocabulary instead. The answer is one message, whose size bounds
                positions * ids.
            logprobs_dtype: "float32" (the default) or "float16", which halves that message.
            cache_salt: as in `generate`.

        >>> found = await client.logprobs("fox", logprob_ids=[111, 112])
        >>> found.tokens, found.position_logprobs.shape
        (('f', 'o', 'x'), (3, 2))
        """
        texts, ids = (text, None) if isinstance(text, str) else (None, text)
        message = request(
            latent_service_pb2.LogprobsRequest,
            call,
            text=texts,
            ids=ids,
            latents=latents,
            top_logprobs=top_logprobs,
            logprob_ids=logprob_ids,
            all_logprobs=all_logprobs,
            logprobs_dtype=logprobs_dtype,
            cache_salt=cache_salt,
        )
        return await self._unary(message, one(Logprobs), call)

    async def score(self, text: str, prefix: str = "", **settings: Unpack[ScoringFields]) -> Score:
        """How likely the model finds a text after a prefix: a lower bound of its log-likelihood, in nats.

        The decoder's term and the posterior's entropy are exact for each draw of latents; the prior's log density is
        estimated by the probability-flow ODE, see docs/likelihood.md. Likelihood and quality need not agree.

        Args:
            text: not empty. It begins with a space where the prefix does not end with one.
            prefix: what comes before it.
            samples: draws from the posterior, up to 64; 0 takes its mean, which is no bound and has less noise.
            probes: 1 to 256, of each draw; more lessen the error of its density.
            steps: of the integration; each takes two evaluations with solver "heun", the default, one with the others.
            seed: equal seeds give equal scores. None: random, and returned.
            cache_salt: as in `generate`.

        >>> found = await client.score("fox", "a quick ", probes=16, seed=7)
        >>> found.log_likelihood, found.standard_error, found.evaluations
        (-12.5, 0.25, 2112)
        """
        message = request(latent_service_pb2.LatentServiceScoreRequest, settings, text=text, prefix=prefix)
        return await self._unary(message, one(Score), settings)
