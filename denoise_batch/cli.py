"""The command line: parse → one call → print. What surrounds every command is in `console`; these two alone print.

torch, Ray, NumPy and PyArrow are imported inside the commands, so that `--help` answers at once. Choices are therefore
written as literals here; a test compares them with the enums that they become.
"""

from __future__ import annotations

import math
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from denoise_batch import __version__, console
from denoise_batch.cluster import leave
from denoise_batch.console import PROGRAM, bytes_done, parse_command, print_out, print_result, rows_done, session
from denoise_batch.errors import DenoiseBatchError, FlagError
from denoise_batch.progress import Progress, duration, infer_line, training_line
from denoise_batch.storage import local_path
from denoise_batch.worker_count import parse_workers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from denoise_batch.inference.report import InferProgress
    from denoise_batch.submission.dashboard import Cluster

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

# --- options that several commands share ------------------------------------------------------------------------------

Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Show Ray's own log, warnings, and a traceback with an error.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output if it exists.")]
MnistFolder = Annotated[
    Path | None,
    typer.Option(
        "--mnist",
        parser=local_path,
        metavar="FOLDER",
        help="Folder of MNIST's four IDX files, gzipped or not. Default: the environment variable DENOISE_BATCH_MNIST, "
        "then the user's cache, then a download.",
    ),
]
Column = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="The column of images. Default: `image`, else the only column that fits."),
]
Device = Annotated[
    Literal["auto", "cpu", "cuda"], typer.Option(help="Where the network runs; auto takes GPUs where there are any.")
]
Address = Annotated[
    str | None,
    typer.Option(metavar="HOST:PORT", help="Ray cluster to use. Default: RAY_ADDRESS, else Ray on this machine."),
]
PolarityChoice = Annotated[
    Literal["auto", "light-on-dark", "dark-on-light"],
    typer.Option(help="Which end of the grey scale is ink; auto finds out and stops where it is not clear."),
]
LayoutChoice = Literal["binary", "list", "tensor", "encoded"]
NumberChoice = Literal["uint8", "float16", "float32", "float64"]
ModelFolder = Annotated[
    Path | None,
    typer.Option(
        "--model",
        parser=local_path,
        metavar="FOLDER",
        help="Model folder. Default: ./denoise-model, else the model that ships with us.",
    ),
]


def _example(*lines: str) -> str:
    """An epilog; \\b keeps click from joining its lines."""
    return "\b\n" + "\n".join(("Example:" if len(lines) == 1 else "Examples:", *(f"  {line}" for line in lines)))


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


# --- commands ---------------------------------------------------------------------------------------------------------


