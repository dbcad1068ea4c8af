"""`preview`: a contact sheet."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from denoise_batch.cli.options import Json, Verbose, example
from denoise_batch.console import print_result
from denoise_batch.storage import local_path

app = typer.Typer()


@app.command(
    short_help="A contact sheet: noisy, denoised, clean.",
    epilog=example("denoise-batch preview denoised.parquet sheet.png --rows 16"),
)
def preview(
    source: Annotated[str, typer.Argument(metavar="PARQUET", help="Parquet with denoised images.", show_default=False)],
    out: Annotated[
        Path,
        typer.Argument(
            parser=local_path, metavar="PNG", help="Picture to write; one that exists is replaced.", show_default=False
        ),
    ],
    column: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The column of noisy images. Default: what infer's manifest says, else found, as for infer.",
        ),
    ] = None,
    denoised: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="The column of denoised images. Default: infer's, else `denoised` if it is there."
        ),
    ] = None,
    clean: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The column of clean images. Default: `clean` if it is there. Named, it says which rows are worst.",
        ),
    ] = None,
    rows: Annotated[int, typer.Option(metavar="N", help="Random rows, 1 to 100.")] = 8,
    worst: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Worst rows beside them: by `infer --quality`, by PSNR, or the most changed. Default: as many.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the choice of rows.")] = 0,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Draw a contact sheet: noisy, denoised and clean images of random rows, and of the worst ones."""
    from denoise_batch.evaluation.preview import preview as run

    shown = run(source, out, column=column, denoised=denoised, clean=clean, count=rows, worst=worst, seed=seed)
    print_result(shown.to_json(), [shown.summary(), *shown.notes], as_json=as_json)
