"""The command line: parse → one call → print; a module for each command.

What surrounds every command is in `console`; that and this package alone print. torch, Ray, NumPy and PyArrow are
imported inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from denoise_batch import __version__, console
from denoise_batch.cli import corrupt, demo, digits, evaluate, infer, inspect, preview, submit, train
from denoise_batch.cluster import leave
from denoise_batch.console import PROGRAM, print_out

if TYPE_CHECKING:
    from collections.abc import Sequence

app = typer.Typer(
    name=PROGRAM,
    add_completion=False,
    # Rich takes longer to load than everything else that --help needs.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    help="Train a denoiser for 28×28 digit images and run it over Parquet sets of any size.",
    epilog="Start with `denoise-batch demo`. Every COMMAND has --help with an example.",
)
# In the order in which --help lists them.
for command in (demo, digits, corrupt, train, infer, evaluate, preview, inspect, submit):
    app.add_typer(command.app)


@app.callback(invoke_without_command=True)
def _top(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    if version:
        print_out(f"{PROGRAM} {__version__}")
    elif context.invoked_subcommand is None:
        print_out(context.get_help())
    else:
        return
    raise typer.Exit


def main() -> None:
    """The console script."""
    leave(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Runs a command line and gives its exit code; the result and the errors are printed."""
    return console.run_command(app, arguments)
