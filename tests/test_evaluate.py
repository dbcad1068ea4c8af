"""The protocol run on a few drawn images and on networks that need no training."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from denoise_batch import cli
from denoise_batch.bundle import SHIPPED_FOLDER, read_bundle
from denoise_batch.bundle.evaluated import check_card, note_evaluation
from denoise_batch.denoiser import Denoiser
from denoise_batch.digits import Split, find_mnist, load_mnist
from denoise_batch.digits.drawn_digits import draw_digits
from denoise_batch.errors import (
    ColumnError,
    FlagError,
    MissingFileError,
    ModelError,
    NetworkError,
    OutputError,
    RequestError,
)
from denoise_batch.evaluation import metrics
from denoise_batch.evaluation.clean_images import Evened, load_clean_images, trained_on
from denoise_batch.evaluation.digit_reader import load_reader
from denoise_batch.evaluation.evaluate import _scores, evaluate
from denoise_batch.evaluation.evaluation_figures import draw_evaluation
from denoise_batch.evaluation.protocol import CONDITIONS, MIXTURE, degrade_images, drawn_levels
from denoise_batch.evaluation.result import LINEAR, Evaluation
from denoise_batch.evaluation.table import format_table
from denoise_batch.images import Polarity, find_tone
from denoise_batch.models.network import DenoisingNetwork
from denoise_batch.precision import Precision
from denoise_batch.storage import publishing
from denoise_batch.storage.listing import list_inputs
from denoise_batch.training.data import open_parquet
from denoise_batch.training.recipes import TrainSettings

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import torch

pytestmark = pytest.mark.usefixtures("footers_read_here", "ink_as_it_is")


class _Clamp(DenoisingNetwork):
    """A denoiser that only clips."""

    def forward(self, noisy: torch.Tensor) -> torch.Tensor:
        return noisy.clamp(0.0, 1.0)


class _ClampBundle:
    def __init__(self, folder: str = "clamp", sha256: str = "ab" * 32) -> None:
        self.architecture = "clamping"
        self.sha256 = sha256
        self.folder = folder
        self.has_quality = False
        self.most_blur = None
        self.model: dict[str, Any] = {"noise": {"source": "drawn"}}

    def load(self, device: str = "cpu") -> torch.nn.Module:
        return _Clamp().to(device)


def bundles(*given: Any) -> Any:
    return list(given) or [_ClampBundle()]


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    generator = np.random.default_rng(0)
    drawn = np.zeros((24, 28, 28), np.uint8)
    for image in drawn:
        x = generator.integers(5, 20)
        image[4:24, x : x + 3] = generator.integers(100, 256, (20, 3))
    return drawn


@pytest.fixture(scope="module")
def evaluation(images: np.ndarray) -> Evaluation:
    return evaluate(bundles(), images, description="bars")


def test_every_condition_has_every_method(evaluation: Evaluation) -> None:
    assert evaluation.methods == ["noisy", "median", "gaussian", "wiener", "clamp"]
    assert len(evaluation.rows) == len(CONDITIONS) * 5
    assert evaluation.row("i=1", "median").setting == 3
    assert evaluation.row("i=1", "clamp").setting is None


def test_scores_are_those_of_the_metrics(evaluation: Evaluation, images: np.ndarray) -> None:
    clean = images.astype(np.float32) / np.float32(255)
    noisy = degrade_images(clean, CONDITIONS[0])
    scores = evaluation.row("mixture", "noisy").scores
    assert scores.pooled_psnr == pytest.approx(metrics.psnr_from_mse(metrics.mse(clean, noisy).mean()), abs=1e-9)
    each = metrics.psnr_from_mse(metrics.mse(clean, noisy))
    assert scores.mean_psnr == pytest.approx(np.minimum(each, 45.0).mean(), abs=1e-9)
    assert evaluation.score("i=0", "noisy", "mean_psnr") == 45.0  # one exact image would make it infinite
    assert scores.ssim == pytest.approx(metrics.ssim(clean, noisy).mean(), abs=1e-9)
    excess = (metrics.binary_cross_entropy(clean, noisy) - metrics.target_entropy(clean)).mean()
    assert scores.excess_cross_entropy == pytest.approx(excess, abs=1e-9)
    ink = clean > 0
    assert scores.foreground_rmse == pytest.approx(np.sqrt(np.square(clean - noisy)[ink].mean()), rel=1e-6)
    clipped = metrics.psnr_from_mse(metrics.mse(clean, noisy.clip(0, 1)).mean())
    assert evaluation.row("mixture", "clamp").scores.pooled_psnr == pytest.approx(clipped, abs=1e-6)


def test_a_models_card_takes_what_was_found(evaluation: Evaluation, model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    for _ in range(2):  # a second one takes the first one's place
        note_evaluation(read_bundle(folder), evaluation.of_model("clamp"))
    card, noted = (folder / "README.md").read_text(), read_bundle(folder).model["evaluation"]
    scores = evaluation.row("i=1", "clamp").scores
    low, high = scores.intervals["pooled_psnr"]
    noisy = evaluation.score("i=1", "noisy", "pooled_psnr")
    best = max(evaluation.score("i=1", kind, "pooled_psnr") for kind in ("median", "gaussian", "wiener"))
    line = (
        f"| i=1 |  | 0.5 | 0.4 | {noisy:.2f} | {best:.2f} | – | {scores.pooled_psnr:.2f} | {low:.2f} to {high:.2f} | "
    )
    assert card.count(f"{line}{scores.ssim:.3f} | ") == 1
    assert re.search(
        r"\*\*The noisy images themselves, a filter's or the linear estimate are better than this model's: .*i=1", card
    )
    assert f"On {evaluation.images} images (bars), noise of seed 2019" in card
    assert "| mixture | the original article's, all levels | 0 to 2 | 0.01 to 1.5 | " in card
    assert re.search(r"\| i=0 \|  \| 0 \| 0 \| ∞ \| [0-9.]+ \| – \| ∞ \| ∞ to ∞ \| ", card)
    assert list(noted["conditions"]) == [condition.key for condition in CONDITIONS]


def test_a_card_that_cannot_be_made_is_named_before_anything_is_evaluated(model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    check_card(read_bundle(folder))
    content = json.loads((folder / "model.json").read_text())
    del content["versions"]  # nothing but the card needs it
    (folder / "model.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match=r"its card cannot be made .*'versions'"):
        check_card(read_bundle(folder))


def test_a_number_that_json_has_not_is_named_before_anything_is_evaluated(model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    content = json.loads((folder / "model.json").read_text())
    content["metrics"] |= {"x": 0}
    (folder / "model.json").write_text(json.dumps(content).replace('"x": 0', '"x": 1e999'))
    with pytest.raises(ModelError, match="its card cannot be made"):
        check_card(read_bundle(folder))


def test_a_model_that_was_replaced_meanwhile_is_left_as_it_is(
    evaluation: Evaluation, model_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    evaluated = read_bundle(folder)
    shutil.rmtree(folder)
    shutil.copytree(SHIPPED_FOLDER, folder)
    with pytest.raises(ModelError, match="was replaced while it was evaluated"):
        note_evaluation(evaluated, evaluation.of_model("clamp"))
    assert read_bundle(folder).model == read_bundle(SHIPPED_FOLDER).model


def test_a_card_that_cannot_be_written_is_named(
    evaluation: Evaluation, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = read_bundle(shutil.copytree(model_folder, tmp_path / "model"))

    def full_disk(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(publishing, "write_file", full_disk)
    with pytest.raises(OutputError, match="model cannot be written: No space left on device"):
        note_evaluation(bundle, evaluation.of_model("clamp"))


@pytest.mark.parametrize("options", [[], ["--json"], ["--card"]])
def test_what_was_measured_is_not_lost_with_the_pictures(
    evaluation: Evaluation,
    images: np.ndarray,
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
) -> None:
    write = publishing.write_file

    def no_room_for_pictures(path: Path, content: bytes, **how: Any) -> None:
        if path.suffix == ".png":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, content, **how)

    monkeypatch.setattr(publishing, "write_file", no_room_for_pictures)
    monkeypatch.setattr("denoise_batch.evaluation.evaluate.evaluate", lambda *_, **__: evaluation)
    model = shutil.copytree(model_folder, tmp_path / "model")
    arguments = ["evaluate", "--model", model, "--data", _write(tmp_path / "a.parquet", clean=images)]
    assert cli.run([*map(str, [*arguments, "--figures", tmp_path / "figures"]), *options]) == 1
    shown = capsys.readouterr()
    assert shown.err.splitlines()[-2] == f"error: {tmp_path}/figures/levels.png: the disk is full"
    if options == ["--json"]:
        content = json.loads(shown.out)
        assert (content["images"], content["figures"]) == (24, [])
    else:
        assert format_table(evaluation) in shown.out
        assert "drawn: " not in shown.out
    assert ("evaluation" in read_bundle(model).model) == (options == ["--card"])


@pytest.mark.parametrize("gone", ["full disk", "closed pipe"])
def test_a_card_is_not_lost_with_stdout(
    evaluation: Evaluation,
    images: np.ndarray,
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    gone: str,
) -> None:
    if gone == "full disk":
        out = open("/dev/full", "w")  # noqa: PTH123, SIM115
    else:
        read, write = os.pipe()
        os.close(read)
        out = os.fdopen(write, "w")
    monkeypatch.setattr("sys.stdout", out)
    monkeypatch.setattr("denoise_batch.evaluation.evaluate.evaluate", lambda *_, **__: evaluation)
    model = shutil.copytree(model_folder, tmp_path / "model")
    data = _write(tmp_path / "a.parquet", clean=images)
    assert cli.run(["evaluate", "--model", str(model), "--data", data, "--card"]) != 0
    assert "evaluation" in read_bundle(model).model
    assert "noise of seed 2019" in (model / "README.md").read_text()
    with contextlib.suppress(OSError):  # what is left to write
        out.close()


def test_a_table_is_not_lost_with_a_card(
    evaluation: Evaluation,
    images: np.ndarray,
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    first, second = (shutil.copytree(model_folder, tmp_path / name) for name in ("first", "second"))
    write = publishing.write_file

    def no_room_in_first(path: Path, content: bytes, **how: Any) -> None:
        if path.parent == first:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, content, **how)

    monkeypatch.setattr(publishing, "write_file", no_room_in_first)
    two = replace(evaluation, models=[*evaluation.models, *evaluation.models])
    monkeypatch.setattr("denoise_batch.evaluation.evaluate.evaluate", lambda *_, **__: two)
    arguments = ["--model", str(first), "--model", str(second), "--data", _write(tmp_path / "a.parquet", clean=images)]
    assert cli.run(["evaluate", *arguments, "--card"]) == 2
    shown = capsys.readouterr()
    assert format_table(two) in shown.out
    assert f"card: {second}/README.md" in shown.out
    assert f"card: {first}" not in shown.out
    assert shown.err.splitlines()[-2] == f"error: {first} cannot be written: No space left on device"
    assert ["evaluation" in read_bundle(model).model for model in (first, second)] == [False, True]


def test_accuracy_is_the_share_that_is_read_right(evaluation: Evaluation, images: np.ndarray) -> None:
    reader = load_reader()
    clean = images.astype(np.float32) / np.float32(255)
    noisy, alike = degrade_images(clean, CONDITIONS[0]), reader.read(clean)
    assert evaluation.row("mixture", "noisy").scores.accuracy == pytest.approx(
        (reader.read(noisy.clip(0, 1)) == alike).mean()
    )
    assert (evaluation.clean_accuracy, evaluation.score("i=0", "noisy", "accuracy")) == (None, 1.0)
    assert "Without labels" in format_table(evaluation)
    other = ((alike + np.arange(len(alike)) % 2) % 10).astype(np.uint8)  # every other one is wrong
    labelled = evaluate([], images, labels=other)
    assert labelled.clean_accuracy == labelled.score("i=0", "noisy", "accuracy") == 0.5
    assert "0.5000 of the clean images right" in format_table(labelled)


def test_the_reader_that_ships_reads_digits() -> None:
    """Drawn ones, which it has never seen, and MNIST's test images where they are."""
    drawn, labels = draw_digits(500, seed=11)
    assert (load_reader().read(drawn / np.float32(255)) == labels).mean() > 0.95
    if os.environ.get("DENOISE_BATCH_MNIST"):
        images, labels = load_mnist(find_mnist(None), Split.TEST)
        assert (load_reader().read(images[:2000] / np.float32(255)) == labels[:2000]).mean() > 0.98


