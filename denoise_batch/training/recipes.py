"""What a training does: recipes by name, and the settings of one training.

    settings = TrainSettings(output=Path("denoise-model"), recipe="default", epochs=10)
    recipe = settings.resolve()

No torch and no Ray here, so that a request that cannot be met is refused at once.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from denoise_batch.cluster.worker_count import WorkerCount, check_workers
from denoise_batch.errors import FlagError
from denoise_batch.precision import Precision

if TYPE_CHECKING:
    from pathlib import Path


class Optimiser(StrEnum):
    ADADELTA = "adadelta"
    ADAMW = "adamw"
    MUON = "muon"


class Schedule(StrEnum):
    """How the learning rate goes over the steps, after the warm-up."""

    CONSTANT = "constant"
    COSINE = "cosine"


class Keep(StrEnum):
    """Which epoch's weights become the model: the best mean PSNR of noisy validation images, or the last epoch."""

    BEST = "best"
    LAST = "last"


class Device(StrEnum):
    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


_NOISE = ("sigma", "half_range", "clipped", "noiseless", "clean", "gaussian", "impulse", "few_levels", "grain")


@dataclass(frozen=True)
class Recipe:
    """How a network is trained. Everything here changes the result.

    Attributes:
        name: the recipe's name.
        architecture: the network's name in `denoise_batch.models`.
        parameters: the network's parameters; what is left out takes its default.
        optimiser: Adadelta has rho 0.95 and eps 1e-7, as in Keras of 2019; AdamW has torch's defaults; Muon is
            `training.muon`.
        learning_rate: after the warm-up.
        weight_decay: AdamW's and Muon's, on weights, not on biases.
        schedule: of the learning rate.
        warm_up: steps over which the learning rate rises from 0.
        batch: images of a global step, however many workers share them.
        epochs: passes over the training images (over all their copies), or over the next `batches.MOST_EPOCH` of them.
        minutes: train for so long, whatever that makes of epochs; the schedule then follows the clock. None follows
            `epochs`.
        average: decay of the exponential moving average of the weights, which is validated and kept; 0 for none.
        balance: exponent by which images count more that less error is expected of, `objective.weight_of`; 0 counts
            all alike, as networks do that expect nothing.
        sigma: range of the blur, in pixels.
        half_range: range of the white noise's half range, in units of full ink.
        clipped: share of the images clipped to 0..1 and rounded to 8 bits after the noise.
        noiseless, clean, gaussian, impulse, few_levels, grain: shares of what is done to images, as
            `noise.NoiseRecipe` has them.
        copies: 0 draws noise afresh for every image and step; N noises N copies of every image once, at the start.
        drawn_every: where the data bring noisy images of their own, each so many-th image of a step gets drawn noise
            instead, so that the model does not forget it; 0 for none.
        blank_every: each so many-th image of a step is empty, no digit, before its noise is drawn; 0 for none. Beside
            pairs a multiple of `drawn_every`.
        foreign_every: each so many-th image of a step, beside pairs of those with drawn noise, is of something that is
            no digit (`training.foreign_content`), of which the network learns nothing but how good its own image is; 0
            for none.
        foreign_still: share of these that get neither blur nor noise.
        held_out: training images kept for validation (at most a twelfth), the last of MNIST, runs of rows all over a
            dataset. 0, as the seed has it: all of MNIST is trained on, and validated on its test images; 5,000 of a
            dataset.
        keep: which epoch's weights become the model.
        patience: stop after so many epochs without a better validation PSNR; None never.
        precision: of the matrix products.
    """

    name: str
    architecture: str
    optimiser: Optimiser
    learning_rate: float
    epochs: int
    minutes: float | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    weight_decay: float = 0.0
    schedule: Schedule = Schedule.CONSTANT
    warm_up: int = 0
    batch: int = 256
    average: float = 0.0
    balance: float = 0.0
    sigma: tuple[float, float] = (0.0, 2.0)
    half_range: tuple[float, float] = (0.01, 1.5)
    clipped: float = 0.0
    noiseless: float = 0.0
    clean: float = 0.0
    gaussian: float = 0.0
    impulse: float = 0.0
    few_levels: float = 0.0
    grain: float = 0.0
    copies: int = 0
    drawn_every: int = 0
    blank_every: int = 0
    foreign_every: int = 0
    foreign_still: float = 0.0
    held_out: int = 5000
    keep: Keep = Keep.BEST
    patience: int | None = None
    precision: Precision = Precision.AUTO

    def noise_json(self) -> dict[str, Any]:
        """The noise that is drawn, as `noise.NoiseRecipe.from_json` takes it."""
        fields = self.to_json()
        return {name: fields[name] for name in _NOISE}

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON holds them (tuples become lists)."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


