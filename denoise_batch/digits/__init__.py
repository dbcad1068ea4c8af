"""Clean digits as Parquet: MNIST, or as many drawn ones as anybody wants.

    make_digits(Path("clean.parquet"), Source.SYNTHETIC, count=1_000_000, seed=7)

Where MNIST's files come from is in `mnist`, how digits are drawn in `drawn_digits`.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from denoise_batch.digits.drawn_digits import draw_digits
from denoise_batch.digits.mnist import FOLDER_VARIABLE, MIRRORS, Split, find_mnist, load_mnist
from denoise_batch.errors import FlagError, OutputError, ran_out
from denoise_batch.storage import publishing

__all__ = [
    "FOLDER_VARIABLE",
    "MIRRORS",
    "DigitsReport",
    "Source",
    "Split",
    "draw_digits",
    "find_mnist",
    "load_mnist",
    "make_digits",
    "write_digits",
]

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    import numpy as np
    from numpy.typing import NDArray

    from denoise_batch.images.layouts import Layout

    Batch = tuple[NDArray[np.uint8], NDArray[np.uint8]]

_BATCH = 8_192  # rows made at a time: 6 MB of pixels; eight of them fill a row group
_TEST_START = 2**40  # number of the first drawn test digit: farther than anybody draws training digits


class Source(StrEnum):
    """Where clean digits come from."""

    MNIST = "mnist"
    SYNTHETIC = "synthetic"


@dataclass(frozen=True)
class DigitsReport:
    """What was written.

    Attributes:
        rows: digits in the file.
        bytes: size of the file.
        seed: of drawn digits; None for MNIST.
        mnist: the folder that MNIST was read from; None for drawn digits.
    """

    output: str
    rows: int
    bytes: int
    source: Source
    split: Split
    layout: Layout
    seed: int | None
    mnist: str | None

    def to_json(self) -> dict[str, object]:
        return dict(self.__dict__)


def check_drawn(mnist_folder: Path | None) -> None:
    """Refuses a folder of MNIST for digits that are drawn.

    Raises:
        FlagError: one is given.
    """
    if mnist_folder is not None:
        raise FlagError(
            f"--mnist {mnist_folder}, but --source synthetic draws its digits", hint="leave one of the two out"
        )


def make_digits(
    out: Path,
    source: Source = Source.MNIST,
    split: Split = Split.TRAIN,
    count: int | None = None,
    seed: int = 0,
    layout: Layout | None = None,
    mnist_folder: Path | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
    download_progress: Callable[[int, int], None] | None = None,
) -> DigitsReport:
    """Write clean digits to one Parquet file: `image` (28×28, uint8) and `label` (uint8).

    Args:
        out: the file; its folder is made if need be.
        source: MNIST, or drawn digits.
        split: MNIST's part. Drawn training and test digits of one seed never meet either.
        count: how many digits: MNIST's first so many. None is as many as MNIST's part has.
        seed: of drawn digits; 0 to 2**63 - 1.
        layout: of the images; `binary` unless told.
        mnist_folder: MNIST's IDX files; None looks where `find_mnist` says.
        overwrite: replace an existing file.
        progress: told (rows done, rows in all).
        download_progress: told (bytes done, bytes in all) where MNIST is downloaded.

    Raises:
        FlagError: count or seed is impossible, or a folder of MNIST is given for drawn digits.
        OutputError: the file exists or cannot be written.
        MissingFileError: MNIST's folder or one of its files is missing or damaged.
        NetworkError: MNIST can neither be found nor downloaded.
        ResourceExhausted: the disk is full.
    """
    from denoise_batch.images.layouts import Layout
    from denoise_batch.parquet.output_file import check_parquet_name

    layout = layout or Layout.BINARY
    publishing.check_output_file(out, overwrite=overwrite)
    check_parquet_name(out)
    if count is not None and count < 1:
        raise FlagError(f"--count {count} is impossible", hint="give a whole number of at least 1")
    note: dict[str, object] = {"command": "digits", "source": source, "split": split}
    folder = None
    if source is Source.MNIST:
        folder = find_mnist(mnist_folder, progress=download_progress)
        images, labels = load_mnist(folder, split)
        if count is not None and count > len(images):
            raise FlagError(
                f"--count {count:,}: MNIST's {split} part has {len(images):,} digits",
                hint="leave --count out, or draw any number of digits: --source synthetic",
            )
        rows = count or len(images)
        batches = _sliced(images[:rows], labels[:rows])
    else:
        check_drawn(mnist_folder)
        if not 0 <= seed < 2**63:
            raise FlagError(f"--seed {seed} is impossible", hint="give a whole number from 0 to 2^63 - 1")
        note["seed"] = seed
        rows = count or (60_000 if split is Split.TRAIN else 10_000)
        batches = _drawn(rows, seed, _TEST_START if split is Split.TEST else 0)
    size = write_digits(out, batches, rows, layout, note, overwrite=overwrite, progress=progress)
    return DigitsReport(
        str(out),
        rows,
        size,
        source,
        split,
        layout,
        seed if source is Source.SYNTHETIC else None,
        None if folder is None else str(folder),
    )


def write_digits(
    out: Path,
    batches: Iterable[Batch],
    rows: int,
    layout: Layout,
    note: dict[str, object],
    *,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Write digits as they come; `out` appears when it is complete, by one rename.

    Args:
        out: the Parquet file.
        batches: images uint8 (n, 28, 28) and labels uint8 (n,), again and again; memory holds one row group of them.
        rows: how many they are in all.
        layout: of the images.
        note: kept as JSON in the schema's metadata, under `denoise_batch`.
        overwrite: replace an existing file.
        progress: told (rows done, rows in all).

    Returns:
        the file's size in bytes.

    Raises:
        OutputError: the file exists or cannot be written.
        ResourceExhausted: the disk is full.
    """
    import pyarrow as pa

    from denoise_batch.images import encode, output_column
    from denoise_batch.parquet.output_file import OutputFile

    publishing.check_output_file(out, overwrite=overwrite)
    column = output_column(None, "image", layout)
    schema = pa.schema([column.field, pa.field("label", pa.uint8())], {"denoise_batch": json.dumps(note)})
    done = 0
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
            built = Path(folder) / out.name
            with OutputFile(built, schema, [column], compression="zstd") as file:
                for images, labels in batches:
                    arrays = [encode(images, None, column), pa.array(labels)]
                    file.write(pa.RecordBatch.from_arrays(arrays, schema=schema))
                    done += len(images)
                    if progress is not None:
                        progress(done, rows)
                written = file.finish()
            publishing.publish(built, out, overwrite=overwrite)
    except OSError as error:
        exhausted = ran_out(error, out)
        if exhausted is not None:
            raise exhausted from error
        raise OutputError(f"{out} cannot be written: {error.strerror or error}", hint="give another output") from error
    return written.bytes


def _sliced(images: NDArray[np.uint8], labels: NDArray[np.uint8]) -> Iterator[Batch]:
    for first in range(0, len(images), _BATCH):
        yield images[first : first + _BATCH], labels[first : first + _BATCH]


def _drawn(rows: int, seed: int, start: int) -> Iterator[Batch]:
    for first in range(0, rows, _BATCH):
        yield draw_digits(min(_BATCH, rows - first), seed, start + first)
