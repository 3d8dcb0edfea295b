"""The verbs, where each is written and what it needs. Only this table is read until one is called."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distribution
from urllib.parse import urlsplit
from urllib.request import url2pathname

import click


@dataclass(frozen=True)
class Verb:
    """A verb that is imported when it is called."""

    section: str
    help: str  # one line
    module: str
    attribute: str
    extra: str = ""  # what to install beside the client; empty: nothing

    def load(self, name: str) -> click.Command:
        """Import it, called `name`; ModuleNotFoundError when its extra is missing."""
        found = getattr(import_module(self.module), self.attribute)
        command: click.Command = found[name] if isinstance(found, Mapping) else found
        return command


def _client(section: str, help_: str, module: str, attribute: str) -> Verb:
    return Verb(section, help_, f"colaserve_client.cli.{module}", attribute)


def _role(help_: str) -> Verb:
    return Verb(SERVE, help_, "colaserve_services.commands", "COMMANDS", "serve")


WRITE, LATENT, LOOK, SERVE, MAKE = "Write", "Work with latents", "Look", "Serve", "Make and measure"

VERBS: Mapping[str, Verb] = {
    "generate": _client(WRITE, "Continue a prompt, or many from a file.", "generate", "generate"),
    "chat": _client(WRITE, "Talk with the model.", "chat", "chat"),
    "infill": _client(WRITE, "Write the holes of a text.", "generate", "infill"),
    "fork": _client(WRITE, "Continue a prompt in several ways at once.", "generate", "fork"),
    "encode": _client(LATENT, "Turn texts into latents.", "latent", "encode"),
    "decode": _client(LATENT, "Turn latents into text.", "latent", "decode"),
    "logprobs": _client(LATENT, "Log-probabilities of a text's tokens, or of latents.", "latent", "logprobs"),
    "score": _client(LATENT, "How likely the model finds a text.", "latent", "score"),
    "interpolate": _client(LATENT, "Walk from one text to another.", "latent", "interpolate"),
    "reconstruct": _client(LATENT, "Send texts through the latent space and back.", "latent", "reconstruct"),
    "plot": Verb(LATENT, "Draw latents.", "colaserve_client.cli.latent", "plot", "plot"),
    "embed": _client(LATENT, "Turn texts into vectors.", "latent", "embed"),
    "info": _client(LOOK, "Show what a server serves.", "status", "info"),
    "status": _client(LOOK, "Show the state of all services: versions, spaces, load.", "status", "status"),
    "completion": _client(LOOK, "Print a script that completes commands in your shell.", "status", "completion"),
    "up": _role("Run everything on this machine."),
    "coordinator": _role("Run the coordinator alone."),
    "gateway": _role("Run the OpenAI gateway alone."),
    "encoder": _role("Run the encoder alone."),
    "prior": _role("Run the prior alone."),
    "decoder": _role("Run the decoder alone."),
    "pull": Verb(SERVE, "Fetch a released checkpoint.", "colaserve_services.pull", "pull", "serve"),
    "eval": Verb(MAKE, "Ask a served model questions and judge the answers.", "colaserve_eval.commands", "evaluate"),
    "bench": Verb(MAKE, "Measure a server under load.", "colaserve_bench.commands", "bench", "serve"),
    "train": Verb(MAKE, "Train a checkpoint.", "colaserve_training.commands", "train", "serve,train"),
}


def missing_extra(name: str, error: ModuleNotFoundError) -> str | None:
    """What to say when a verb's import failed; None when that is not for the lack of an extra."""
    module = (error.name or "").partition(".")[0]
    if name not in VERBS or not VERBS[name].extra or module in ("", "colaserve_client", "colaserve_eval", "colaserve"):
        return None
    extra = VERBS[name].extra
    what = f"the extras {extra.replace(',', ' and ')}" if "," in extra else f"the {extra} extra"
    return f"{name} needs {what}: {pip_line(extra)} ({module} is missing)"


def pip_line(extra: str) -> str:
    """What installs an extra from where colaserve itself was installed from: a folder, a file, or an index."""
    try:
        origin = json.loads(distribution("colaserve").read_text("direct_url.json") or "{}")
    except PackageNotFoundError:
        origin = {}
    url = origin.get("url", "")
    if "dir_info" in origin:
        editable = "--editable " if origin["dir_info"].get("editable") else ""
        return f"pip install {editable}'{url2pathname(urlsplit(url).path)}[{extra}]'"
    if "vcs_info" in origin:
        url = f"{origin['vcs_info']['vcs']}+{url}@{origin['vcs_info']['commit_id']}"
    return f"pip install 'colaserve[{extra}]{f' @ {url}' if url else ''}'"
