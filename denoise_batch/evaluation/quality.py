"""Whether a model knows how good its images are: its expected PSNR and noise level against the true ones.

scores = quality_scores(expected, true, noise_level, true_level)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    Numbers = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class QualityScores:
    """How far a model is right about its images under one condition.

    Attributes:
        bias: mean of expected less true PSNR, in dB.
        error: root mean square of the same, in dB.
        rank: Spearman's rank correlation of expected and true PSNR, -1..1; NaN where all are alike.
        level_error: mean absolute error of the noise level, in units of full ink.
    """

    bias: float
    error: float
    rank: float
    level_error: float


@dataclass(frozen=True)
class QualityRow:
    """One model under one condition."""

    condition: str
    method: str
    scores: QualityScores

    def to_json(self) -> dict[str, Any]:
        """Plain values for `json.dumps`; NaN is None."""
        values = vars(self.scores)
        return {"method": self.method, **{k: v if math.isfinite(v) else None for k, v in values.items()}}


def quality_scores(expected: Numbers, true: Numbers, level: Numbers, true_level: Numbers) -> QualityScores:
    """Compares what was expected of each image with what it is.

    Args:
        expected, true: (n,) PSNR in dB.
        level, true_level: (n,) noise level, in units of full ink.
    """
    off = expected.astype(np.float64) - true
    return QualityScores(
        float(off.mean()),
        float(np.sqrt(np.square(off).mean())),
        rank_correlation(expected, true),
        float(np.abs(level.astype(np.float64) - true_level).mean()),
    )


def rank_correlation(one: Numbers, other: Numbers) -> float:
    """Spearman's rank correlation, ties at their mean rank; NaN where one side is all alike."""
    from scipy.stats import rankdata

    ranks = rankdata(one), rankdata(other)
    if any(np.ptp(rank) == 0 for rank in ranks):
        return math.nan
    return float(np.corrcoef(*ranks)[0, 1])
