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
        if isinstance(found, Mapping):  # the services' verbs: name -> command, or a function that imports it
            found = found[name]
        command: click.Command = found if isinstance(found, click.Command) else found()
        return command


def _client(section: str, help_: str, module: str, attribute: str) -> Verb:
    return Verb(section, help_, f"colaserve_client.{module}", attribute)


def _service(section: str, help_: str, extra: str = "serve") -> Verb:
    return Verb(section, help_, "colaserve_services.commands", "COMMANDS", extra)


WRITE, LATENT, LOOK, SERVE, MAKE = "Write", "Work with latents", "Look", "Serve", "Make and measure"

VERBS: Mapping[str, Verb] = {
    "generate": _client(WRITE, "Continue a prompt, or many from a file.", "cli.generate", "generate"),
    "chat": _client(WRITE, "Talk with the model.", "cli.chat", "chat"),
    "infill": _client(WRITE, "Write the holes of a text.", "cli.latent", "infill"),
    "encode": _client(LATENT, "Turn texts into latents.", "cli.latent", "encode"),
    "decode": _client(LATENT, "Turn latents into text.", "cli.latent", "decode"),
    "interpolate": _client(LATENT, "Walk from one text to another.", "cli.latent", "interpolate"),
    "reconstruct": _client(LATENT, "Send texts through the latent space and back.", "cli.latent", "reconstruct"),
    "info": _client(LOOK, "Tell what a server serves.", "cli.status", "info"),
    "status": _client(LOOK, "Tell how all services are: versions, spaces, load.", "cli.status", "status"),
    "completion": _client(
        LOOK, "Print a script that completes commands in your shell.", "cli.completion", "completion"
    ),
    "up": _service(SERVE, "Run everything on this machine."),
    "coordinator": _service(SERVE, "Run the coordinator alone."),
    "gateway": _service(SERVE, "Run the OpenAI gateway alone."),
    "encoder": _service(SERVE, "Run the encoder alone."),
    "prior": _service(SERVE, "Run the prior alone."),
    "decoder": _service(SERVE, "Run the decoder alone."),
    "pull": _service(SERVE, "Fetch a released checkpoint."),
    "eval": _client(MAKE, "Ask a served model questions and judge the answers.", "eval.commands", "evaluate"),
    "bench": _service(MAKE, "Measure a server under load."),
    "train": _service(MAKE, "Train a checkpoint.", extra="serve,train"),
}


def missing_extra(name: str, error: ModuleNotFoundError) -> str | None:
    """What to tell when a verb's import failed; None when it is not for the lack of an extra."""
    module = (error.name or "").partition(".")[0]
    if name not in VERBS or not VERBS[name].extra or module in ("", "colaserve_client", "colaserve"):
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