_DEFAULT = Recipe(
    name="default",
    architecture="bounds-unet",
    optimiser=Optimiser.MUON,
    learning_rate=5e-3,
    weight_decay=1e-2,
    schedule=Schedule.COSINE,
    warm_up=200,
    epochs=40,
    average=0.998,
    balance=0.75,
    # A little beyond the seed's, so that its two heaviest levels are not far from what was seen.
    sigma=(0.0, 2.25),
    half_range=(0.01, 1.8),
    # Mostly the seed's noise; enough of every other kind that the network knows it when it sees it.
    clipped=0.25,
    noiseless=0.06,
    clean=0.05,
    gaussian=0.15,
    impulse=0.07,
    grain=0.1,
    drawn_every=4,
    blank_every=52,
    foreign_every=16,
    # A printed form in black and white has no noise to be known by: such are not to be rare.
    foreign_still=1 / 3,
)

RECIPES: dict[str, Recipe] = {
    "default": _DEFAULT,
    # Scans of one to four bits, most of which are faint or clean before they lose their levels.
    "few-levels": replace(
        _DEFAULT,
        name="few-levels",
        parameters={"bottleneck": 96},  # half the weights: it ships beside the default's
        sigma=(0.0, 1.5),
        half_range=(0.01, 0.8),
        clipped=1.0,
        noiseless=0.25,
        clean=0.15,
        gaussian=0.2,
        impulse=0.15,
        few_levels=1.0,
        grain=0.0,
    ),
    # To the letter. Keras of 2019 ran Adadelta at 1.0; today's default of 0.001 does not train.
    "seed": Recipe(
        name="seed",
        architecture="seed",
        optimiser=Optimiser.ADADELTA,
        learning_rate=1.0,
        epochs=500,
        copies=4,
        held_out=0,
        keep=Keep.LAST,
        precision=Precision.FLOAT32,
    ),
}
"""The recipes that `--recipe` takes."""


_REPLACE = (
    "architecture",
    "epochs",
    "minutes",
    "batch",
    "learning_rate",
    "sigma",
    "half_range",
    "clipped",
    "patience",
    "precision",
)


