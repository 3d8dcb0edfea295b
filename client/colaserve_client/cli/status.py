"""The verbs info, status (what is served, and how the services are) and completion (the script that a shell needs)."""

from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta

import click
from click.shell_completion import get_completion_class

from colaserve_client.about import StageInfo
from colaserve_client.blocking import Client, DecoderClient, EncoderClient, PriorClient
from colaserve_client.cli import exits, options, output
from colaserve_client.cli.options import Number
from colaserve_client.errors import NotSupported

STAGES: dict[str, type[EncoderClient] | type[PriorClient] | type[DecoderClient]] = {
    "encoder": EncoderClient,
    "prior": PriorClient,
    "decoder": DecoderClient,
}
_BYTES = {"GiB": 1 << 30, "MiB": 1 << 20, "KiB": 1 << 10, "B": 1}


@click.command(cls=options.SectionedCommand)
@options.json_option
@options.client_options
def info(*, client: Client, as_json: bool) -> None:
    """Show what the server serves: the model, the defaults of requests, the limits.

    \b
      colaserve info
      colaserve info --json | python -m json.tool
    """
    found = client.info()
    model, sampler = found.model, found.default_sampler
    per_latent = output.counted(model.patch_size, "token")
    sampling = {name: value for name, value in output.plain(found.default_sampling).items() if value is not None}
    rows: list[tuple[str, object]] = [
        ("model", found.name),
        *([("about", found.description)] if found.description else []),
        ("parameters", output.scaled(model.parameters, {"B": 10**9, "M": 10**6})),
        ("latent space", found.space),
        ("latents", f"{model.latent_dim} channels, blocks of {model.block_size}, {per_latent} each"),
        ("vocabulary", f"{model.vocab_size:,}"),
        ("sampler", f"{sampler.steps} steps of {sampler.solver}, guidance {_short(sampler.guidance_scale)}"),
        ("sampling", ", ".join(f"{name.replace('_', ' ')} {_short(value)}" for name, value in sampling.items())),
        ("new tokens", f"{found.default_max_new_tokens} by default"),
        ("chat frame", repr(found.chat_frame) if found.chat_frame else "none"),
        ("longest context", f"{found.limits.max_context:,} latents"),
        ("version", found.server.version),
    ]
    output.answer(found, as_json, lambda: output.pairs(rows))


def _short(number: float | None) -> str:
    return "?" if number is None else f"{number:g}"


@click.command(cls=options.SectionedCommand)
@options.option("--wait", type=Number(0), help="Wait so many seconds at most until the server is ready.")
@options.json_option
@options.server_options
def status(*, server: options.Server, wait: float | None, as_json: bool) -> int:
    """Show the state of all services: versions, latent spaces, load.

    The load of the stages is that of the coordinator's last health check; --target may name a stage as well.

    \b
      colaserve status
      colaserve status --wait 60 && colaserve generate "The capital of France is"
      colaserve status --target prior-0:50051

    The exit code is 3 when one of them is not serving.
    """
    with server.connect(Client) as client:
        if wait is not None:
            client.wait_until_ready(wait)
        rows = _rows(client, server)
    headings = ("SERVICE", "STATE", "VERSION", "SPACE", "ON", "RUNNING", "WAITING", "KV CACHE", "UP", "ADDRESS")
    output.answer(
        [{"service": each.pop("stage"), **each} for each in output.plain(rows)],
        as_json,
        lambda: output.table(headings, [_cells(row) for row in rows]),
    )
    if not as_json:
        for backend in dict.fromkeys(row.server.backend for row in rows if row.server.backend):
            stages = ", ".join(row.stage for row in rows if row.server.backend == backend)
            click.echo(f"backend of {stages}: {backend}")
    return exits.OK if all(row.serving for row in rows) else exits.UNAVAILABLE


def _rows(client: Client, server: options.Server) -> Sequence[StageInfo]:
    """The coordinator and its stages; or the stages that run at the address."""
    serving = client.healthy()
    with suppress(NotSupported):
        found = client.info()
        row = StageInfo("coordinator", client.target, serving, found.space, found.limits, found.server)
        return [row, *found.stages]
    rows = []
    for name, kind in STAGES.items():
        with server.connect(kind) as stage, suppress(NotSupported):
            about = stage.info()
            rows.append(StageInfo(name, server.target, serving, about.space, about.limits, about.server))
    if not rows:
        raise NotSupported(f"{server.target} answers, but has no service of colaserve")
    return rows


def _cells(row: StageInfo) -> tuple[object, ...]:
    server, limits = row.server, row.limits
    used, budget = (output.scaled(count, _BYTES) for count in (server.kv_bytes_used, limits.kv_bytes))
    return (
        row.stage,
        "serving" if row.serving else "DOWN",
        server.version or "-",
        row.space or "-",
        f"{server.device} {server.dtype}".strip() or "-",
        f"{server.running} of {limits.max_running}" if limits.max_running else server.running,
        f"{server.waiting} of {limits.max_waiting}" if limits.max_waiting else server.waiting,
        f"{used} of {budget}" if limits.kv_bytes else "-",
        str(timedelta(seconds=int(server.uptime_seconds))),
        row.target,
    )


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print a script that completes verbs and options in your SHELL.

    \b
      eval "$(colaserve completion bash)"      # in ~/.bashrc
      eval "$(colaserve completion zsh)"       # in ~/.zshrc
      colaserve completion fish >~/.config/fish/completions/colaserve.fish
    """
    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(context.find_root().command, {}, "colaserve", "_COLASERVE_COMPLETE").source())
