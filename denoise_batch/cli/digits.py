"""`digits`: clean digits, MNIST or drawn ones, to Parquet."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from denoise_batch.cli.options import Json, LayoutChoice, MnistFolder, Overwrite, Verbose, example
from denoise_batch.console import bytes_done, print_result, rows_done
from denoise_batch.progress import Progress
from denoise_batch.storage import local_path

app = typer.Typer()


@app.command(
    short_help="Clean digits: MNIST or drawn ones, to Parquet.",
    epilog=example(
        "denoise-batch digits clean.parquet --split test",
        "denoise-batch digits drawn.parquet --source synthetic --count 1000000 --seed 7",
    ),
)
def digits(
    out: Annotated[
        Path, typer.Argument(parser=local_path, metavar="OUT", help="Parquet file to write.", show_default=False)
    ],
    source: Annotated[
        Literal["mnist", "synthetic"],
        typer.Option(help="mnist: the real ones. synthetic: drawn digits, any number of them, without a network."),
    ] = "mnist",
    mnist: MnistFolder = None,
    split: Annotated[
        Literal["train", "test"], typer.Option(help="MNIST's 60,000 training or 10,000 test images.")
    ] = "train",
    count: Annotated[
        int | None, typer.Option(metavar="N", help="Only the first N. Default: as many as MNIST has.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of drawn digits: the same seed draws the same digits.")] = 0,
    layout: Annotated[
        LayoutChoice, typer.Option(help="How a row holds its image; binary is fixed_size_binary(784), the fast one.")
    ] = "binary",
    overwrite: Overwrite = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Write clean digits to Parquet, with columns `image` (uint8) and `label`."""
    from denoise_batch.digits import Source, Split, make_digits
    from denoise_batch.images.layouts import Layout

    with Progress() as progress:
        report = make_digits(
            out,
            Source(source),
            Split(split),
            count,
            seed,
            Layout(layout),
            mnist,
            overwrite,
            rows_done(progress, "digits"),
            bytes_done(progress, "download MNIST"),
        )
    origin = f"MNIST in {report.mnist}" if report.mnist else f"drawn, seed {report.seed}"
    lines = [f"{report.output}: {report.rows:,} digits ({report.split}), {report.bytes / 1e6:,.1f} MB, {origin}"]
    print_result(report.to_json(), lines, as_json=as_json)