@dataclass(frozen=True)
class TrainSettings:
    """One training: a recipe, what differs from it, the data, the output, and where it runs.

    Attributes:
        output: the model folder to write.
        recipe: a name in `RECIPES`.
        data: Parquet files of clean digits: a file, a folder, a glob or a URI; None trains on MNIST.
        mnist: the folder of MNIST's IDX files; None looks for it, and downloads it.
        column: the column of clean images; None finds it.
        noisy_column: the column of the same images with the user's own noise; None draws all noise.
        polarity: of Parquet data, a value of `images.Polarity`; without data only `auto`.
        init: a model folder, or the name of a model that ships, whose weights the training starts from, of the recipe's
            network, with a tenth of the recipe's learning rate unless one is given; None starts afresh.
        max_images: train on the first so many images only (validation images among them).
        architecture, epochs, minutes, batch, learning_rate, sigma, half_range, clipped, patience, precision: replace
            the recipe's.
        seed: of the weights, the order of the images and the noise.
        workers: training processes, or the fewest and the most, as the cluster has room; None takes one for each GPU,
            or on CPUs one for each core, at most four.
        device: where they compute.
        resident_limit: bytes of images that a worker may hold; beyond, they stream from Parquet at every epoch. None
            takes a quarter of the memory.
        overwrite: replace a finished model folder, or an unfinished training with other settings.
        command: the command line, for the model's record.
        address: Ray cluster to run on; None as in `cluster.connect`.
        verbose: let Ray's own log through.
    """

    output: Path
    recipe: str = "default"
    data: Path | str | None = None
    mnist: Path | None = None
    column: str | None = None
    noisy_column: str | None = None
    polarity: str = "auto"
    init: Path | None = None
    max_images: int | None = None
    architecture: str | None = None
    epochs: int | None = None
    minutes: float | None = None
    batch: int | None = None
    learning_rate: float | None = None
    sigma: tuple[float, float] | None = None
    half_range: tuple[float, float] | None = None
    clipped: float | None = None
    patience: int | None = None
    precision: Precision | None = None
    seed: int = 0
    workers: WorkerCount | None = None
    device: Device = Device.AUTO
    resident_limit: int | None = None
    overwrite: bool = False
    command: str = ""
    address: str | None = None
    verbose: bool = False

    def resolve(self) -> Recipe:
        """The recipe with everything that these settings replace in it.

        Raises:
            FlagError: a value is impossible, or two do not go together.
        """
        if self.recipe not in RECIPES:
            raise FlagError(f"--recipe {self.recipe}: no such recipe", hint=f"there are: {', '.join(RECIPES)}")
        _at_least("--epochs", self.epochs, 1)
        _at_least("--batch", self.batch, 1)
        check_workers(self.workers)
        _at_least("--max-images", self.max_images, 2)
        _at_least("--patience", self.patience, 1)
        _at_least("--resident-limit", self.resident_limit, 0)
        if not 0 <= self.seed < 2**63:
            raise FlagError(f"--seed {self.seed} is impossible", hint="give a whole number from 0 to 2^63 - 1")
        if self.learning_rate is not None and not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise FlagError(f"--lr {self.learning_rate:g} is impossible", hint="give a number above 0")
        if self.minutes is not None and not (math.isfinite(self.minutes) and self.minutes > 0):
            raise FlagError(f"--minutes {self.minutes:g} is impossible", hint="give a number above 0")
        if self.minutes is not None and self.epochs is not None:
            raise FlagError("--epochs and --minutes both say when to end", hint="leave one of the two out")
        if self.clipped is not None and not 0.0 <= self.clipped <= 1.0:
            raise FlagError(f"--clipped {self.clipped:g} is not a share", hint="give a number from 0 to 1")
        from denoise_batch.images import Polarity  # PyArrow, which the command's help does without

        if self.polarity not in set(Polarity):
            raise FlagError(f"--polarity {self.polarity} is impossible", hint=f"give one of {', '.join(Polarity)}")
        self._check_data_flags()
        given = {name: getattr(self, name) for name in _REPLACE if getattr(self, name) is not None}
        if self.architecture is not None and self.architecture != RECIPES[self.recipe].architecture:
            given |= {"parameters": {}, "balance": 0.0, "foreign_every": 0}  # they do not say how good theirs are
        if self.init is not None and self.learning_rate is None:
            given["learning_rate"] = RECIPES[self.recipe].learning_rate / 10.0  # or the first steps would undo it
        if self.noisy_column is not None:
            given["copies"] = 0  # the noise is in the data; there is nothing to draw again
        return replace(RECIPES[self.recipe], **given)

    def _check_data_flags(self) -> None:
        if self.data is None:
            for flag, value in (("--column", self.column), ("--noisy-column", self.noisy_column)):
                if value is not None:
                    raise FlagError(f"{flag} {value} names a column of no data", hint="give the Parquet data as well")
            if self.polarity != "auto":
                raise FlagError(f"--polarity {self.polarity}, but no --data", hint="leave it out: MNIST's is known")
        elif self.mnist is not None:
            raise FlagError("both MNIST and Parquet data are given", hint="give one of them")
        if self.noisy_column is None:
            return
        if self.noisy_column == self.column:
            raise FlagError(
                f"--column and --noisy-column are both {self.column!r}", hint="name the clean and the noisy column"
            )
        if any(value is not None for value in (self.sigma, self.half_range, self.clipped)):
            raise FlagError(
                "--noisy-column brings its own noise: no levels can be given beside it",
                hint="leave one of the two out",
            )


def _at_least(flag: str, value: int | None, least: int) -> None:
    if value is not None and value < least:
        raise FlagError(f"{flag} {value} is impossible", hint=f"give a whole number of at least {least}")
