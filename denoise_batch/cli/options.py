"""What several commands share: options and the choices they offer, ranges of levels, how examples are shown.

Choices are literals, as the enums that they become would load NumPy and PyArrow; a test compares the two.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal

import typer

from denoise_batch.errors import FlagError, ModelError
from denoise_batch.storage import local_path

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
    Literal["auto", "light-on-dark", "dark-on-light", "each"],
    typer.Option(
        help="Which end of the grey scale is ink. auto: what nine in ten of a sample have, else asks. each: what each "
        "image's own margin says."
    ),
]
LayoutChoice = Literal["binary", "list", "tensor", "encoded"]


def model_folder(text: str | Path) -> Path:
    """A model as a flag names it: a folder, or one that ships.

    Raises:
        FlagError: it is a URI.
        ModelError: it is written as the path of a folder that is not there, and would be taken for one that ships.
    """
    path = local_path(text)
    if "/" in str(text) and len(path.parts) == 1:
        from denoise_batch.bundle import shipped_folder

        if shipped_folder(path):
            raise ModelError(
                f"model folder {text}: no such file or directory", hint=f"{path} alone is the model that ships with us"
            )
    return path


def level_range(flag: str, text: str) -> tuple[float, float]:
    """`0:2` → (0, 2); `1.5` → (1.5, 1.5)."""
    low, colon, high = text.partition(":")
    try:
        levels = float(low), float(high if colon else low)
    except ValueError:
        levels = math.nan, math.nan
    if not 0.0 <= levels[0] <= levels[1] <= 1000.0:
        raise FlagError(
            f"{flag} {text} is not a range of levels",
            hint="give LOW:HIGH with 0 <= LOW <= HIGH <= 1000, such as 0:2, or one number for a fixed level",
        )
    return levels


def example(*lines: str) -> str:
    """An epilog; \\b keeps click from joining its lines."""
    return "\b\n" + "\n".join(("Example:" if len(lines) == 1 else "Examples:", *(f"  {line}" for line in lines)))
