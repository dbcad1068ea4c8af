"""The images that an evaluation degrades: MNIST's test set, or a sample of a dataset.

No torch here: what can be refused is refused at once.

    clean = load_clean_images(None)
    evaluate(models, clean.images, labels=clean.labels, description=clean.description)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from denoise_batch import storage
from denoise_batch.errors import FlagError, RequestError
from denoise_batch.evaluation.sampling import open_dataset, sample_rows
from denoise_batch.images import (
    Polarity,
    check_float_range,
    dark_on_light,
    find_image_column,
    find_polarity,
    taken_the_other_way,
    to_model_input,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import numpy.typing as npt

_DATASET_IMAGES: Final = 10_000
_SAMPLE_SEED: Final = 2019


class CleanImages(NamedTuple):
    """What is evaluated on.

    Attributes:
        images: (n, 28, 28) uint8, 0 = background, n at least 1.
        labels: (n,) uint8, what digits they are, where that is known.
        description: one line that says what they are.
        notes: lines that say what is odd about them.
    """

    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.uint8] | None
    description: str
    notes: tuple[str, ...] = ()


def load_clean_images(
    path: str | None,
    column: str | None = None,
    *,
    mnist_folder: Path | None = None,
    limit: int | None = None,
    polarity: Polarity = Polarity.AUTO,
    seed: int = _SAMPLE_SEED,
    progress: Callable[[str, float], None] | None = None,
) -> CleanImages:
    """The images to evaluate on.

    Args:
        path: a Parquet file or dataset of clean images; None takes MNIST's test set.
        column: the image column; else `clean` where there is one (`corrupt` writes it), else the one that is found.
        mnist_folder: of the IDX files, as `mnist.find_mnist` takes it.
        limit: images at most: the first ones of MNIST, a sample from all over a dataset. None takes all 10,000 of
            MNIST's, and as many of a dataset.
        polarity: of the dataset's images.
        seed: of the sample.
        progress: told what is downloaded, and the share of it.

    Raises:
        RequestError: the path, the column or MNIST is not there or does not fit, or no row holds an image.
    """
    if limit is not None and limit < 1:
        raise FlagError(f"--limit {limit} leaves no image", hint="give a number above 0")
    if path is None:
        from denoise_batch.digits.mnist import Split, find_mnist, load_mnist

        def downloaded(done: int, total: int) -> None:
            if progress is not None:
                progress(f"downloading MNIST: {done / 1e6:.1f} of {total / 1e6:.1f} MB", done / total)

        images, labels = load_mnist(find_mnist(mnist_folder, progress=downloaded), Split.TEST)
        if limit is None:
            return CleanImages(images, labels, "MNIST test set")
        return CleanImages(images[:limit], labels[:limit], f"MNIST test set, first {limit:,}")
    dataset = open_dataset(path)
    name = "clean" if column is None and "clean" in dataset.schema.names else column
    image = find_image_column(dataset.schema, name, dataset.first_rows)
    if dataset.first_rows is not None:
        check_float_range(dataset.first_rows[image.name], image)
    limit = limit or _DATASET_IMAGES
    sample = sample_rows(dataset, [image], limit, seed=seed)
    pixels = sample.pixels[0][sample.good[0]][:limit]
    if len(pixels) == 0:
        raise RequestError(f"{storage.redact(path)}: no row holds an image", hint="give a dataset with images")
    if polarity is Polarity.AUTO:
        polarity = find_polarity(pixels[:10_000])
    ink = to_model_input(pixels, polarity).reshape(-1, 28, 28)
    description = f"column {image.name!r} of {storage.redact(path)}" + (
        ", a sample" if len(sample) < dataset.rows else ""
    )
    if polarity is Polarity.EACH:
        description += ", each image's own polarity"
    notes = list(dataset.notes)
    bad = int(np.count_nonzero(~sample.good[0]))
    if bad:
        notes.append(f"note: {bad:,} of {len(sample):,} rows looked at hold no image: such are left out")
    notes += taken_the_other_way(polarity, int(dark_on_light(pixels).sum()), len(pixels))
    return CleanImages(np.rint(ink.clip(0.0, 1.0) * 255.0).astype(np.uint8), None, description, tuple(notes))


def load_prior_images(mnist_folder: Path | None = None) -> npt.NDArray[np.uint8]:
    """MNIST's training images, (60000, 28, 28) uint8: what the linear MMSE estimate on its test set is made from.

    Raises:
        RequestError: MNIST is not there.
    """
    from denoise_batch.digits.mnist import Split, find_mnist, load_mnist

    return load_mnist(find_mnist(mnist_folder), Split.TRAIN)[0]
