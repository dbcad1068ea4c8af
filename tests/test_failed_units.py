"""Which units are charged where a worker died without a word, and which are tried again."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from fault_steps import without_ray, write_source

from denoise_batch.errors import JobFailed
from denoise_batch.forward import in_float32
from denoise_batch.inference import infer as module
from denoise_batch.inference.denoise_unit import denoise_unit
from denoise_batch.inference.infer import InferSettings, infer
from denoise_batch.inference.unit_pool import Working

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.usefixtures("footers_read_here")
UNITS = 3


def waves(tmp_path: Path, begun: set[int], dies: set[int], waits: dict[int, int]) -> tuple[list[list[int]], str]:
    """The units of each wave of a run, and its error.

    Args:
        begun: units whose workers say that they were begun.
        dies: units that take their worker along.
        waits: units that have no answer in so many first waves, because a worker died.
    """
    given: list[list[int]] = []

    def process_units(assignments: Any, options: Any, *_: Any, **__: Any) -> Iterator[Any]:
        given.append([assignment.unit.index for assignment in assignments])
        for assignment in assignments:
            unit = assignment.unit.index
            if unit in dies:
                if unit in begun:
                    yield Working(unit, 0)
            elif len(given) > waits.get(unit, 0):
                yield denoise_unit(assignment, options, in_float32(lambda pixels: np.clip(pixels, 0, 1)))

    source = write_source(tmp_path / "in", UNITS, 6, 0)
    with without_ray(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "process_units", process_units)
        with pytest.raises(JobFailed) as caught:
            infer(InferSettings((str(source),), str(tmp_path / "out")))
    return given, caught.value.message


def test_one_that_waited_is_not_charged_where_another_is_known_to_have_been_begun(tmp_path: Path) -> None:
    given, message = waves(tmp_path, begun={0}, dies={0}, waits={1: 5})
    assert given == [[0, 1, 2], [0, 1], [0, 1], [1], [1], [1]]
    assert message.startswith("1 of 3 units failed: unit 0 (")
    assert "its worker died without a word" in message


def test_one_that_dies_before_its_word_arrives_is_charged_once_it_waits_behind_no_other(tmp_path: Path) -> None:
    given, message = waves(tmp_path, begun=set(), dies={2}, waits={})
    assert given == [[0, 1, 2], [2], [2], [2]]
    assert message.startswith("1 of 3 units failed: unit 2 (")
