"""A demo that was interrupted, and the one that begins anew in its folder."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from denoise_batch import cli, demo
from denoise_batch.bundle import training_folder
from denoise_batch.demo import DemoSettings, run_demo
from denoise_batch.errors import FlagError, Interrupted, OutputError
from denoise_batch.inference.run_folder import work_folder
from denoise_batch.progress import Progress
from denoise_batch.storage import publishing

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("footers_read_here", "without_rays_arrow_types")


def _interrupt(*_: object, **__: object) -> None:
    raise Interrupted("interrupted", hint="")


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DemoSettings:
    """Of a small demo that Ctrl-C ends when its training has begun, before its workers start."""
    monkeypatch.setattr("denoise_batch.training.train.connect", _interrupt)  # first: it is imported from the next
    monkeypatch.setattr("denoise_batch.cluster.connect", lambda **_: nullcontext())
    monkeypatch.setattr(demo, "TRAINING_IMAGES", 300)
    return DemoSettings(tmp_path / "demo", source="synthetic", rows=100)


def run(settings: DemoSettings) -> None:
    with Progress() as progress:
        run_demo(settings, progress)


def test_an_interrupted_demo_begins_anew_with_overwrite(settings: DemoSettings) -> None:
    training = training_folder(settings.out / "model")
    for seed in (0, 0, 1):  # the same digits again, and others
        with pytest.raises(Interrupted):
            run(replace(settings, seed=seed, overwrite=True))
        assert json.loads((training / "settings.json").read_text())["seed"] == seed
    with pytest.raises(OutputError, match=r"holds an earlier demo \(train\.parquet\)$"):
        run(settings)


def test_what_an_interrupted_demo_hides_is_part_of_it(settings: DemoSettings) -> None:
    hidden = training_folder(settings.out / "model"), work_folder(settings.out / "denoised.parquet")
    for folder in hidden:
        folder.mkdir(parents=True)
        (folder / "of before").touch()
    with pytest.raises(OutputError, match=r"holds an earlier demo \(\.model\.training\)$"):
        run(settings)
    with pytest.raises(Interrupted):
        run(replace(settings, overwrite=True))
    assert not [folder for folder in hidden if (folder / "of before").exists()]


def test_a_demo_that_is_training_is_left_alone(settings: DemoSettings) -> None:
    with pytest.raises(Interrupted):
        run(settings)
    before = (settings.out / "train.parquet").stat().st_ino
    with (
        publishing.exclusive(training_folder(settings.out / "model")),
        pytest.raises(OutputError, match="another run is writing"),
    ):
        run(replace(settings, overwrite=True))
    assert (settings.out / "train.parquet").stat().st_ino == before


@pytest.mark.parametrize("given", [[], ["--overwrite"]])
def test_ctrl_c_says_what_is_left_and_how_to_begin_anew(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], given: list[str]
) -> None:
    monkeypatch.setattr(demo, "run_demo", _interrupt)
    assert cli.run(["demo", "--out", "some folder", *given]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == (
        "hint: what it made so far is left in its folder; begin anew with: "
        "denoise-batch demo --out 'some folder' --overwrite"
    )


def test_a_demo_is_not_given_fewer_rows_in_silence(settings: DemoSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("denoise_batch.digits.find_mnist", lambda *_, **__: settings.out)
    with pytest.raises(FlagError, match="MNIST has 10,000 test images"):
        run(replace(settings, source="mnist", rows=20_000))
    settings.out.symlink_to(settings.out / "nowhere")
    with pytest.raises(OutputError, match="is no folder"):
        run(settings)


def test_a_folder_of_mnist_for_drawn_digits_is_refused(settings: DemoSettings, tmp_path: Path) -> None:
    with pytest.raises(FlagError, match=r"--mnist .*, but --source synthetic draws its digits"):
        run(replace(settings, mnist=tmp_path))
    assert not settings.out.exists()
