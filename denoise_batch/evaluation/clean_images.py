"""The images that an evaluation degrades: MNIST's test set, or a sample of a dataset.

No torch here: what can be refused is refused at once.

    clean = load_clean_images(None)
    evaluate(models, clean.images, labels=clean.labels, description=clean.description)
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from denoise_batch import storage
from denoise_batch.errors import FlagError, RequestError
from denoise_batch.evaluation.sampling import open_dataset, sample_rows
from denoise_batch.images import (
    WHITE_AND_BLACK,
    Polarity,
    check_float_range,
    find_clean_columns,
    find_tone,
    levels_lines,
    look_at_sample,
    to_model_input,
    upright,
)
from denoise_batch.images.buffers import as_numbers

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import numpy.typing as npt

    from denoise_batch.bundle import Bundle
    from denoise_batch.extra_columns import Denoised
    from denoise_batch.images.buffers import Pixels
    from denoise_batch.storage.listing import InputFile

_DATASET_IMAGES: Final = 10_000
_SAMPLE_SEED: Final = 2019
_LABEL: Final = "label"


class Evened(NamedTuple):
    """Noisy images on white paper and in full ink, as `infer` shows them to a model that did not learn from pairs.

    Attributes:
        images: (n, 28, 28) float32, 0 = background, not clipped where the noisy ones were not.
        ink: (n,) float32, how dark each image's ink was, of full ink; None where all are full.
    """

    images: npt.NDArray[np.float32]
    ink: npt.NDArray[np.float32] | None

    def denoised(
        self, rows: slice | npt.NDArray[np.int64], run: Callable[[npt.NDArray[np.float32]], Denoised]
    ) -> Denoised:
        """What `run` makes of some of them, (m, 784) float32, as pale as these were."""
        made = run(self.images[rows].reshape(-1, 784))
        return made if self.ink is None else made.in_ink(self.ink[rows], Polarity.LIGHT_ON_DARK)


class CleanImages(NamedTuple):
    """What is evaluated on.

    Attributes:
        images: (n, 28, 28) uint8, 0 = background, n at least 1.
        labels: (n,) uint8, what digits they are, where that is known.
        description: one line that says what they are.
        notes: lines that say what is odd about them.
        noisy: (n, 28, 28) float32, the noisy ones that go with them, not clipped; None where none were asked for.
        evened: the same as models that did not learn from pairs are shown them; None where that is as they are.
    """

    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.uint8] | None
    description: str
    notes: tuple[str, ...] = ()
    noisy: npt.NDArray[np.float32] | None = None
    evened: Evened | None = None


def load_clean_images(
    path: str | None,
    column: str | None = None,
    *,
    noisy_column: str | None = None,
    own_noise: bool = False,
    mnist_folder: Path | None = None,
    limit: int | None = None,
    polarity: Polarity = Polarity.AUTO,
    seed: int = _SAMPLE_SEED,
    progress: Callable[[int, int], None] | None = None,
) -> CleanImages:
    """The images to evaluate on.

    Args:
        path: a Parquet file or dataset of clean images, `label` beside them where it is known what digits they are;
            None takes MNIST's test set.
        column: the image column, only with a path; else `clean` where there is one (`corrupt` writes it), else the one
            that is found.
        noisy_column: of the noisy images that go with them, if there are such; only with a path.
        own_noise: every model has learnt from pairs: how grey noisy images' paper and ink are is not looked at.
        mnist_folder: of the IDX files, as `mnist.find_mnist` takes it; only without a path.
        limit: images at most: the first ones of MNIST, a sample from all over a dataset. None takes all 10,000 of
            MNIST's, and as many of a dataset.
        polarity: of the dataset's images; only with a path.
        seed: of the sample.
        progress: told (bytes done, bytes in all) while MNIST is downloaded.

    Raises:
        RequestError: the path, the column or MNIST is not there or does not fit, or no row holds an image.
    """
    if limit is not None and limit < 1:
        raise FlagError(f"--limit {limit} leaves no image", hint="give a number above 0")
    if path is not None:
        if mnist_folder is not None:
            raise FlagError("both --mnist and --data are given", hint="give one of them")
        return _load_dataset(path, column, noisy_column, own_noise, limit or _DATASET_IMAGES, polarity, seed)
    if noisy_column is not None:
        raise FlagError(f"--noisy-column {noisy_column}, but no --data", hint="name the dataset that has the pairs")
    if column is not None:
        raise FlagError(f"--column {column}, but no --data", hint="name the dataset that has the column")
    if polarity is not Polarity.AUTO:
        raise FlagError(f"--polarity {polarity}, but no --data", hint="leave it out: MNIST's is known")
    from denoise_batch.digits.mnist import Split, find_mnist, load_mnist

    images, labels = load_mnist(find_mnist(mnist_folder, progress=progress), Split.TEST)
    if limit is None:
        return CleanImages(images, labels, "MNIST test set")
    return CleanImages(images[:limit], labels[:limit], f"MNIST test set, first {limit:,}")


def _load_dataset(
    path: str,
    column: str | None,
    noisy_column: str | None,
    own_noise: bool,
    limit: int,
    polarity: Polarity,
    seed: int,
) -> CleanImages:
    """A sample of a dataset; arguments and errors as above."""
    dataset = open_dataset(path)
    columns = find_clean_columns(dataset.schema, column, noisy_column, dataset.first_rows)
    if dataset.first_rows is not None:
        for place, each in enumerate(columns):
            check_float_range(dataset.first_rows[each.name], each, own_noise=place > 0)
    labelled = [_LABEL] if dataset.has_numbers(_LABEL) else []
    sample = sample_rows(dataset, columns, limit, seed=seed, numbers=labelled)
    good = np.logical_and.reduce(sample.good)
    pixels = [part[good] for part in sample.pixels]
    if len(pixels[0]) == 0:
        where = " and ".join(repr(each.name) for each in columns)
        raise RequestError(
            f"{storage.redact(path)}: none of {len(sample):,} rows read holds a usable image in {where}",
            hint="`denoise-batch inspect` shows what the columns hold",
        )
    names = [each.name for each in columns]
    bad = {name: ~rows for name, rows in zip(names, sample.good, strict=True)}
    polarity, notes = look_at_sample(dict(zip(names, pixels, strict=True)), bad, polarity)
    light = Polarity.LIGHT_ON_DARK
    clean, *noisy = (upright(part, polarity) for part in pixels)
    evened = None
    if not noisy:
        tone = find_tone(clean, light)
        clean = tone.even(clean, light)[0]
        notes += tone.lines()
    elif not own_noise:
        # As `infer` has them: of bytes what is lighter than the paper is cut off, of floats it is kept.
        given = as_numbers(noisy[0], "uint8" if columns[1].dtype == "uint8" else "float32")
        tone = find_tone(given, light)
        if tone != WHITE_AND_BLACK:
            even, ink = tone.even(given, light)
            evened = Evened(_as_shown(even), ink)
            said = tone.lines() + levels_lines(tone.level_count)
            notes += [line.replace("note: ", f"note: in column {names[1]!r} ", 1) for line in said]
    description = " and ".join(f"column {name!r}" for name in names) + f" of {storage.redact(path)}"
    if len(sample) < dataset.rows:
        description += ", a sample"
    if polarity is Polarity.EACH:
        description += ", each image's own polarity"
    notes = [*dataset.notes, *notes]
    labels: npt.NDArray[np.uint8] | None = None
    if labelled and np.isin(numbers := sample.numbers[_LABEL][good], np.arange(10)).all():
        labels = numbers.astype(np.uint8)
    elif _LABEL in dataset.schema.names:
        notes.append(f"note: column {_LABEL!r} is not used: it does not hold a digit, 0 to 9, for each image")
    images = np.rint(_as_shown(clean).clip(0.0, 1.0) * 255.0).astype(np.uint8)
    return CleanImages(images, labels, description, tuple(notes), _as_shown(noisy[0]) if noisy else None, evened)


def _as_shown(pixels: Pixels) -> npt.NDArray[np.float32]:
    """(n, 784) pixels, light on dark → (n, 28, 28) float32, as models take them."""
    return to_model_input(pixels, Polarity.LIGHT_ON_DARK).reshape(-1, 28, 28)


def trained_on(bundle: Bundle, files: Sequence[InputFile]) -> str | None:
    """A note where a model's training had some of these very files, as model.json names them; else None."""
    data = bundle.model.get("data")
    listed = data.get("files") if isinstance(data, dict) else None
    known = {json.dumps(file) for file in listed} if isinstance(listed, list) else set()
    found = [file for file in files if json.dumps([storage.redact(file.path), file.size, file.mtime_ns]) in known]
    if not found:
        return None
    what = storage.redact(found[0].path) if len(found) == 1 else f"{len(found):,} of these files"
    return f"note: {bundle.folder} was trained on {what}: on images that it has not seen it may do worse"


def load_prior_images(mnist_folder: Path | None = None) -> npt.NDArray[np.uint8]:
    """MNIST's training images, (60000, 28, 28) uint8: what the linear MMSE estimate on its test set is made from.

    Raises:
        RequestError: MNIST is not there.
    """
    from denoise_batch.digits.mnist import Split, find_mnist, load_mnist

    return load_mnist(find_mnist(mnist_folder), Split.TRAIN)[0]
