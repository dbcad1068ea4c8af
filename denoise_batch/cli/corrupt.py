"""`corrupt`: noisy images from clean ones."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from denoise_batch.cli.options import Column, Json, Overwrite, Verbose, example, level_range
from denoise_batch.console import print_result, rows_done
from denoise_batch.progress import Progress, duration
from denoise_batch.storage import local_path
from denoise_batch.storage.listing import skipped_lines

app = typer.Typer()


@app.command(
    short_help="Blur clean images and add white noise.",
    epilog=example(
        "denoise-batch corrupt clean.parquet noisy.parquet",
        "denoise-batch corrupt clean.parquet noisy.parquet --sigma 0.5 --noise 0.2:0.8 --seed 7",
    ),
)
def corrupt(
    source: Annotated[
        str, typer.Argument(metavar="IN", help="Parquet file, folder or glob with clean images.", show_default=False)
    ],
    out: Annotated[
        Path, typer.Argument(parser=local_path, metavar="OUT", help="Parquet file to write.", show_default=False)
    ],
    sigma: Annotated[
        str,
        typer.Option(metavar="LOW:HIGH", help="Blur's standard deviation in pixels: a range, or one number."),
    ] = "0:2",
    noise: Annotated[
        str,
        typer.Option(
            metavar="LOW:HIGH",
            help="White noise's half range, in units of full ink: r adds values from -r to r. A range, or one number.",
        ),
    ] = "0.01:1.5",
    seed: Annotated[int, typer.Option(min=0, help="Row i's noise follows from the seed and i alone.")] = 0,
    dtype: Annotated[
        Literal["float32", "uint8"],
        typer.Option(help="float32 keeps noise beyond 0..1; uint8 clips it and rounds to 255 steps, as scanners do."),
    ] = "float32",
    column: Column = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Blur clean images and add white noise to them, with levels drawn for each row.

    Writes `image` (noisy), `clean` (the original column), each row's levels as `sigma` and `noise`, and all other
    columns.
    """
    settings_levels = level_range("--sigma", sigma), level_range("--noise", noise)
    from denoise_batch.corrupt import CorruptSettings
    from denoise_batch.corrupt import corrupt as run

    settings = CorruptSettings((source,), out, *settings_levels, seed, dtype, column, overwrite)
    with Progress() as progress:
        report = run(settings, rows_done(progress, "corrupt"))
    lines = [
        f"{report.output}: {report.rows:,} noisy images ({report.dtype}), {report.bytes / 1e6:,.1f} MB, "
        f"in {duration(report.seconds)}",
    ]
    if report.bad_rows:
        lines.append(f"{report.bad_rows:,} rows have no readable image and stay null")
    if report.keys_left_out:
        lines.append(f"note: the input's folders have the keys {', '.join(report.keys_left_out)}; one file has none")
    lines += [f"note: {report.range_index}"] if report.range_index else []
    lines += skipped_lines(report.skipped_files, report.skipped)
    print_result(report.to_json(), lines, as_json=as_json)