@app.command(short_help="Everything once, end to end, in minutes.", epilog=_example("denoise-batch demo --out demo"))
def demo(
    out: Annotated[
        Path, typer.Option("--out", parser=local_path, metavar="FOLDER", help="Where everything goes.")
    ] = Path("demo"),
    mnist: MnistFolder = None,
    source: Annotated[
        Literal["auto", "mnist", "synthetic"],
        typer.Option(help="Digits to use; auto takes MNIST where it can be had, else drawn digits."),
    ] = "auto",
    rows: Annotated[int, typer.Option(min=100, metavar="N", help="Images to denoise.")] = 10_000,
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


@app.command(
    short_help="Clean digits: MNIST or drawn ones, to Parquet.",
    epilog=_example(
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


@app.command(
    short_help="Blur clean images and add white noise.",
    epilog=_example(
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
    settings_levels = _levels("--sigma", sigma), _levels("--noise", noise)
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
    print_result(report.to_json(), lines, as_json=as_json)


@app.command(
    short_help="Train a model with Ray Train.",
    epilog=_example(
        "denoise-batch train",
        "denoise-batch train --data clean.parquet --epochs 10 --workers 2 --out my-model",
        "denoise-batch train --recipe seed --epochs 50 --out seed-model",
    ),
)
def train(
    out: Annotated[
        Path, typer.Option("--out", parser=local_path, metavar="FOLDER", help="Model folder to write.")
    ] = Path("denoise-model"),
    data: Annotated[
        str | None,
        typer.Option(metavar="PARQUET", help="Clean images: a file, folder or glob. Default: MNIST's training set."),
    ] = None,
    mnist: MnistFolder = None,
    column: Annotated[
        str | None, typer.Option(metavar="NAME", help="The column of clean images. Default: found, as for infer.")
    ] = None,
    noisy_column: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Train on the noisy images in this column instead of drawn noise."),
    ] = None,
    polarity: PolarityChoice = "auto",
    init: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Start from this model's weights, say to fine-tune it. Then give an --lr."),
    ] = None,
    max_images: Annotated[
        int | None, typer.Option(metavar="N", help="Use the first N images only, validation among them.")
    ] = None,
    recipe: Annotated[
        Literal["default", "seed"],
        typer.Option(help="default: ours. seed: the original article's network and training, to the letter."),
    ] = "default",
    architecture: Annotated[
        str | None, typer.Option(metavar="NAME", help="Another network than the recipe's: seed, seed-transposed, …")
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(metavar="N", help="Passes over the images. Default: the recipe's.")
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(metavar="X", help="Train for so long instead; the schedule follows the clock.")
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(
            "--batch", "--batch-size", metavar="N", help="Images a step, over all workers. Default: the recipe's."
        ),
    ] = None,
    learning_rate: Annotated[float | None, typer.Option("--lr", metavar="X", help="Default: the recipe's.")] = None,
    sigma: Annotated[
        str | None,
        typer.Option(metavar="LOW:HIGH", help="Blur to train against, in pixels. Default: the recipe's, 0:2."),
    ] = None,
    noise: Annotated[
        str | None,
        typer.Option(metavar="LOW:HIGH", help="White noise's half range to train against. Default: 0.01:1.5."),
    ] = None,
    clipped: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="Share of the noisy images that are clipped to 8 bits, 0..1."),
    ] = None,
    patience: Annotated[
        int | None, typer.Option(metavar="N", help="Stop after N epochs without a better validation PSNR.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the weights, the order of the images and the noise.")] = 0,
    workers: Annotated[
        str | None,
        typer.Option(
            metavar="N|A:B",
            help="Training processes: N, or A to B as there is room. Default: one for each GPU, or core, at most four.",
        ),
    ] = None,
    device: Device = "auto",
    address: Address = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a finished model, or an unfinished training that differs.")
    ] = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Train a denoiser with Ray Train and write a model folder.

    An interrupted training goes on where it was when the same command is given again.
    """
    levels = [None if text is None else _levels(flag, text) for flag, text in (("--sigma", sigma), ("--noise", noise))]
    from denoise_batch.training.recipes import Device as TrainDevice
    from denoise_batch.training.recipes import TrainSettings

    settings = TrainSettings(
        output=out,
        recipe=recipe,
        data=data,
        mnist=mnist,
        column=column,
        noisy_column=noisy_column,
        polarity=polarity,
        init=init,
        max_images=max_images,
        architecture=architecture,
        epochs=epochs,
        minutes=minutes,
        batch=batch,
        learning_rate=learning_rate,
        sigma=levels[0],
        half_range=levels[1],
        clipped=clipped,
        patience=patience,
        seed=seed,
        workers=parse_workers(workers),
        device=TrainDevice(device),
        overwrite=overwrite,
        command=shlex.join([PROGRAM, *session.arguments]),
        address=address,
        verbose=verbose,
    )
    settings.resolve()
    from denoise_batch.training.train import train as run

    with Progress() as progress:
        bundle = run(
            settings,
            lambda now: progress.update(*training_line(now)),
            starting=lambda: progress.note("train: starting Ray and the workers"),
            waiting=lambda missing: progress.update(f"train: waiting for {missing}"),
        )
    print_result(
        {"model": str(bundle.folder), "architecture": bundle.architecture, "metrics": bundle.metrics},
        [f"{bundle.folder}: {bundle.architecture}", *(f"  {key}: {value}" for key, value in bundle.metrics.items())],
        as_json=as_json,
    )


@app.command(
    short_help="Denoise Parquet with Ray Data: the main job.",
    epilog=_example(
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
    model: ModelFolder = None,
    column: Column = None,
    output_column: Annotated[str, typer.Option(metavar="NAME", help="The column that is added.")] = "denoised",
    layout: Annotated[
        LayoutChoice | None, typer.Option(help="How the new column holds its images. Default: as the input does.")
    ] = None,
    dtype: Annotated[NumberChoice | None, typer.Option(help="The new column's numbers. Default: the input's.")] = None,
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
        Literal["auto", "float32"],
        typer.Option(help="Of the network's arithmetic: auto takes bfloat16 where the device is faster at it."),
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
            help="Ray actors: at most N, or A to B. Default: one for each GPU, or each core, as machines come and go.",
        ),
    ] = None,
    gpus_per_worker: Annotated[
        float, typer.Option(metavar="X", help="Share of a GPU for each actor: 0.5 puts two on each.")
    ] = 1.0,
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


@app.command(
    short_help="How good is a model: a table per noise level.",
    epilog=_example("denoise-batch evaluate --model denoise-model --figures figures"),
)
def evaluate(
    models: Annotated[
        list[Path] | None,
        typer.Option(
            "--model",
            parser=local_path,
            metavar="FOLDER",
            help="Model folder; may be given several times. Default: ./denoise-model, else the one that ships with us.",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="PARQUET", help="Clean images to degrade: a file, folder or glob. Default: MNIST's test set."
        ),
    ] = None,
    mnist: MnistFolder = None,
    column: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The column of clean images. Default: `clean`, else found, as for infer."),
    ] = None,
    polarity: PolarityChoice = "auto",
    limit: Annotated[int | None, typer.Option(metavar="N", help="Use at most N images.")] = None,
    seed: Annotated[
        int, typer.Option(min=0, help="Of the noise; keep it, and your table compares with published ones.")
    ] = 2019,
    device: Device = "auto",
    figures: Annotated[
        Path | None,
        typer.Option(
            parser=local_path,
            metavar="FOLDER",
            help="Draw pictures into this folder: one digit at six levels, others, curves.",
        ),
    ] = None,
    digit: Annotated[
        int, typer.Option(min=0, metavar="K", help="Which image the picture of six levels shows, from 0.")
    ] = 3,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Say how good a model is: PSNR, SSIM and cross-entropy for each noise level, beside classical filters."""
    from denoise_batch import storage
    from denoise_batch.bundle import find_bundle

    # What can be refused quickly, before torch loads.
    bundles = [find_bundle(model) for model in (models or (None,))]
    if data is not None:
        storage.list_inputs((data,))
    from denoise_batch.evaluation.clean_images import load_clean_images, load_prior_images
    from denoise_batch.images import Polarity

    images, description = load_clean_images(data, column, mnist_folder=mnist, limit=limit, polarity=Polarity(polarity))
    prior = load_prior_images(mnist) if data is None else None
    if figures is not None and digit >= len(images):
        raise FlagError(f"--digit {digit}: there are {len(images):,} images, from 0", hint="give a smaller number")
    from denoise_batch.evaluation.evaluate import evaluate as run
    from denoise_batch.evaluation.table import format_table

    with Progress() as progress:
        evaluation = run(
            bundles,
            images,
            description=description,
            prior=prior,
            seed=seed,
            device=device,
            progress=progress.update,
        )
        drawn: list[Path] = []
        if figures is not None:
            from denoise_batch.evaluation.evaluation_figures import draw_evaluation

            drawn = draw_evaluation(evaluation, bundles, images, figures, digit=digit, device=device)
    content = {**evaluation.to_json(), "figures": [str(path) for path in drawn]}
    lines = [
        *(f"model {bundle.folder} ({bundle.architecture})" for bundle in bundles),
        format_table(evaluation),
        *(f"drawn: {path}" for path in drawn),
    ]
    print_result(content, lines, as_json=as_json)


@app.command(
    short_help="A contact sheet: noisy, denoised, clean.",
    epilog=_example("denoise-batch preview denoised.parquet sheet.png --rows 16"),
)
def preview(
    source: Annotated[str, typer.Argument(metavar="PARQUET", help="Parquet with denoised images.", show_default=False)],
    out: Annotated[
        Path, typer.Argument(parser=local_path, metavar="PNG", help="Picture to write.", show_default=False)
    ],
    column: Annotated[
        str | None, typer.Option(metavar="NAME", help="The column of noisy images. Default: found, as for infer.")
    ] = None,
    denoised: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The column of denoised images. Default: `denoised` if it is there."),
    ] = None,
    clean: Annotated[
        str | None, typer.Option(metavar="NAME", help="The column of clean images. Default: `clean` if it is there.")
    ] = None,
    rows: Annotated[int, typer.Option(metavar="N", help="Random rows, 1 to 100.")] = 8,
    worst: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Worst rows beside them: by PSNR, by `infer --quality`, or the most changed. Default: as many.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the choice of rows.")] = 0,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Draw a contact sheet: noisy, denoised and clean images of random rows, and of the worst ones."""
    from denoise_batch.evaluation.preview import preview as run

    shown = run(source, out, column=column, denoised=denoised, clean=clean, count=rows, worst=worst, seed=seed)
    print_result(shown.to_json(), [shown.summary()], as_json=as_json)


@app.command(
    short_help="What is this path: Parquet, model or output.",
    epilog=_example(
        "denoise-batch inspect scans.parquet",
        "denoise-batch inspect denoised/ --verify",
        "denoise-batch inspect my-model",
    ),
)
def inspect(
    path: Annotated[
        str,
        typer.Argument(
            metavar="PATH", help="Parquet file, folder or glob; model folder; output of infer.", show_default=False
        ),
    ],
    verify: Annotated[
        bool, typer.Option("--verify", help="Read everything again and check it; exit 1 on a fault.")
    ] = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Say what a path is: Parquet with images, a model folder, or a finished output of infer."""
    from denoise_batch.inspection import inspect as run

    with Progress() as progress:
        found = run(path, verify=verify, progress=rows_done(progress, "verify"))
    print_result(found.to_json(), found.lines(), as_json=as_json)
    if verify and found.problems:
        raise DenoiseBatchError(
            f"{found.path}: {len(found.problems)} {'problem' if len(found.problems) == 1 else 'problems'} found",
            hint="they are listed above" if not as_json else "they are listed under `problems`",
        )


@app.command(
    short_help="Any of these commands on a Ray cluster.",
    epilog=_example(
        "denoise-batch submit --address http://localhost:8265 -- infer /shared/in.parquet /shared/out.parquet",
        "denoise-batch submit --no-wait -- train --data /shared/clean.parquet --out /shared/model",
        "denoise-batch submit --stop infer-1b9d6bcd4b3f",
    ),
    context_settings={"allow_interspersed_args": False},  # what follows the command's name is the command's
)
def submit(
    command: Annotated[
        list[str] | None,
        typer.Argument(metavar="COMMAND ...", help="The command and its arguments, behind `--`.", show_default=False),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(metavar="URL", help="The cluster's dashboard. Default: RAY_API_SERVER_ADDRESS, else RAY_ADDRESS."),
    ] = None,
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Follow the job to its end, or print its id and leave it alone.")
    ] = True,
    runtime_env: Annotated[
        Path | None,
        typer.Option(
            parser=local_path,
            metavar="YAML",
            help="Ray runtime environment: what to install for this job on machines that lack it.",
        ),
    ] = None,
    follow_id: Annotated[
        str | None, typer.Option("--follow", metavar="ID", help="Follow a job that was submitted before.")
    ] = None,
    status_id: Annotated[str | None, typer.Option("--status", metavar="ID", help="Say how a job stands.")] = None,
    stop_id: Annotated[
        str | None, typer.Option("--stop", metavar="ID", help="Stop a job; what it has done is kept.")
    ] = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Run a command on a Ray cluster through Ray Jobs, with this very code, and follow it.

    Progress, result, errors and exit code are those of the command; 143 where the job was stopped. Paths are the
    cluster's: absolute, on a file system that all its machines share.
    """
    _one_of(command, follow_id, status_id, stop_id)
    from denoise_batch.submission import dashboard, jobs, request

    if command is None:
        cluster = dashboard.reach(address)
        if follow_id is not None:
            _follow_job(cluster, follow_id)
            return
        found = jobs.stop(cluster, stop_id) if stop_id is not None else jobs.state(cluster, status_id or "")
        print_result(found.to_json(), [found.line()], as_json=as_json)
        return
    parsed = parse_command(app, [*command, "--json"] if as_json and wait and "--json" not in command else command)
    request.check_command(parsed)
    environment = request.read_runtime_env(runtime_env) if runtime_env is not None else {}
    cluster = dashboard.reach(address)
    job_id = jobs.new_id(parsed)
    jobs.submit(cluster, parsed, job_id, environment)
    if wait:
        _follow_job(cluster, job_id)
    else:
        print_result({"submission_id": job_id}, [job_id], as_json=as_json)


def _one_of(command: list[str] | None, *ids: str | None) -> None:
    """Refuses a `submit` that asks for nothing, or for several things.

    Raises:
        FlagError: it does.
    """
    if (command is not None) + sum(one is not None for one in ids) != 1:
        raise FlagError(
            "submit takes one of: a command, --follow ID, --status ID, --stop ID",
            hint="denoise-batch submit -- infer /shared/in.parquet /shared/out.parquet",
        )


def _follow_job(cluster: Cluster, job_id: str) -> None:
    """Shows a job's progress, and its result once it has one."""
    from denoise_batch.submission.following import follow

    with Progress() as progress:
        said = follow(cluster, job_id, progress, verbose=session.verbose)
    if said.result:
        print_out("\n".join(said.result))


# --- parsing ----------------------------------------------------------------------------------------------------------


def _levels(flag: str, text: str) -> tuple[float, float]:
    """`0:2` → (0, 2); `1.5` → (1.5, 1.5)."""
    low, colon, high = text.partition(":")
    try:
        levels = float(low), float(high if colon else low)
    except ValueError:
        levels = math.nan, math.nan
    if not 0.0 <= levels[0] <= levels[1] <= 1000.0:
        raise FlagError(
            f"{flag} {text} is not a range of levels",
            hint="give LOW:HIGH with 0 <= LOW <= HIGH, such as 0:2, or one number for a fixed level",
        )
    return levels


# --- running ----------------------------------------------------------------------------------------------------------


def main() -> None:
    """The console script."""
    leave(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Runs a command line and gives its exit code; the result and the errors are printed."""
    return console.run_command(app, arguments)


if __name__ == "__main__":
    main()
