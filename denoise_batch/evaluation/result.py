"""What an evaluation has found: figures with their intervals, and what its pictures need of single images.

evaluation.score("mixture", "seed", "pooled_psnr")   # dB
evaluation.to_json()
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from denoise_batch.evaluation import metrics
from denoise_batch.evaluation.baselines import Filter
from denoise_batch.evaluation.protocol import CONDITIONS, PAIRS

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from denoise_batch.evaluation.quality import QualityRow

LINEAR: Final = "linear MMSE"
"""The method's name."""

FIGURES: Final = ("pooled_psnr", "mean_psnr", "ssim", "foreground_rmse", "excess_cross_entropy", "accuracy")
"""The figures of `Scores`."""


@dataclass(frozen=True)
class Scores:
    """What the metrics say of one method under one condition; each is defined in `metrics`.

    Attributes:
        pooled_psnr: dB, of the mean squared error over all images.
        mean_psnr: dB, mean of the images' own, each at most 45 (`MOST_PSNR`): else one exact image would make it ∞.
        ssim: mean over the images.
        foreground_rmse: root of the mean squared error over all pixels that hold ink, in units of full ink; NaN
            where no pixel does.
        excess_cross_entropy: nats a pixel above the clean images' own entropy.
        accuracy: share of the images that a classifier of clean digits reads right (`digit_reader`); of images without
            labels, the share that it reads as it reads the clean ones.
        intervals: 95% interval of each of them over other images of the kind, NaN of a single one; see `bootstrap`.
    """

    pooled_psnr: float
    mean_psnr: float
    ssim: float
    foreground_rmse: float
    excess_cross_entropy: float
    accuracy: float
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values; one that is not finite (PSNR of an exact copy) is None."""
        content: dict[str, Any] = {name: _finite(getattr(self, name)) for name in FIGURES}
        intervals = {name: [_finite(end) for end in ends] for name, ends in self.intervals.items()}
        return content | {"intervals_95": intervals}


@dataclass(frozen=True)
class Row:
    """One method under one condition; `setting` is a classical filter's, else None."""

    condition: str
    method: str
    setting: float | None
    scores: Scores


@dataclass(frozen=True, eq=False)
class ImageErrors:
    """The images one by one: under the seed's mixture, or the pairs.

    Attributes:
        squared: method → (n,) float64, the mean squared error of each image, in units of (full ink)².
        levels: (n,) float32 σ in pixels, and (n,) float32 r in units of full ink, of each image's noise; None of pairs.
    """

    squared: dict[str, npt.NDArray[np.float64]]
    levels: tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]] | None


@dataclass(frozen=True)
class Evaluation:
    """A table.

    Attributes:
        images: how many clean images it stands on.
        description: what they are.
        seed: of the noise; None where the noisy images were given, which is the one condition `PAIRS` then.
        target_entropy: mean entropy of the clean pixels, in nats: the floor of the cross-entropy.
        clean_accuracy: of the classifier on the clean images; None where they have no labels.
        models: `method`, `architecture`, `sha256` and `folder` of each model.
        rows: condition by condition, each with its methods in the same order; the linear MMSE estimate stands only
            where σ and r are fixed and there is noise.
        quality: condition by condition, the models that say how good their images are.
        single: the images one by one, for pictures; None where nobody kept them.
    """

    images: int
    description: str
    seed: int | None
    target_entropy: float
    clean_accuracy: float | None
    models: tuple[dict[str, str], ...]
    rows: tuple[Row, ...]
    quality: tuple[QualityRow, ...] = ()
    single: ImageErrors | None = field(default=None, compare=False, repr=False)

    @property
    def methods(self) -> list[str]:
        """What the models are compared with, then the models."""
        models = [model["method"] for model in self.models]
        return [name for name in dict.fromkeys(row.method for row in self.rows) if name not in models] + models

    def row(self, condition: str, method: str) -> Row:
        """That method under that condition.

        Raises:
            KeyError: it has none.
        """
        for row in self.rows:
            if (row.condition, row.method) == (condition, method):
                return row
        raise KeyError((condition, method))

    def score(self, condition: str, method: str, name: str) -> float:
        """One figure of `Scores`; NaN where the method has none under that condition."""
        try:
            return float(getattr(self.row(condition, method).scores, name))
        except KeyError:
            return math.nan

    def of_model(self, method: str) -> dict[str, Any]:
        """What a model's card says of it, as `bundle.note_evaluation` takes it; of drawn noise alone."""
        conditions = {}
        for condition in CONDITIONS:
            scores = self.row(condition.key, method).scores.to_json()
            conditions[condition.key] = {
                **{name: condition.recipe.to_json()[name] for name in ("sigma", "half_range")},
                **{name: scores[name] for name in ("pooled_psnr", "ssim", "accuracy")},
                "noisy": _finite(self.score(condition.key, "noisy", "pooled_psnr")),
                "filter": _finite(max(self.score(condition.key, kind, "pooled_psnr") for kind in Filter)),
                "linear": _finite(self.score(condition.key, LINEAR, "pooled_psnr")),
                "interval_95": scores["intervals_95"]["pooled_psnr"],
            }
        found = {"images": self.images, "description": self.description, "seed": self.seed}
        return found | {"date": time.strftime("%Y-%m-%d"), "conditions": conditions}

    def to_json(self) -> dict[str, Any]:
        """Plain values for `json.dumps`, which knows no infinity."""
        conditions: dict[str, dict[str, Any]] = {PAIRS: {}}
        if self.seed is not None:
            conditions = {
                condition.key: condition.recipe.to_json() | {"beyond_training": condition.beyond_training}
                for condition in CONDITIONS
            }
        return {
            "images": self.images,
            "description": self.description,
            "seed": self.seed,
            "target_entropy": self.target_entropy,
            "clean_accuracy": self.clean_accuracy,
            "ssim_window": {"side": metrics.SSIM_WINDOW, "sigma": metrics.SSIM_SIGMA},
            "models": list(self.models),
            "conditions": [
                {
                    "condition": key,
                    **facts,
                    "methods": [
                        {
                            "method": row.method,
                            "setting": row.setting,
                            **row.scores.to_json(),
                        }
                        for row in self.rows
                        if row.condition == key
                    ],
                    "quality": [row.to_json() for row in self.quality if row.condition == key],
                }
                for key, facts in conditions.items()
            ],
        }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
