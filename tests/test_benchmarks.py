"""Scripts in benchmarks/ that print tables: no figure of what was not measured, no traceback for a wrong argument."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from denoise_batch.bundle import SHIPPED_FOLDER
from denoise_batch.evaluation.protocol import CONDITIONS
from denoise_batch.precision import Precision
from denoise_batch.training.batches import Batch, with_other_content

if TYPE_CHECKING:
    from collections.abc import Callable

    Script = Callable[[str], Any]

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    """Imports a script by its name."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


@pytest.fixture
def few_digits(monkeypatch: pytest.MonkeyPatch, digits: Any) -> Callable[[Any], None]:
    """Lets a script see drawn digits in MNIST's place, and one condition."""

    def replace(module: Any) -> None:
        monkeypatch.setattr(module, "find_mnist", lambda _: None)
        monkeypatch.setattr(module, "load_mnist", lambda *_: (digits[0][:8], digits[1][:8]))
        monkeypatch.setattr(module, "CONDITIONS", CONDITIONS[:1])

    return replace


def test_a_helper_says_that_it_is_one() -> None:
    ran = subprocess.run(
        [sys.executable, FOLDER / "kill_runs.py", "--help"], capture_output=True, text=True, check=False, timeout=60
    )
    assert ran.stderr.startswith("usage: kill_runs.py drive JSON | nodes COUNT; other scripts start it")
    assert len(ran.stderr.splitlines()) == 1


def test_a_model_without_a_quality_head_is_refused(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = script("quality_head")
    folder = SHIPPED_FOLDER.with_name("seed")
    monkeypatch.setattr("sys.argv", ["quality_head.py", str(folder), "--out", str(tmp_path / "x")])
    with pytest.raises(SystemExit):
        module.main()
    assert capsys.readouterr().err.endswith("seed: its network, seed, has no quality head\n")


def test_trainings_on_pairs_that_are_compared_have_as_many_empty_images(script: Script) -> None:
    recipe = script("own_pairs").RECIPE
    clean = torch.full((recipe.batch, 28, 28), 0.5)
    empty = set()
    for every in (0, 8, 4, 2):
        batch = with_other_content(
            Batch(clean, clean.clone(), slice(0, recipe.batch), recipe.batch),
            blank_every=recipe.blank_every,
            foreign_every=recipe.foreign_every,
            foreign_still=recipe.foreign_still,
            drawn_every=every,
            generator=torch.Generator().manual_seed(0),
        )
        empty.add(int((batch.clean.amax((1, 2)) == 0).sum()))
    assert empty == {0}


def test_a_precision_without_units_is_not_measured(
    script: Script,
    few_digits: Callable[[Any], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    module = script("precisions")
    few_digits(module)
    monkeypatch.setattr(Precision, "bfloat16", lambda *_: False)
    monkeypatch.setattr(Precision, "int8", lambda self, _: self is Precision.AUTO)
    monkeypatch.setattr("sys.argv", ["precisions.py"])
    module.main()
    cells = capsys.readouterr().out.splitlines()[-1].split(" | ")
    assert [cell == "–" for cell in cells[2:]] == [True, False, True, False]


def test_the_model_is_timed_as_the_filters_are(
    script: Script,
    few_digits: Callable[[Any], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    module = script("filters")
    few_digits(module)
    monkeypatch.setattr(module, "FILTERS", dict.fromkeys(module.FILTERS, (lambda noisy, *_: noisy, (1.0,))))
    monkeypatch.setattr("sys.argv", ["filters.py", "--images", "8", "8", "8", "--chosen-on", "2", "2", "2"])
    module.main()
    lines = capsys.readouterr().out.splitlines()[-2:]
    assert [line.split(" | ")[0] for line in lines] == ["| BM3D", "| the default model"]
    assert all(float(line.split(" | ")[-1].removesuffix(" |")) > 0 for line in lines)
