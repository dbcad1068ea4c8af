"""A training that is given again once its model folder is there: as schedulers do with jobs whose end they missed."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from denoise_batch import cli, models
from denoise_batch.bundle import read_bundle, training_folder
from denoise_batch.bundle.history import HISTORY_FILE, EpochRow, history_csv
from denoise_batch.bundle.saving import BundleCard, save_bundle
from denoise_batch.errors import FlagError, ModelError, OutputError, OutputExists, RequestError, ResumeError
from denoise_batch.storage import publishing
from denoise_batch.training import request
from denoise_batch.training import train as train_module
from denoise_batch.training.checkpoint import TrainingState, weights_of, write_finished
from denoise_batch.training.data import open_parquet
from denoise_batch.training.progress import TrainProgress
from denoise_batch.training.recipes import TrainSettings
from denoise_batch.training.train import train

if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("footers_read_here")


def _epoch(number: int, seconds: float) -> EpochRow:
    return EpochRow(number, 100 * number, 0.3, 0.3, 15.0, 14.0, 1e-3, 40.0, seconds, None, 15.0)


@pytest.fixture
def settings(tmp_path: Path, digits: Any) -> TrainSettings:
    """Of a training whose model folder is there, as if it had just been made."""
    images = pa.array([image.tobytes() for image in digits[0]], pa.binary(784))
    pq.write_table(pa.table({"image": images}), tmp_path / "clean.parquet")
    settings = TrainSettings(output=tmp_path / "model", data=tmp_path / "clean.parquet", architecture="seed", epochs=2)
    torch.manual_seed(0)
    card = BundleCard("seed", history=(_epoch(1, 2.5), _epoch(2, 5.0)), request=request.digest_of(_identity(settings)))
    save_bundle(settings.output, models.build("seed"), card)
    return settings


def _identity(settings: TrainSettings) -> dict[str, Any]:
    return request.identity_of(settings, settings.resolve(), open_parquet(settings), None)


def _again(settings: TrainSettings) -> list[str]:
    """What the training does: nothing that needs Ray may come."""

    def start() -> None:
        raise AssertionError("it would have trained")

    seen: list[str] = []
    bundle = train(settings, lambda _: None, starting=start, finished=lambda: seen.append("finished"))
    assert bundle.folder == settings.output
    return seen


def test_the_same_does_nothing_wherever_it_runs(settings: TrainSettings) -> None:
    before = {path: path.stat().st_mtime_ns for path in [settings.output, *settings.output.iterdir()]}
    assert _again(replace(settings, workers=3, command="another", verbose=True)) == ["finished"]
    assert {path: path.stat().st_mtime_ns for path in [settings.output, *settings.output.iterdir()]} == before
    assert not training_folder(settings.output).exists()


def test_a_copy_counts_and_a_link_does_not(settings: TrainSettings, tmp_path: Path) -> None:
    shutil.copytree(settings.output, tmp_path / "copy")
    assert _again(replace(settings, output=tmp_path / "copy")) == ["finished"]
    (tmp_path / "link").symlink_to(settings.output)
    with pytest.raises(OutputError, match="link exists"):
        _again(replace(settings, output=tmp_path / "link"))


def test_other_settings_data_and_versions_are_refused(
    settings: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(tmp_path / "clean.parquet", tmp_path / "other.parquet")
    for other in (
        replace(settings, epochs=3),
        replace(settings, seed=1),
        replace(settings, max_images=200),
        replace(settings, data=tmp_path / "other.parquet"),
        replace(settings, data=None),
    ):
        with pytest.raises(OutputExists, match="model exists, made with other settings, of other data or") as refused:
            _again(other)
        assert "--overwrite" in refused.value.hint
    monkeypatch.setattr(request, "__version__", "0.0.9")
    with pytest.raises(OutputExists, match="model exists"):
        _again(settings)


def test_what_cannot_be_used_is_not_called_complete(settings: TrainSettings) -> None:
    weights = settings.output / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(OutputExists, match=r"model exists, but cannot be used: .*model\.safetensors") as refused:
        _again(settings)
    assert "--overwrite" in refused.value.hint
    weights.write_bytes(content)
    described = settings.output / "model.json"
    model = json.loads(described.read_text())
    model["architecture"] = "bounds-unet"  # as if this version's network of that name were another
    described.write_text(json.dumps(model))
    with pytest.raises(OutputExists, match=r"model exists, but cannot be used: .*bounds-unet"):
        _again(settings)


def _begun(settings: TrainSettings, *history: EpochRow) -> Path:
    """An unfinished training of the same settings."""
    folder = training_folder(settings.output)
    folder.mkdir(mode=0o700)
    (folder / "settings.json").write_text(json.dumps(_identity(settings)))
    if history:
        (folder / HISTORY_FILE).write_text(history_csv(history))
    return folder


def test_what_the_run_left_that_made_it_goes(settings: TrainSettings) -> None:
    """It died between showing the model and removing its folder."""
    folder = _begun(settings, _epoch(1, 2.5), _epoch(2, 5.0))
    assert _again(settings) == ["finished"]
    assert not folder.exists()


@pytest.mark.parametrize("history", [(), (_epoch(1, 2.25),), (_epoch(1, 2.5), _epoch(2, 5.25))])
def test_what_overwrite_has_begun_since_stays(settings: TrainSettings, history: tuple[EpochRow, ...]) -> None:
    folder = _begun(settings, *history)
    before = sorted(path.name for path in folder.iterdir())
    assert _again(settings) == ["finished"]
    assert sorted(path.name for path in folder.iterdir()) == before


def test_a_folder_that_cannot_be_tidied_is_no_fault(settings: TrainSettings) -> None:
    training_folder(settings.output).write_text("a file")
    assert _again(settings) == ["finished"]


def test_another_run_may_show_it_while_this_one_looks(settings: TrainSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere, real = settings.output.with_name("elsewhere"), publishing.exclusive
    settings.output.rename(elsewhere)

    def late(folder: Path) -> AbstractContextManager[None]:
        elsewhere.rename(settings.output)
        return real(folder)

    monkeypatch.setattr(publishing, "exclusive", late)
    assert _again(settings) == ["finished"]
    assert not training_folder(settings.output).exists()


def test_the_command_says_so(settings: TrainSettings, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["train", "--data", str(settings.data), "--architecture", "seed", "--out", str(settings.output)]
    assert cli.run([*command, "--epochs", "2", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["already_complete"] is True
    assert told["model"] == str(settings.output)
    assert cli.run([*command, "--epochs", "2"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "it is complete already: nothing was left to do"
    assert cli.run([*command, "--epochs", "3"]) == 2
    assert capsys.readouterr().err.splitlines()[-2].startswith(f"error: {settings.output} exists, made with other")


def test_the_model_is_built_in_the_trainings_folder(settings: TrainSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a death leaves of it goes with that folder."""
    shutil.rmtree(settings.output)
    folder = _begun(settings, _epoch(1, 2.5), _epoch(2, 5.0))
    state = TrainingState(2, 4, [_epoch(1, 2.5), _epoch(2, 5.0)], 2)
    write_finished(folder / "finished", state, weights_of(models.build("seed")))
    shown: list[tuple[Path, Path]] = []
    real = publishing.publish

    def publish(built: Path, out: Path, *, overwrite: bool) -> None:
        shown.append((built.parent, out))
        real(built, out, overwrite=overwrite)

    monkeypatch.setattr(publishing, "publish", publish)
    assert _again(settings) == []
    assert shown == [(folder, settings.output)]
    assert not folder.exists()


