"""`evaluate`: how good models are, as a table and as pictures."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from denoise_batch.cli.options import Device, Json, MnistFolder, PolarityChoice, Verbose, example, model_folder
from denoise_batch.console import bytes_done, print_result
from denoise_batch.errors import FlagError, Interrupted
from denoise_batch.progress import Progress
from denoise_batch.storage import local_path

app = typer.Typer()


@app.command(
    short_help="How good is a model: a table per noise level.",
    epilog=example(
        "denoise-batch evaluate --model denoise-model --figures figures",
        "denoise-batch evaluate --data pairs.parquet --column clean --noisy-column image",
    ),
)
def evaluate(
    models: Annotated[
        list[Path] | None,
        typer.Option(
            "--model",
            parser=model_folder,
            metavar="FOLDER",
            help="Model folder, or bounds-unet, few-levels or seed, which ship with us; may be given several times. "
            "Default: ./denoise-model, else bounds-unet.",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="PARQUET",
            help="Clean images to degrade, a column `label` with them if there is one. Default: MNIST's test set.",
        ),
    ] = None,
    mnist: MnistFolder = None,
    column: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The column of clean images. Default: `clean`, else found, as for infer."),
    ] = None,
    noisy_column: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Measure on the noisy images in this column instead of drawn noise."),
    ] = None,
    polarity: PolarityChoice = "auto",
    limit: Annotated[
        int | None,
        typer.Option(metavar="N", help="Use at most N images. Default: MNIST's 10,000, or as many of a dataset."),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(min=0, help="Of the noise; keep it, and your table compares with published ones. Default: 2019."),
    ] = None,
    device: Device = "auto",
    figures: Annotated[
        Path | None,
        typer.Option(
            parser=local_path,
            metavar="FOLDER",
            help="Draw pictures into this folder: one digit at six levels, random images, the worst ones, curves; or "
            "some of the pairs.",
        ),
    ] = None,
    digit: Annotated[
        int | None,
        typer.Option(min=0, metavar="K", help="Which image the picture of six levels shows, from 0. Default: 3."),
    ] = None,
    card: Annotated[
        bool,
        typer.Option("--card", help="Write the figures into each --model: model.json, and README.md anew."),
    ] = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Say how good a model is at each noise level: PSNR, SSIM, legibility and more, beside classical filters."""
    from denoise_batch.bundle import find_bundle, shipped_folder
    from denoise_batch.bundle.card import of_pairs
    from denoise_batch.bundle.evaluated import check_card, note_evaluation
    from denoise_batch.storage import publishing
    from denoise_batch.storage.listing import list_inputs

    # What can be refused quickly, before torch loads.
    bundles = [find_bundle(model) for model in (models or (None,))]
    if card and not models:
        raise FlagError("--card, but no --model", hint="name the model folder whose card is to be made")
    if card and noisy_column is not None:
        raise FlagError(
            "--card and --noisy-column exclude each other", hint="a card has the figures of the published noise"
        )
    if digit is not None and (figures is None or noisy_column is not None):
        hint = (
            "name the folder for the pictures" if figures is None else "leave it out: the pictures of pairs have none"
        )
        other = "no --figures" if figures is None else "--noisy-column"
        raise FlagError(f"--digit {digit}, but {other}", hint=hint)
    if seed is not None and noisy_column is not None:
        raise FlagError(f"--seed {seed}, but --noisy-column", hint="leave it out: no noise is drawn beside pairs")
    if figures is not None:
        if os.path.lexists(figures) and not figures.is_dir():  # a link to nothing, too
            raise FlagError(f"--figures {figures} is no folder", hint="give a folder")
        publishing.check_parent(figures / ("metrics.png" if noisy_column is None else "pairs.png"))
    for bundle, named in zip(bundles, models or (), strict=True) if card else ():
        if shipped_folder(named):
            raise FlagError(
                f"--card: {named} is what ships with us, and its card says what was measured of it",
                hint=f"copy {bundle.folder}, and evaluate the copy",
            )
        check_card(bundle)
    files = list_inputs((data,)).files if data is not None else ()
    from denoise_batch.evaluation.clean_images import load_clean_images, load_prior_images, trained_on
    from denoise_batch.images import Polarity

    learnt_pairs = [bundle for bundle in bundles if of_pairs(bundle.model)]
    with Progress() as progress:
        clean = load_clean_images(
            data,
            column,
            noisy_column=noisy_column,
            own_noise=len(learnt_pairs) == len(bundles),
            mnist_folder=mnist,
            limit=limit,
            polarity=Polarity(polarity),
            progress=bytes_done(progress, "download MNIST"),
        )
    prior = load_prior_images(mnist) if data is None else None
    if digit is not None and digit >= len(clean.images):
        raise FlagError(
            f"--digit {digit}: there are {len(clean.images):,} images, from 0", hint="give a smaller number"
        )
    from denoise_batch.evaluation.bootstrap import FEW_IMAGES
    from denoise_batch.evaluation.evaluate import evaluate as run
    from denoise_batch.evaluation.protocol import NOISE_SEED
    from denoise_batch.evaluation.table import format_table

    with Progress() as progress:
        evaluation = run(
            bundles,
            clean.images,
            noisy=clean.noisy,
            evened=clean.evened,
            labels=clean.labels,
            description=clean.description,
            prior=prior,
            seed=NOISE_SEED if seed is None else seed,
            device=device,
            progress=progress.update,
        )
    drawn: list[Path] = []
    fault: Exception | None = None
    if figures is not None:
        from denoise_batch.evaluation.evaluation_figures import draw_evaluation

        try:
            drawn = draw_evaluation(
                evaluation,
                bundles,
                clean.images,
                figures,
                noisy=clean.noisy,
                evened=clean.evened,
                digit=digit,
                device=device,
            )
        except Interrupted:
            raise
        except Exception as error:  # a full disk, say: raised once the table, which took so long, is shown
            fault = error
    carded: list[Path] = []
    # Before the table: stdout may be a full disk, or a pipe that nobody reads any more.
    for bundle, model in zip(bundles, evaluation.models, strict=True) if card else ():
        try:
            note_evaluation(bundle, evaluation.of_model(model["method"]))
        except Interrupted:
            raise
        except Exception as error:
            fault = fault or error
        else:
            carded.append(bundle.folder / "README.md")
    notes = [*clean.notes, *filter(None, (trained_on(bundle, files) for bundle in bundles))]
    if clean.evened is not None:
        notes += [f"note: {bundle.folder} learnt from pairs, and is shown them as they are" for bundle in learnt_pairs]
    if len(clean.images) < FEW_IMAGES:
        few = f"intervals of fewer than {FEW_IMAGES} images are too narrow"
        notes.append(f"note: {few if len(clean.images) > 1 else 'one image has no interval'}")
    content = {**evaluation.to_json(), "notes": notes, "figures": [str(path) for path in drawn]}
    lines = [
        *(
            f"model {bundle.folder}: {model['method']} in the table"
            for bundle, model in zip(bundles, evaluation.models, strict=True)
        ),
        *format_table(evaluation).split("\n"),
        *notes,
        *(f"drawn: {path}" for path in drawn),
        *(f"card: {path}" for path in carded),
    ]
    print_result(content, lines, as_json=as_json)
    if fault is not None:
        raise fault
