"""`inspect`: what a path is, and whether it is sound."""

from __future__ import annotations

from typing import Annotated

import typer

from denoise_batch.cli.options import Json, Verbose, example
from denoise_batch.console import print_result, rows_done
from denoise_batch.errors import DenoiseBatchError
from denoise_batch.progress import Progress

app = typer.Typer()


@app.command(
    short_help="What is this path: Parquet, model or output.",
    epilog=example(
        "denoise-batch inspect scans.parquet",
        "denoise-batch inspect denoised/ --verify",
        "denoise-batch inspect my-model",
    ),
)
def inspect(
    path: Annotated[
        str,
        typer.Argument(
            metavar="PATH",
            help="Parquet file, folder or glob; model folder, or bounds-unet, few-levels or seed; output of infer.",
            show_default=False,
        ),
    ],
    verify: Annotated[bool, typer.Option("--verify", help="Read everything again and check it.")] = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Say what a path is: Parquet with images, a model folder, or a finished output of infer. Exit 1 on a fault."""
    from denoise_batch.inspection import inspect as run

    with Progress() as progress:
        found = run(path, verify=verify, progress=rows_done(progress, "verify"))
    print_result(found.to_json(), found.lines(), as_json=as_json)
    if found.problems:
        raise DenoiseBatchError(
            f"{found.path}: {len(found.problems)} {'problem' if len(found.problems) == 1 else 'problems'} found",
            hint="they are listed above" if not as_json else "they are listed under `problems`",
        )