def test_the_first_version_of_ray_train_is_refused_before_ray_starts(
    settings: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TRAIN_V2_ENABLED", "0")
    with pytest.raises(FlagError, match="RAY_TRAIN_V2_ENABLED is '0'"):
        _again(replace(settings, output=tmp_path / "new"))
    assert not training_folder(tmp_path / "new").exists()


def test_the_command_notes_long_epochs_once(
    settings: TrainSettings, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained(_: TrainSettings, progress: Any, **__: Any) -> Any:
        now = TrainProgress(1, 10, 500, 1000, 0.1, None, 10.0, 75.0, 1, "cpu")
        for epoch_seconds in (None, 7200.0, 7300.0):
            progress(replace(now, epoch_seconds=epoch_seconds))
        return read_bundle(settings.output)

    monkeypatch.setattr(train_module, "train", trained)
    assert cli.run(["train", "--data", str(settings.data), "--out", str(settings.output)]) == 0
    assert [line for line in capsys.readouterr().err.splitlines() if "note" in line] == [
        "note: an epoch takes about 2 h 00 min here, and nothing is kept before its end"
    ]


def test_what_is_no_model_folder_is_refused_before_the_data_are_read(settings: TrainSettings, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(RequestError, match="folder exists"):
        _again(replace(settings, output=tmp_path / "folder", data=tmp_path / "missing.parquet"))
    (tmp_path / "file").write_bytes(b"")
    for overwrite in (False, True):  # no hint at a flag that would not do either
        with pytest.raises(RequestError, match="file exists, and is no model folder") as refused:
            _again(replace(settings, output=tmp_path / "file", overwrite=overwrite))
        assert "--overwrite" not in refused.value.hint
    assert read_bundle(settings.output)


def test_a_network_that_is_none_is_told_before_anything_else(settings: TrainSettings, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no network is called 'unet'"):
        _again(replace(settings, output=tmp_path / "new", architecture="unet", data=tmp_path / "missing.parquet"))


def test_a_half_written_checkpoint_goes_when_a_training_goes_on(settings: TrainSettings, tmp_path: Path) -> None:
    """What a full disk left would take the room that the next one needs."""
    folder, ray = tmp_path / "folder", tmp_path / "folder" / "ray"
    folder.mkdir()
    identity: dict[str, Any] = {"recipe": {}}
    request.enter(folder, settings, identity)
    for name in ("checkpoint_1", "checkpoint_2"):
        (ray / name).mkdir(parents=True)
    request.enter(folder, settings, identity)  # the first was being written: Ray has no notes yet
    assert not list(ray.iterdir())
    for name in ("checkpoint_1", "checkpoint_2"):
        (ray / name).mkdir()
    notes = {"checkpoint_results": [{"checkpoint_dir_name": "checkpoint_1", "metrics": {}}]}
    (ray / "checkpoint_manager_snapshot.json").write_text(json.dumps(notes))
    (folder / request.CHECKPOINT_FOLDER).mkdir()
    request.enter(folder, settings, identity)
    assert not (folder / request.CHECKPOINT_FOLDER).exists()
    assert {path.name for path in ray.iterdir()} == {"checkpoint_1", "checkpoint_manager_snapshot.json"}


def test_notes_of_ray_that_are_cut_off_or_name_what_is_gone_are_said_to_be(
    settings: TrainSettings, tmp_path: Path
) -> None:
    """Its controller dies over them, in words that help nobody."""
    folder, ray = tmp_path / "folder", tmp_path / "folder" / "ray"
    folder.mkdir()
    request.enter(folder, settings, {"recipe": {}})
    (ray / "checkpoint_1").mkdir(parents=True)
    notes = json.dumps({"checkpoint_results": [{"checkpoint_dir_name": "checkpoint_1", "metrics": {}}]})
    for written in ("", notes[:40]):
        (ray / "checkpoint_manager_snapshot.json").write_text(written)
        with pytest.raises(ResumeError, match="is damaged") as caught:
            request.enter(folder, settings, {"recipe": {}})
        assert str(folder) in caught.value.hint
    (ray / "checkpoint_manager_snapshot.json").write_text(notes)
    (ray / "checkpoint_1").rmdir()
    with pytest.raises(ResumeError, match="gone: checkpoint_1"):
        request.enter(folder, settings, {"recipe": {}})


def test_other_files_are_named_by_their_folders_where_their_names_are_the_same(
    settings: TrainSettings, tmp_path: Path
) -> None:
    def of(*files: list[Any]) -> dict[str, Any]:
        return {"data": {"files": files}}

    folder = tmp_path / "folder"
    folder.mkdir()
    request.enter(folder, settings, of(["/a/clean.parquet", 1, 1]))
    (folder / HISTORY_FILE).write_text(history_csv([_epoch(1, 2.5)]))
    with pytest.raises(ResumeError, match=r"the data were /a/clean.parquet, now /b/clean.parquet"):
        request.enter(folder, settings, of(["/b/clean.parquet", 1, 1]))
    with pytest.raises(ResumeError, match=r"/a/clean.parquet has changed"):
        request.enter(folder, settings, of(["/a/clean.parquet", 2, 1]))


def test_settings_are_kept_to_once_an_epoch_is_done(settings: TrainSettings, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for epochs in (5, 6):  # stopped before
        request.enter(folder, settings, {"epochs": epochs})
        assert request.begun(folder) == {"epochs": epochs}
    (folder / HISTORY_FILE).write_text(history_csv([_epoch(1, 2.5)]))
    with pytest.raises(ResumeError, match="epochs was 6, now 7"):
        request.enter(folder, settings, {"epochs": 7})
    (folder / "settings.json").write_text("")
    with pytest.raises(ResumeError, match=r"settings.json cannot be read"):
        request.enter(folder, settings, {"epochs": 6})
    request.enter(folder, replace(settings, overwrite=True), {"epochs": 7})
    assert sorted(path.name for path in folder.iterdir()) == ["failure.room", "settings.json"]
