"""`demo`: everything once, end to end."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from denoise_batch.cli.options import Json, MnistFolder, Overwrite, Verbose, example
from denoise_batch.console import print_result
from denoise_batch.progress import Progress
from denoise_batch.storage import local_path

app = typer.Typer()


@app.command(short_help="Everything once, end to end, in minutes.", epilog=example("denoise-batch demo --out demo"))
def demo(
    out: Annotated[
        Path, typer.Option("--out", parser=local_path, metavar="FOLDER", help="Where everything goes.")
    ] = Path("demo"),
    mnist: MnistFolder = None,
    source: Annotated[
        Literal["auto", "mnist", "synthetic"],
        typer.Option(help="Digits to use; auto takes MNIST where it can be had, else drawn digits."),
    ] = "auto",
    rows: Annotated[int, typer.Option(min=100, metavar="N", help="Images to denoise; MNIST has 10,000.")] = 10_000,
    epochs: Annotated[
        int, typer.Option(min=1, metavar="N", help="Passes over 20,000 training images; more make a better model.")
    ] = 5,
    seed: Annotated[int, typer.Option(min=0, help="Of digits, weights and noise.")] = 0,
    overwrite: Overwrite = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Everything once, end to end, in minutes: digits, train, corrupt, infer, evaluate, preview."""
    from denoise_batch.demo import DemoSettings, run_demo

    settings = DemoSettings(out, mnist, source, rows, epochs, seed, overwrite, verbose)
    with Progress() as progress:
        report = run_demo(settings, progress)
    print_result(report.to_json(), report.lines(), as_json=as_json)