def test_intervals_hold_the_figures_and_shrink_with_more_images(evaluation: Evaluation, images: np.ndarray) -> None:
    few = evaluate(bundles(), images[:6], description="bars")
    for name in ("pooled_psnr", "mean_psnr", "ssim", "foreground_rmse", "excess_cross_entropy"):
        scores = evaluation.row("mixture", "clamp").scores
        low, high = scores.intervals[name]
        assert low < getattr(scores, name) < high
        narrower = few.row("mixture", "clamp").scores.intervals[name]
        assert high - low < narrower[1] - narrower[0]
    assert evaluation.row("i=0", "noisy").scores.intervals["pooled_psnr"] == (math.inf, math.inf)


def test_of_one_image_the_interval_is_not_known(evaluation: Evaluation, model_folder: Path, tmp_path: Path) -> None:
    scores = _scores(np.full((7, 1), 0.5))
    one = replace(evaluation, images=1, rows=tuple(replace(row, scores=scores) for row in evaluation.rows))
    lines = format_table(one).splitlines()
    assert lines[0].startswith("1 image: bars")
    place = next(place for place, line in enumerate(lines) if line.startswith("95% interval"))
    assert lines[place + 5].split() == ["clamp", *["–"] * 8]
    content = json.loads(json.dumps(one.to_json(), allow_nan=False))
    assert content["conditions"][0]["methods"][-1]["intervals_95"]["pooled_psnr"] == [None, None]
    folder = shutil.copytree(model_folder, tmp_path / "model")
    note_evaluation(read_bundle(folder), one.of_model("clamp"))
    card = (folder / "README.md").read_text()
    rows = re.findall(r"^\| [a-z0-9=]+ \|.* \| – \| [-0-9.]+ \| [0-9.]+% \|$", card, re.MULTILINE)
    assert len(rows) == len(CONDITIONS)
    assert "On 1 image (bars), " in card


