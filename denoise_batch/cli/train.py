"""`train`: a model folder, by Ray Train."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from denoise_batch.cli.options import (
    Address,
    Device,
    Json,
    MnistFolder,
    PolarityChoice,
    Verbose,
    example,
    level_range,
    model_folder,
)
from denoise_batch.cluster.worker_count import parse_workers
from denoise_batch.console import PROGRAM, print_result, session
from denoise_batch.progress import Progress, epoch_note, training_line
from denoise_batch.storage import local_path

if TYPE_CHECKING:
    from denoise_batch.training.progress import TrainProgress

app = typer.Typer()


@app.command(
    short_help="Train a model with Ray Train.",
    epilog=example(
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
        str | None,
        typer.Option(metavar="NAME", help="The column of clean images. Default: `clean`, else found, as for infer."),
    ] = None,
    noisy_column: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Train on the noisy images in this column; default recipe: drawn noise for one in four.",
        ),
    ] = None,
    polarity: PolarityChoice = "auto",
    init: Annotated[
        Path | None,
        typer.Option(
            parser=model_folder,
            metavar="FOLDER",
            help="Start from this model's weights, at a tenth of the recipe's --lr: your own, or one that ships.",
        ),
    ] = None,
    max_images: Annotated[
        int | None, typer.Option(metavar="N", help="Use the first N images only, validation among them.")
    ] = None,
    recipe: Annotated[
        Literal["default", "few-levels", "seed"],
        typer.Option(
            help="default: ours. few-levels: ours for scans of 2 to 16 levels of grey, as faxes are. "
            "seed: the original article's network and training, to the letter."
        ),
    ] = "default",
    architecture: Annotated[
        str | None, typer.Option(metavar="NAME", help="Another network than the recipe's: seed, seed-transposed, …")
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Passes over the images, at most 2 million of them each. Default: the recipe's."
        ),
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(metavar="X", help="Train for so long instead; the schedule follows the clock.")
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(
            "--batch",
            "--batch-size",
            metavar="N",
            help="Images a step, over all workers. Default: the recipe's. For long trainings of large sets: 1024 on "
            "CPUs, 2048 on a GPU.",
        ),
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option("--lr", metavar="X", help="Default: the recipe's, or a tenth of it with --init.")
    ] = None,
    sigma: Annotated[
        str | None,
        typer.Option(metavar="LOW:HIGH", help="Blur to train against, in pixels. Default: the recipe's."),
    ] = None,
    noise: Annotated[
        str | None,
        typer.Option(metavar="LOW:HIGH", help="White noise's half range to train against. Default: the recipe's."),
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

    An interrupted training goes on where it was when the same command is given again; a finished one is left as it is.
    """
    levels = [
        None if text is None else level_range(flag, text) for flag, text in (("--sigma", sigma), ("--noise", noise))
    ]
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

    notes: list[str] = []
    before: list[bool] = []
    warned: list[str] = []
    with Progress() as progress:

        def noted(note: str) -> None:
            progress.note(note)  # before minutes or hours of training, which one may want to stop
            notes.append(note)

        def show(now: TrainProgress) -> None:
            note = None if warned else epoch_note(now, minutes)
            if note is not None:
                progress.note(note)
                warned.append(note)
            progress.update(*training_line(now))

        bundle = run(
            settings,
            show,
            noted=noted,
            starting=lambda: progress.note("train: starting Ray and the workers"),
            waiting=lambda missing: progress.update(f"train: waiting for {missing}"),
            finished=lambda: before.append(True),
        )
    recorded = bundle.model["data"]
    left_out = recorded.get("rows_left_out", 0)
    if left_out:
        columns = [recorded[key] for key in ("column", "noisy_column") if recorded.get(key)]
        notes.append(
            f"note: {left_out:,} of {min(recorded['rows'], max_images or recorded['rows']):,} rows were left out: "
            f"no image that can be used in {' or '.join(map(repr, columns))}"
        )
    print_result(
        {
            "model": str(bundle.folder),
            "architecture": bundle.architecture,
            "metrics": bundle.metrics,
            "rows_left_out": left_out,
            "notes": notes,
            "already_complete": bool(before),
        },
        [
            f"{bundle.folder}: {bundle.architecture}",
            *(f"  {key}: {_short(value)}" for key, value in bundle.metrics.items()),
            *notes,
            *(["it is complete already: nothing was left to do"] if before else []),
        ],
        as_json=as_json,
    )


def _short(value: object) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)
