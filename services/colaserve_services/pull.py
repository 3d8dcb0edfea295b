"""`colaserve pull`: fetch a checkpoint from the Hugging Face Hub, and check that every byte and tensor is there."""

from pathlib import Path

import click

from colaserve_services.errors import UsageError
from colaserve_services.launch.hub import HubId, fetch
from colaserve_services.launch.options import run_or_explain
from colaserve_services.rpc import logs
from colaserve_services.rpc.settings import LogSettings

RELEASED = "ByteDance-Seed/Cola-DLM"


@click.command()
@click.argument("model", default=RELEASED, metavar="[OWNER/NAME[@REVISION]]")
@click.option(
    "--dir", "directory", type=click.Path(path_type=Path, file_okay=False), help="Where to.  [default: the Hub's cache]"
)
@click.option("--check", is_flag=True, help="Fetch nothing; check what is there.")
def pull(model: str, directory: Path | None, check: bool) -> None:
    """Fetch a checkpoint from the Hugging Face Hub and check it.

    \b
    colaserve pull                               # the released Cola-DLM, about 9 GB
    colaserve up ByteDance-Seed/Cola-DLM
    colaserve pull someone/their-model@v2 --dir models/theirs
    colaserve up --model models/theirs

    Whole files that are there are kept, and a connection that breaks is continued where it stopped. Then every file's
    size and SHA-256 is compared with the Hub's, the configs are read, and every tensor that they ask for must be in the
    files. HF_HOME says where the cache is, HF_ENDPOINT names another hub, HF_TOKEN is a token for it.
    """
    logs.configure(LogSettings(), "pull")
    run_or_explain(lambda: _pull(model, directory, check))


def _pull(model: str, directory: Path | None, check: bool) -> None:
    wanted = HubId.parse(model)
    if wanted is None:
        raise UsageError(f"{model!r}: no repository's name; expected OWNER/NAME, and a revision after an @")
    folder = fetch(wanted, directory, check)
    click.echo(f"{folder} is complete. Serve it: colaserve up {folder if directory else model}")