def test_a_download_of_mnist_is_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def download(_: Path | None, progress: Callable[[int, int], None]) -> Path:
        progress(5_000_000, 11_600_000)
        raise NetworkError("cut off", hint="")

    monkeypatch.setattr("denoise_batch.digits.mnist.find_mnist", download)
    assert cli.run(["evaluate", "--model", "seed"]) == NetworkError.exit_code
    assert capsys.readouterr().err.startswith("download MNIST: 5.0 of 11.6 MB\nerror: cut off")


@pytest.mark.parametrize(
    ("count", "noted"),
    [
        (1, ["note: one image has no interval"]),
        (29, ["note: intervals of fewer than 30 images are too narrow"]),
        (30, []),
    ],
)
def test_few_images_are_noted(
    evaluation: Evaluation,
    images: np.ndarray,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    count: int,
    noted: list[str],
) -> None:
    monkeypatch.setattr("denoise_batch.evaluation.evaluate.evaluate", lambda *_, **__: evaluation)
    data = _write(tmp_path / "a.parquet", clean=np.resize(images, (count, 28, 28)))
    assert cli.run(["evaluate", "--model", "seed", "--data", data, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["notes"] == noted


def test_the_linear_estimate_stands_where_the_noise_is_known(images: np.ndarray) -> None:
    found = evaluate([], images, prior=np.concatenate([images] * 40))
    assert {row.condition for row in found.rows if row.method == LINEAR} == {"i=1", "i=2", "i=3", "i=4", "i=5", "faint"}
    assert found.score("i=2", LINEAR, "pooled_psnr") > found.score("i=2", "wiener", "pooled_psnr")
    assert math.isnan(found.score("mixture", LINEAR, "pooled_psnr"))
    line = next(line for line in format_table(found).splitlines() if line.startswith("linear MMSE"))
    assert line.split()[-8:-5] == ["–", "–", "–"]


def test_two_runs_print_the_same_table(evaluation: Evaluation, images: np.ndarray) -> None:
    again = evaluate(bundles(), images, description="bars")
    assert format_table(again) == format_table(evaluation)
    assert again.row("mixture", "clamp").scores == evaluation.row("mixture", "clamp").scores


def test_another_seed_prints_another(evaluation: Evaluation, images: np.ndarray) -> None:
    assert evaluate(bundles(), images, description="bars", seed=1).rows != evaluation.rows


def test_json_is_strict_and_infinity_is_null(evaluation: Evaluation) -> None:
    assert evaluation.row("i=0", "noisy").scores.pooled_psnr == math.inf
    content = json.loads(json.dumps(evaluation.to_json(), allow_nan=False))
    level0 = next(condition for condition in content["conditions"] if condition["condition"] == "i=0")
    assert level0["methods"][0]["pooled_psnr"] is None
    assert content["models"] == [
        {"method": "clamp", "architecture": "clamping", "sha256": "ab" * 32, "folder": "clamp"}
    ]


def test_the_table_is_aligned_and_says_what_is_extrapolated(evaluation: Evaluation) -> None:
    text = format_table(evaluation)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 120
    assert "i=4*" in text
    assert "beyond the original article's range" in text
    assert "24 images: bars; noise seed 2019" in lines[0]
    rows = [line for line in lines if line.startswith(("noisy input", "clamp", "Median"))]
    assert {len(line) for line in rows} == {16 + 8 * 10}  # the seed's conditions, and as many other kinds


def test_names_forge_no_lines_of_the_table(evaluation: Evaluation) -> None:
    forged = replace(evaluation, description="column 'image' of a\nb\tc\x1b.parquet")
    lines = format_table(forged).split("\n")
    assert len(lines) == len(format_table(evaluation).split("\n"))
    assert lines[0].startswith(r"24 images: column 'image' of a\nb\tc\x1b.parquet; ")


def test_models_are_told_apart_by_their_folders_and_hashes(images: np.ndarray) -> None:
    def named(*folders: str) -> list[str]:
        given = [_ClampBundle(folder, sha256=str(place) * 64) for place, folder in enumerate(folders)]
        return evaluate(bundles(*given), images[:2]).methods[-len(folders) :]

    assert named("a/first", "second") == ["first", "second"]
    assert named("a/same", "b/same") == ["same 00000000", "same 11111111"]
    assert named("models/median") == ["median 00000000"]  # a filter's name
    assert named("median", "median 00000000") == ["0000000000000000", "1111111111111111"]
    with pytest.raises(FlagError, match="--model: one and one hold the same weights"):
        evaluate(bundles(_ClampBundle("one"), _ClampBundle("one")), images[:2])


def test_images_without_ink_have_no_error_on_ink(images: np.ndarray) -> None:
    found = evaluate(bundles(), np.zeros((3, 28, 28), np.uint8))
    assert math.isnan(found.score("mixture", "clamp", "foreground_rmse"))
    content = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert content["conditions"][0]["methods"][0]["foreground_rmse"] is None
    some = evaluate(bundles(), np.concatenate([images[:1], np.zeros((9, 28, 28), np.uint8)]))
    low, high = some.row("mixture", "clamp").scores.intervals["foreground_rmse"]
    found_error = some.score("mixture", "clamp", "foreground_rmse")
    assert (low, high) == pytest.approx((found_error, found_error))  # the one image that has ink, in every resample


def test_single_images_are_kept_with_their_levels(evaluation: Evaluation, images: np.ndarray) -> None:
    assert evaluation.single is not None
    squared = evaluation.single.squared["clamp"]
    assert evaluation.score("mixture", "clamp", "pooled_psnr") == pytest.approx(-10 * np.log10(squared.mean()))
    sigma, half_range = drawn_levels(MIXTURE, 700)
    again, _ = drawn_levels(MIXTURE, 24)
    assert sigma.shape == half_range.shape == (700,)
    np.testing.assert_array_equal(sigma[:24], again)
    np.testing.assert_array_equal(evaluation.single.levels[0], again)  # type: ignore[index]
    noisy = degrade_images(images.astype(np.float32) / np.float32(255), MIXTURE)
    # The lowest of 784 numbers, most of them noise alone, is close to the half range.
    np.testing.assert_allclose(-noisy.min(axis=(1, 2)), half_range[:24], rtol=0.05, atol=0.02)


def test_pictures_are_drawn_of_as_few_images_as_there_are(images: np.ndarray, tmp_path: Path) -> None:
    bundle = read_bundle(SHIPPED_FOLDER.with_name("seed"))
    for count in (1, 2, 24):
        found = evaluate([bundle], images[:count])
        paths = draw_evaluation(found, [bundle], images[:count], tmp_path / str(count), device="cpu")
        assert [path.name for path in paths] == ["levels.png", "digits.png", "mixture.png", "metrics.png"]
        assert all(path.stat().st_size > 1000 for path in paths)
    # Names as folders may have them: formulas, what matplotlib leaves out of legends, what becomes one file's name.
    for names in (("$1_$2", "_b"), ("a b", "a-b"), ("x" * 200, "y")):
        models = [tmp_path / name for name in names]
        shutil.copytree(bundle.folder, models[0])
        shutil.copytree(SHIPPED_FOLDER, models[1])
        two = [read_bundle(model) for model in models]
        paths = draw_evaluation(evaluate(two, images[:2]), two, images[:2], tmp_path / "figures", device="cpu")
        assert len(set(paths)) == 7
    noisy = images.astype(np.float32) / np.float32(255)
    paired = evaluate([bundle], images, noisy=noisy)
    (path,) = draw_evaluation(paired, [bundle], images, tmp_path, noisy=noisy, device="cpu")
    assert path.name == "pairs.png"


def test_progress_ends_at_one(images: np.ndarray) -> None:
    told: list[tuple[str, float]] = []
    evaluate([], images[:2], progress=lambda text, share: told.append((text, share)))
    assert told[-1][1] == 1.0
    assert "2 of 2 images" in told[-1][0]


def test_no_images_is_refused() -> None:
    with pytest.raises(RequestError, match="no images"):
        evaluate([], np.zeros((0, 28, 28), np.uint8))


def _write(path: Path, **columns: np.ndarray) -> str:
    arrays = {name: pa.array([row.tobytes() for row in value], pa.binary(784)) for name, value in columns.items()}
    pq.write_table(pa.table(arrays), path)
    return str(path)


def test_a_model_that_was_trained_on_these_files_is_noted(
    tmp_path: Path, images: np.ndarray, model_folder: Path
) -> None:
    for name in ("a", "b", "c"):
        _write(tmp_path / f"{name}.parquet", image=images)
    learnt = TrainSettings(output=tmp_path / "m", data=f"{tmp_path}/[ab].parquet")
    identity = json.loads(json.dumps(open_parquet(learnt).identity()))
    bundle = read_bundle(model_folder)
    bundle = replace(bundle, model=bundle.model | {"data": identity})

    def noted(pattern: str) -> str | None:
        return trained_on(bundle, list_inputs((f"{tmp_path}/{pattern}.parquet",)).files)

    assert noted("c") is None
    begin = f"note: {bundle.folder} was trained on"
    assert (noted("a") or "").startswith(f"{begin} {tmp_path}/a.parquet: ")
    assert (noted("*") or "").startswith(f"{begin} 2 of these files: ")
    _write(tmp_path / "a.parquet", image=images[:5])  # another file of that name
    assert noted("a") is None
    for odd in (None, {"files": 3}, {"files": [1, None]}, []):
        assert trained_on(replace(bundle, model={"data": odd}), list_inputs((str(tmp_path),)).files) is None


def test_clean_images_come_from_the_clean_column(tmp_path: Path, images: np.ndarray) -> None:
    path = _write(tmp_path / "a.parquet", image=255 - images, clean=images)
    loaded = load_clean_images(path)
    np.testing.assert_array_equal(loaded.images, images)
    assert loaded.description == f"column 'clean' of {path}"
    assert loaded.noisy is None
    named = load_clean_images(path, "image", limit=5).images
    assert named.shape == (5, 28, 28)
    # Dark ink on white paper is turned round.
    assert named[:, 0].max() == 0


def test_labels_of_a_dataset_say_what_is_right(tmp_path: Path, images: np.ndarray) -> None:
    digits = np.arange(len(images)) % 10
    table = pa.table(
        {
            "clean": pa.array([None if row == 3 else image.tobytes() for row, image in enumerate(images)]),
            "label": pa.array(digits, pa.int16()),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    loaded = load_clean_images(str(tmp_path / "a.parquet"))
    assert loaded.labels is not None
    np.testing.assert_array_equal(loaded.labels, np.delete(digits, 3))
    assert loaded.labels.dtype == np.uint8
    assert loaded.notes == (
        f"note: 1 of {len(images)} sampled rows hold no usable image in 'clean': such are left out",
    )
    found = evaluate([], loaded.images, labels=loaded.labels)
    right = load_reader().read(loaded.images.astype(np.float32) / np.float32(255)) == loaded.labels
    assert found.clean_accuracy == pytest.approx(right.mean())


@pytest.mark.parametrize("odd", [None, 10, -1, 0.5, "seven"])
def test_labels_that_are_no_digits_are_not_used(tmp_path: Path, images: np.ndarray, odd: Any) -> None:
    others = ["1" if isinstance(odd, str) else 1] * (len(images) - 1)
    table = pa.table({"clean": [image.tobytes() for image in images], "label": [odd, *others]})
    pq.write_table(table, tmp_path / "a.parquet")
    loaded = load_clean_images(str(tmp_path / "a.parquet"))
    assert loaded.labels is None
    assert loaded.notes == ("note: column 'label' is not used: it does not hold a digit, 0 to 9, for each image",)


def test_float_images_are_rounded_to_8_bits(tmp_path: Path, images: np.ndarray) -> None:
    values = (images.reshape(-1, 784) / 255).astype(np.float32)
    pq.write_table(pa.table({"image": pa.array(list(values), pa.list_(pa.float32()))}), tmp_path / "a.parquet")
    np.testing.assert_array_equal(load_clean_images(str(tmp_path / "a.parquet")).images, images)


def test_noisy_images_of_a_dataset_take_the_place_of_drawn_ones(
    evaluation: Evaluation, images: np.ndarray, tmp_path: Path
) -> None:
    noisy = degrade_images(images.astype(np.float32) / np.float32(255), CONDITIONS[0])
    columns = {"image": pa.array(list(noisy.reshape(-1, 784)), pa.list_(pa.float32()))}
    columns["clean"] = pa.array([None if row == 5 else image.tobytes() for row, image in enumerate(images)])
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    loaded = load_clean_images(str(tmp_path / "a.parquet"), noisy_column="image")
    kept = np.arange(len(images)) != 5
    assert loaded.noisy is not None
    np.testing.assert_array_equal(loaded.noisy, noisy[kept])
    np.testing.assert_array_equal(loaded.images, images[kept])
    assert loaded.notes == ("note: 1 of 24 sampled rows hold no usable image in 'clean': such are left out",)

    paired = evaluate(bundles(), images, noisy=noisy, description="pairs of bars")
    assert [row.condition for row in paired.rows] == ["pairs"] * 5
    for method in ("noisy", "clamp"):
        assert paired.row("pairs", method).scores == evaluation.row("mixture", method).scores
    tuned = max(evaluation.score("mixture", "gaussian", "pooled_psnr"), 0.0)
    assert paired.score("pairs", "gaussian", "pooled_psnr") >= tuned  # its setting was chosen on these very images
    table = format_table(paired)
    assert table.startswith("24 images: pairs of bars\n")
    assert "seed" not in table
    content = json.loads(json.dumps(paired.to_json()))
    assert content["seed"] is None
    (condition,) = content["conditions"]
    assert condition["condition"] == "pairs"
    assert [row["method"] for row in condition["methods"]] == paired.methods


def test_pairs_that_are_alike_have_no_end_of_psnr(images: np.ndarray) -> None:
    noisy = images.astype(np.float32) / np.float32(255)
    noisy[0, 0, 0] = 0.5  # resamples without this one are exact
    table = format_table(evaluate([], images[:2], noisy=noisy[:2]))
    line = next(line for line in table.splitlines() if line.startswith("noisy input"))
    assert line.split()[3] == "∞"
    assert "inf" not in table
    assert "\n2 of these very images" in table


def test_pairs_say_how_well_a_model_knows_its_images(images: np.ndarray) -> None:
    bundle = read_bundle(SHIPPED_FOLDER)
    noisy = degrade_images(images.astype(np.float32) / np.float32(255), CONDITIONS[0])
    paired = evaluate([bundle], images, noisy=noisy)
    (row,) = paired.quality
    assert np.isfinite(row.scores.error)
    assert row.to_json()["level_error"] is None  # nobody knows it of given images
    assert f"PSNR that {bundle.folder.name} expects, less the true one: mean" in format_table(paired)


def test_models_see_white_paper_and_full_ink_unless_they_learnt_from_pairs(images: np.ndarray) -> None:
    noisy = degrade_images(images.astype(np.float32) / np.float32(255), CONDITIONS[0])
    evened = Evened(noisy[:, ::-1].copy(), np.linspace(0.5, 1.0, len(images), dtype=np.float32))
    of_pairs = _ClampBundle("of pairs", "cd" * 32)
    of_pairs.model = {"noise": {"source": "noisy column"}}
    two = bundles(_ClampBundle(), of_pairs)
    before = evaluate(two, images, noisy=noisy)
    found = evaluate(two, images, noisy=noisy, evened=evened)
    for method in ("noisy", "median", "gaussian", "wiener", "of pairs"):
        assert found.row("pairs", method).scores == before.row("pairs", method).scores
    assert evened.ink is not None
    shown = evened.images.clip(0, 1) * evened.ink[:, None, None]
    clean = images.astype(np.float32) / np.float32(255)
    expected = float(metrics.psnr_from_mse(metrics.mse(clean, shown).mean()))
    assert found.score("pairs", "clamp", "pooled_psnr") == pytest.approx(expected, abs=1e-6)


def test_pairs_on_grey_paper_are_measured_as_infer_gives_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clean = draw_digits(60, seed=3)[0].reshape(-1, 784)
    noise = np.random.default_rng(0).normal(0.0, 15.0, clean.shape)
    grey = np.rint((51 + 0.8 * clean + noise).clip(0, 255)).astype(np.uint8)
    data = _write(tmp_path / "a.parquet", image=grey, clean=clean)
    learnt = shutil.copytree(SHIPPED_FOLDER, tmp_path / "learnt")
    content = json.loads((learnt / "model.json").read_text())
    content["noise"] = {"source": "noisy column", "column": "image"}
    (learnt / "model.json").write_text(json.dumps(content))
    drawn: list[np.ndarray] = []

    def drawing(_: Path, sections: Any, **__: Any) -> None:
        drawn.append(np.array([tile.pictures[1][0, 0] for section in sections for tile in section.tiles]))

    monkeypatch.setattr("denoise_batch.evaluation.evaluation_figures.contact_sheet", drawing)
    arguments = ["evaluate", "--data", data, "--noisy-column", "image", "--device", "cpu", "--json"]
    models = ["--model", "seed", "--model", str(learnt)]
    assert cli.run([*arguments, *models, "--figures", str(tmp_path / "figures")]) == 0
    found = json.loads(capsys.readouterr().out)
    notes = [note for note in found["notes"] if "intervals" not in note]
    assert notes == [
        "note: in column 'image' the background is grey, 20% of full ink: it is taken for none, and comes back as none",
        f"note: {learnt} learnt from pairs, and is shown them as they are",
    ]
    figures = {method["method"]: method["pooled_psnr"] for method in found["conditions"][0]["methods"]}
    tone = find_tone(grey, Polarity.LIGHT_ON_DARK)
    for name, shown in (("seed", tone.even(grey, Polarity.LIGHT_ON_DARK)[0]), ("learnt", grey)):
        bundle = read_bundle(learnt if name == "learnt" else SHIPPED_FOLDER.with_name("seed"))
        denoiser = Denoiser(bundle, device="cpu", precision=Precision.FLOAT32)
        made = denoiser.denoise(shown, Polarity.LIGHT_ON_DARK, "float32").pixels
        assert figures[name] == pytest.approx(
            float(metrics.psnr_from_mse(metrics.mse(clean / np.float32(255), made).mean())), abs=1e-3
        )
    assert drawn[0].max() < 0.05  # white paper in the seed's picture as well
    assert cli.run([*arguments, "--model", str(learnt)]) == 0
    assert not any(
        "grey" in note or "learnt from pairs" in note for note in json.loads(capsys.readouterr().out)["notes"]
    )


def test_pairs_that_cannot_be_measured_on(images: np.ndarray, tmp_path: Path) -> None:
    path = _write(tmp_path / "a.parquet", image=255 - images, clean=images)
    with pytest.raises(ColumnError, match="'clean' is light-on-dark, but column 'image' is dark-on-light"):
        load_clean_images(path, noisy_column="image")
    each = load_clean_images(path, noisy_column="image", polarity=Polarity.EACH)
    assert each.noisy is not None
    np.testing.assert_allclose(each.noisy, images / np.float32(255), atol=1e-6)
    with pytest.raises(FlagError, match="--noisy-column clean is the column of clean images as well"):
        load_clean_images(path, "clean", noisy_column="clean")
    many, _ = draw_digits(240, seed=1)
    path = _write(tmp_path / "shuffled.parquet", image=many[::-1], clean=many)
    with pytest.raises(ColumnError, match="'image' are no more like those of 'clean' beside them"):
        load_clean_images(path, noisy_column="image")
    apart = {"image": [images[0].tobytes(), None], "clean": [None, images[0].tobytes()]}
    pq.write_table(pa.table(apart, pa.schema(dict.fromkeys(apart, pa.binary(784)))), tmp_path / "apart.parquet")
    with pytest.raises(RequestError, match="none of 2 rows read holds a usable image in 'clean' and 'image'"):
        load_clean_images(str(tmp_path / "apart.parquet"), noisy_column="image")
    with pytest.raises(FlagError, match="--noisy-column image, but no --data"):
        load_clean_images(None, noisy_column="image")


def test_requests_that_cannot_be_met(tmp_path: Path, images: np.ndarray) -> None:
    with pytest.raises(MissingFileError):
        load_clean_images(str(tmp_path / "none.parquet"))
    path = _write(tmp_path / "a.parquet", image=images)
    with pytest.raises(ColumnError, match="'pixels'"):
        load_clean_images(path, "pixels")
    with pytest.raises(FlagError, match="--limit 0"):
        load_clean_images(path, limit=0)
    with pytest.raises(RequestError, match="none of 0 rows read holds a usable image in 'image'"):
        load_clean_images(_write(tmp_path / "b.parquet", image=images[:0]))


def test_a_large_dataset_is_sampled(tmp_path: Path, images: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    from denoise_batch.evaluation import clean_images as module

    monkeypatch.setattr(module, "_DATASET_IMAGES", 5)
    loaded = load_clean_images(_write(tmp_path / "a.parquet", image=images))
    assert len(loaded.images) == 5
    assert loaded.description.endswith(", a sample")
