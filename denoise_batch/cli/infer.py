"""`infer`, the main job: Parquet denoised by Ray Data; `--dry-run` says what it would do."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from denoise_batch.cli.options import (
    Address,
    Column,
    Device,
    Json,
    LayoutChoice,
    Overwrite,
    PolarityChoice,
    Verbose,
    example,
    model_folder,
)
from denoise_batch.cluster.worker_count import parse_workers
from denoise_batch.console import print_result
from denoise_batch.progress import Progress, infer_line

if TYPE_CHECKING:
    from denoise_batch.inference.report import InferProgress

app = typer.Typer()


@app.command(
    short_help="Denoise Parquet with Ray Data: the main job.",
    epilog=example(
        "denoise-batch infer scans.parquet denoised.parquet",
        "denoise-batch infer scans/ denoised/ --dry-run",
        "denoise-batch infer scans/ denoised/ --model my-model --dtype uint8",
    ),
)
def infer(
    sources: Annotated[
        list[str], typer.Argument(metavar="IN", help="Parquet files, folders or globs.", show_default=False)
    ],
    out: Annotated[
        str,
        typer.Argument(
            metavar="OUT",
            help="One file in gives one file; anything else a folder. s3://bucket/prefix is always a folder.",
            show_default=False,
        ),
    ],
    model: Annotated[
        Path | None,
        typer.Option(
            "--model",
            parser=model_folder,
            metavar="FOLDER",
            help="Model folder, or bounds-unet, few-levels or seed: they ship with us. Default: ./denoise-model, "
            "else bounds-unet, and for scans of few levels of grey few-levels.",
        ),
    ] = None,
    column: Column = None,
    output_column: Annotated[str, typer.Option(metavar="NAME", help="The column that is added.")] = "denoised",
    layout: Annotated[
        LayoutChoice | None, typer.Option(help="How the new column holds its images. Default: as the input does.")
    ] = None,
    dtype: Annotated[
        Literal["uint8", "float16", "float32", "float64"] | None,
        typer.Option(help="The new column's numbers. Default: the input's."),
    ] = None,
    polarity: PolarityChoice = "auto",
    on_bad_row: Annotated[
        Literal["null", "quarantine", "fail"],
        typer.Option(help="A row whose image is null, damaged or not finite: kept with a null, left out, or an error."),
    ] = "null",
    max_bad: Annotated[
        float, typer.Option(metavar="SHARE", help="Fail when more than this share of all rows is bad, 0..1.")
    ] = 0.01,
    directory: Annotated[
        bool | None,
        typer.Option("--directory/--single-file", help="Shape of the output, where it should not follow the input's."),
    ] = None,
    compression: Annotated[
        Literal["none", "snappy", "lz4", "zstd"], typer.Option(help="Of the output's pages.")
    ] = "zstd",
    precision: Annotated[
        Literal["auto", "bfloat16", "float32"],
        typer.Option(
            help="Of the network's arithmetic, at the least: auto takes 8-bit integers or bfloat16 where the device "
            "is faster at them."
        ),
    ] = "auto",
    quality: Annotated[
        bool,
        typer.Option("--quality", help="Add what the model thinks of each image: its PSNR in dB, and the noise level."),
    ] = False,
    code: Annotated[
        bool, typer.Option("--code", help="Add the bottleneck of the seed's networks: 128 numbers an image.")
    ] = False,
    workers: Annotated[
        str | None,
        typer.Option(
            metavar="N|A:B",
            help="Ray actors: at most N, or A to B. Default: one a core, at most 16 a GPU, as machines come and go.",
        ),
    ] = None,
    gpus_per_worker: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="Share of a GPU for each actor: 0.5 puts two on each. Default: an actor a core, 16 at most.",
        ),
    ] = None,
    device: Device = "auto",
    batch: Annotated[
        int | None,
        typer.Option(
            "--batch-size", "--batch", metavar="N", help="Images a forward pass. Default: what suits the device."
        ),
    ] = None,
    address: Address = None,
    overwrite: Overwrite = False,
    dry: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done and about how long it takes; write nothing.")
    ] = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Denoise every image of Parquet files with Ray Data: the main job.

    OUT has every column of IN unchanged, in the same order of rows, and `denoised`. It appears by one rename once it
    is complete; in an object store, `_SUCCESS` says so. An interrupted run goes on where it was when the same command
    is given again.
    """
    from denoise_batch.extra_columns import ExtraColumns
    from denoise_batch.images import Polarity
    from denoise_batch.images.layouts import Layout
    from denoise_batch.inference.denoise_unit import OnBadRow
    from denoise_batch.inference.infer import InferSettings, OutputShape
    from denoise_batch.inference.infer import infer as run
    from denoise_batch.precision import Precision

    shape = OutputShape.AUTO
    if directory is not None:
        shape = OutputShape.DIRECTORY if directory else OutputShape.SINGLE_FILE
    settings = InferSettings(
        inputs=tuple(sources),
        output=out,
        model=model,
        column=column,
        output_column=output_column,
        layout=Layout(layout) if layout else None,
        dtype=dtype,
        polarity=Polarity(polarity),
        on_bad_row=OnBadRow(on_bad_row),
        shape=shape,
        compression=compression,
        precision=Precision(precision),
        extras=ExtraColumns(quality=quality, code=code),
        max_bad=max_bad,
        overwrite=overwrite,
        workers=parse_workers(workers),
        gpus_per_worker=gpus_per_worker,
        device=device,
        batch_size=batch,
        address=address,
    )
    if dry:
        from denoise_batch.inference.dry_run import dry_run

        found = dry_run(settings)
        print_result(found.to_json(), found.lines(), as_json=as_json)
        return
    with Progress() as progress:

        def show(now: InferProgress) -> None:
            if now.phase == "starting" and now.units == 0 and not started:
                started.append(now)
                progress.note(f"infer: {now.total_rows:,} rows, units of work: {now.total_units:,}; starting Ray")
            progress.update(*infer_line(now))

        started: list[InferProgress] = []
        report = run(settings, show, verbose=verbose)
    print_result(report.to_json(), report.summary_lines(), as_json=as_json)
