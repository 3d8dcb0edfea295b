"""What services say about themselves: frozen dataclasses, as in `results.py`."""

from typing import Annotated

from colaserve_client.fields import Field
from colaserve_client.results import value
from colaserve_client.settings import Sampler, Sampling


@value
class ModelShape:
    """The shape of the model that a service holds."""

    latent_dim: Annotated[int, Field("Channels of a latent (d).")]
    block_size: Annotated[int, Field("Latents in a block (B).")]
    vae_block_size: Annotated[int, Field("Latents in a block of the Text VAE's mask.")]
    patch_size: Annotated[int, Field("Tokens in a latent (P).")]
    vocab_size: Annotated[int, Field("Tokens that the tokenizer and the decoder know.")]
    parameters: Annotated[int, Field("Parameters of the networks of this service.")]


@value
class Limits:
    """What a service takes at most; 0: not limited by it."""

    max_context: Annotated[int, Field("Latent positions of a session.")]
    max_message_bytes: Annotated[int, Field("Bytes of one message.")]
    max_running: Annotated[int, Field("Sessions that run at a time.")]
    max_waiting: Annotated[int, Field("Sessions that are queued at a time.")]
    kv_bytes: Annotated[int, Field("Memory of the KV cache.")]
    run_ahead: Annotated[int, Field("Blocks that a prior writes before they are read.")]


@value
class ServerInfo:
    """The process that answers, and its load at that moment."""

    version: Annotated[str, Field("Version of colaserve.")]
    device: Annotated[str, Field("Device of the network; empty where none runs.")]
    dtype: Annotated[str, Field("Type in which the network computes.")]
    running: Annotated[int, Field("Sessions that run.")]
    waiting: Annotated[int, Field("Sessions that are queued.")]
    kv_bytes_used: Annotated[int, Field("Memory of the KV cache that sessions hold.")]
    uptime_seconds: Annotated[float, Field("Seconds since the process was first ready.")]
    backend: Annotated[str, Field("What computes, and why it was chosen.")]


@value
class StageInfo:
    """A stage as the coordinator sees it."""

    stage: Annotated[str, Field('"encoder", "prior" or "decoder".')]
    target: Annotated[str, Field('"in-process" when it runs in the coordinator\'s process.')]
    serving: Annotated[bool, Field("Whether the last health check found it serving.")]
    space: Annotated[str, Field("Fingerprint of its latent space.")]
    limits: Annotated[Limits, Field("What it takes at most.")]
    server: Annotated[ServerInfo, Field("Its process, and the load.")]


@value
class ServiceInfo:
    """A service: what it holds and how busy it is."""

    model: Annotated[ModelShape, Field("Shape of the model.")]
    space: Annotated[str, Field("Fingerprint of its latent space.")]
    limits: Annotated[Limits, Field("What it takes at most.")]
    server: Annotated[ServerInfo, Field("Its process, and the load.")]
    has_variance: Annotated[bool | None, Field("Of an encoder, whether it knows log variances; else None.")] = None


@value
class ModelInfo:
    """What a coordinator serves."""

    name: Annotated[str, Field("The model's name in requests.", wire="model_name")]
    model: Annotated[ModelShape, Field("Shape of the model, with the parameters of all stages.")]
    space: Annotated[str, Field("Fingerprint of the latent space.")]
    limits: Annotated[Limits, Field("What the coordinator takes at most.")]
    server: Annotated[ServerInfo, Field("The coordinator's process, and its load.")]
    default_sampler: Annotated[Sampler, Field("What a Sampler's unset fields mean.")]
    default_sampling: Annotated[Sampling, Field("What a Sampling's unset fields mean.")]
    default_max_new_tokens: Annotated[int, Field("What an unset max_new_tokens means.")]
    chat_frame: Annotated[
        str, Field('Text around a single user message, which replaces "{prompt}"; empty: the message as it is.')
    ]
    end_ids: Annotated[tuple[int, ...], Field("Tokens that end a text.")]
    pad_id: Annotated[int, Field("The token that fills up.")]
    stages: Annotated[tuple[StageInfo, ...], Field("The stages behind the coordinator.")]
    description: Annotated[str, Field("What the model's card says it can and cannot do; empty without one.")] = ""
