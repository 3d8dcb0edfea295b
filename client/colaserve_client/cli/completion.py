"""`colaserve completion`: the script that a shell needs."""

import click
from click.shell_completion import get_completion_class

VARIABLE = "_COLASERVE_COMPLETE"  # which click reads; it is made of the program's name


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
    click.echo(kind(context.find_root().command, {}, "colaserve", VARIABLE).source())
