"""Training with Ray Train: any number of workers, deaths of workers and of the driver, streaming, paired data."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from denoise_batch.bundle import SHIPPED_FOLDER, read_bundle
from denoise_batch.bundle.history import EpochRow, read_history
from denoise_batch.cluster.capacity import own_actors
from denoise_batch.digits.drawn_digits import draw_digits
from denoise_batch.errors import FlagError, JobFailed, OutputExists, ResumeError
from denoise_batch.models.int8 import weight_steps
from denoise_batch.precision import Precision
from denoise_batch.training import train as train_module
from denoise_batch.training.recipes import TrainSettings
from denoise_batch.training.train import train

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from denoise_batch.training.progress import TrainProgress

pytestmark = pytest.mark.usefixtures("ray_session")

EPOCHS = 5


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,500 drawn digits in two files, and the same with noise of our own beside them."""
    folder = tmp_path_factory.mktemp("digits")
    images = draw_digits(1500, 3)[0].reshape(-1, 784)
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, images.shape).astype(np.float32)
    noisy = pa.FixedSizeListArray.from_arrays(pa.array((images / np.float32(255) + noise).ravel()), 784)
    table = pa.table({"image": pa.array([image.tobytes() for image in images], pa.binary(784)), "noisy": noisy})
    pq.write_table(table.slice(0, 800), folder / "a.parquet", row_group_size=300)
    pq.write_table(table.slice(800), folder / "b.parquet", row_group_size=250)
    return folder


@pytest.fixture(scope="module")
def settings(data: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainSettings:
    output = tmp_path_factory.mktemp("undisturbed") / "model"
    return TrainSettings(
        output=output,
        data=data,
        column="image",
        architecture="seed",
        epochs=EPOCHS,
        batch=64,
        precision=Precision.FLOAT32,
        workers=1,
    )


@pytest.fixture(scope="module")
def undisturbed(ray_session: None, settings: TrainSettings) -> list[EpochRow]:  # noqa: ARG001
    """The history of a run of one worker that nothing happened to."""
    shown: list[TrainProgress] = []
    bundle = train(settings, shown.append)
    rows = read_history(bundle.folder / "history.csv")
    assert shown[-1].images == shown[-1].total_images == rows[-1].images == EPOCHS * 1375
    assert shown[-1].psnr == pytest.approx(rows[-1].val_psnr_noisy, rel=1e-6)
    assert shown[-1].workers == 1
    return rows


def _same(rows: list[EpochRow], expected: list[EpochRow]) -> None:
    """Equal but for float32 rounding, and every epoch is there once."""
    assert [(row.epoch, row.images) for row in rows] == [(row.epoch, row.images) for row in expected]
    for row, other in zip(rows, expected, strict=True):
        assert row.val_psnr_noisy == pytest.approx(other.val_psnr_noisy, abs=0.02)
        assert row.loss == pytest.approx(other.loss, rel=0.002)


def _training_folder(output: Path) -> Path:
    return output.with_name(f".{output.name}.training")


def _epochs_done(output: Path) -> int:
    with contextlib.suppress(OSError):
        return len((_training_folder(output) / "history.csv").read_text().splitlines()) - 1
    return 0


@contextlib.contextmanager
def _when(condition: Callable[[], bool], act: Callable[[], object]) -> Iterator[list[bool]]:
    """Acts from a thread as soon as the condition holds."""
    done: list[bool] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.02):
            if condition():
                act()
                done.append(True)
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield done
    finally:
        over.set()
        thread.join()


def _commands_below(pid: int) -> list[str]:
    """How the command lines begin of all that a process has started and that lives."""
    commands: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            commands[int(entry.name)] = (entry / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
    family, size = {pid}, 0
    while len(family) > size:
        size = len(family)
        for process in commands.keys() - family:
            with contextlib.suppress(OSError):
                if _parent(process) in family:
                    family.add(process)
    found = (commands[process].partition(" --")[0].strip() for process in family - {pid})
    return [command for command in found if command]


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def _own_training_workers() -> list[int]:
    """The training workers of the Ray that this process started: driver → raylet → worker."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            if (
                b"RayTrainWorker" in (entry / "cmdline").read_bytes()
                and _parent(_parent(int(entry.name))) == os.getpid()
            ):
                found.append(int(entry.name))
    return found


def test_the_model_folder_is_complete(undisturbed: list[EpochRow], settings: TrainSettings) -> None:
    bundle = read_bundle(settings.output)
    best = max(undisturbed, key=lambda row: row.val_psnr_noisy)
    assert bundle.metrics["epoch"] == best.epoch
    assert bundle.metrics["validation_psnr_noisy"] == pytest.approx(best.val_psnr_noisy, rel=1e-6)
    assert bundle.model["data"]["rows"] == 1500
    assert bundle.load().parameter_count() == 4385
    names = {path.name for path in settings.output.iterdir()}
    assert names == {"model.safetensors", "model.json", "history.csv", "curves.png", "README.md", "tensorboard"}
    assert [path.name for path in settings.output.parent.iterdir()] == ["model"]  # no training folder is left
    # It would have had the end wait for 12 s: it asks a dashboard, and there is none.
    assert own_actors("TrainController")
    assert own_actors("PlacementGroupCleaner") == []
    assert undisturbed[-1].val_psnr_noisy > undisturbed[0].val_psnr_noisy


def test_the_same_training_again_does_nothing_and_another_is_refused(
    undisturbed: list[EpochRow], settings: TrainSettings
) -> None:
    """Of a folder that a training has really made; what else may be there is in `tests/test_repeated_training.py`."""
    seen: list[str] = []
    started, again = replace(settings, workers=3, command="another"), replace(settings, epochs=EPOCHS + 1)
    bundle = train(started, lambda _: seen.append("progress"), finished=lambda: seen.append("finished"))
    assert seen == ["finished"]
    assert read_history(bundle.folder / "history.csv") == undisturbed
    with pytest.raises(OutputExists, match="exists"):
        train(again, lambda _: None)


def test_three_workers_of_which_one_is_killed(
    undisturbed: list[EpochRow], settings: TrainSettings, tmp_path: Path
) -> None:
    """Three do not divide a batch of 64, nor two CPUs."""
    output = tmp_path / "model"
    killed: list[int] = []

    def kill() -> None:
        killed.append(max(_own_training_workers()))
        os.kill(killed[0], signal.SIGKILL)

    with _when(lambda: _epochs_done(output) >= 2 and bool(_own_training_workers()), kill):
        bundle = train(replace(settings, output=output, workers=3), lambda _: None)
    assert killed
    _same(read_history(bundle.folder / "history.csv"), undisturbed)


def test_a_killed_driver_goes_on_where_it_was(
    undisturbed: list[EpochRow], settings: TrainSettings, tmp_path: Path
) -> None:
    output = tmp_path / "model"
    code = (
        "import sys, json; from pathlib import Path; from denoise_batch.training.recipes import TrainSettings\n"
        "from denoise_batch.training.train import train; from denoise_batch.precision import Precision\n"
        "fields = json.loads(sys.argv[1])\n"
        "fields |= {'output': Path(fields['output']), 'precision': Precision(fields['precision'])}\n"
        "train(TrainSettings(**fields), lambda progress: None)\n"
    )
    ours = replace(settings, output=output, workers=2)
    fields = {name: value for name, value in vars(ours).items() if value is not None and name != "device"}
    arguments = json.dumps(fields, default=str)
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    driver = subprocess.Popen(
        [sys.executable, "-c", code, arguments], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        while _epochs_done(output) < 2:
            assert driver.poll() is None
            time.sleep(0.02)
        started = _commands_below(driver.pid)
    finally:
        driver.kill()
        driver.wait()
    assert not output.exists()
    # A worker more may be left over from Ray's start, or be starting; nothing else runs beside the training.
    ours_alone = {"gcs_server": 1, "raylet": 1, "agent_stand_in": 1, "RayTrainWorker": 2, "SynchronizationActor": 1}
    ours_alone |= {"RuntimeEnvAgent": 1, "TrainController": 1}
    counted = [next((kind for kind in ours_alone if kind in command), command) for command in started]
    spare = ("ray::IDLE", "default_worker.py")
    assert {kind: counted.count(kind) for kind in counted if not any(name in kind for name in spare)} == ours_alone
    time.sleep(1)  # its Ray notices that it is gone
    before = json.loads((_training_folder(output) / "progress.json").read_text())["epoch"]

    with pytest.raises(ResumeError) as refused:
        train(replace(ours, learning_rate=0.5, seed=1), lambda _: None)
    assert "recipe.learning_rate was 0.005, now 0.5" in refused.value.message
    assert "seed was 0, now 1" in refused.value.message

    shown: list[TrainProgress] = []
    bundle = train(ours, shown.append)
    # Nothing is done again. (Nothing may be left either: its workers live a moment longer than a killed driver.)
    assert all(progress.epoch >= min(2, before) for progress in shown)
    _same(read_history(bundle.folder / "history.csv"), undisturbed)
    board = bundle.folder / "tensorboard"
    assert _curve(board) == list(range(1, EPOCHS + 1))
    (board / "events.out.tfevents.0").write_bytes(min(board.iterdir()).read_bytes())
    assert _curve(board) == list(range(1, EPOCHS + 1))  # what was drawn twice counts once


def _curve(folder: Path) -> list[int]:
    """The epochs at which TensorBoard shows a loss: a start purges what was drawn from its step on."""
    drawn: list[int] = []
    for file in sorted(folder.iterdir()):
        content, position = file.read_bytes(), 0
        while position < len(content):
            (length,) = struct.unpack_from("<Q", content, position)
            event = Event.FromString(content[position + 12 : position + 12 + length])  # behind length and its checksum
            position += 16 + length
            if event.session_log.status == SessionLog.START:
                drawn = [step for step in drawn if step < event.step]
            drawn += [event.step for value in event.summary.value if value.tag == "loss"]
    return drawn


def test_streamed_pairs(settings: TrainSettings, tmp_path: Path) -> None:
    """Rows that do not fit stream from Parquet, on two workers, with the user's own noise."""
    data = _with_gaps(settings, tmp_path / "gaps.parquet", noisy=range(700, 703))
    ours = replace(settings, output=tmp_path / "m", data=data, noisy_column="noisy", resident_limit=0, workers=2)
    ours = replace(ours, epochs=2)
    notes: list[str] = []
    bundle = train(ours, lambda _: None, noted=notes.append)
    rows = read_history(bundle.folder / "history.csv")
    assert rows[-1].images == 2 * 1375
    assert rows[-1].loss < rows[0].loss
    assert notes == []
    assert bundle.model["recipe"]["drawn_every"] == 4
    assert bundle.noise == {"source": "noisy column", "column": "noisy"}
    assert bundle.model["data"]["rows_left_out"] == 23 + 3
    assert "26 of them were left out" in (bundle.folder / "README.md").read_text(encoding="utf-8")


def _with_gaps(settings: TrainSettings, path: Path, **gaps: range) -> Path:
    """The data with rows without an image, further on than what is looked at first."""
    table = pq.read_table(settings.data)
    for name, rows in {"image": range(600, 623), **gaps}.items():
        values = table.column(name).to_pylist()
        for row in rows:
            values[row] = None
        table = table.set_column(
            table.schema.get_field_index(name), name, pa.array(values, table.schema.field(name).type)
        )
    pq.write_table(table, path, row_group_size=1500)
    return path


def test_the_seed_recipe_and_a_folder_that_could_not_be_written(
    settings: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finished training whose folder could not be written (a full disk, say) is only written the next time."""
    ours = replace(settings, output=tmp_path / "m", recipe="seed", architecture=None, batch=None, epochs=1)

    def full_disk(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(train_module, "save_bundle", full_disk)
        with pytest.raises(OSError, match="No space"):
            train(ours, lambda _: None)
    trained = (_training_folder(tmp_path / "m") / "history.csv").read_text()
    shown: list[TrainProgress] = []
    bundle = train(ours, shown.append)
    assert (bundle.folder / "history.csv").read_text() == trained
    assert shown == []
    assert bundle.metrics["images_trained"] == 4 * 1375
    assert bundle.model["recipe"]["optimiser"] == "adadelta"
    assert bundle.load().parameter_count() == 4385


def test_a_training_that_diverges_says_so(settings: TrainSettings, tmp_path: Path) -> None:
    ours = replace(settings, output=tmp_path / "m", recipe="seed", learning_rate=1e30, epochs=2, max_images=200)
    with pytest.raises(JobFailed, match="diverged in epoch 1"):
        train(ours, lambda _: None)
    # Nothing was trained: no settings are left that another attempt would have to keep to.
    assert list(tmp_path.iterdir()) == []


def test_so_many_minutes_from_a_models_weights_end_with_integers_of_their_own(
    settings: TrainSettings, tmp_path: Path
) -> None:
    """From the weights that ship, so that these integers were there before; with two workers, which could differ."""
    data = _with_gaps(settings, tmp_path / "gaps.parquet")
    options: dict[str, Any] = {"init": SHIPPED_FOLDER, "workers": 2, "epochs": None, "minutes": 0.15, "max_images": 620}
    ours = replace(settings, output=tmp_path / "m", architecture="bounds-unet", data=data, **options)
    with pytest.raises(FlagError, match="--init"):
        train(replace(ours, output=tmp_path / "other", architecture="seed"), lambda _: None)
    assert not _training_folder(tmp_path / "other").exists()

    bundle = train(ours, lambda _: None)
    rows = read_history(bundle.folder / "history.csv")
    assert 9.0 <= rows[-1].seconds < 60.0
    # The clock's schedule went down: on a busy machine the last step may begin long before the end.
    assert rows[-1].learning_rate < 0.5 * bundle.model["recipe"]["learning_rate"]
    images = 620 - 51 - 16  # 20 of them are left out, four of those are held out
    assert [row.images for row in rows[:-1]] == [images * row.epoch for row in rows[:-1]]
    assert rows[-1].images <= images * len(rows)
    assert rows[0].val_psnr_noisy > 16.0  # it did not start afresh
    assert bundle.model["recipe"]["minutes"] == 0.15
    assert bundle.model["data"]["rows_left_out"] == 20

    made, shipped = (whole.load().state_dict() for whole in (bundle, read_bundle(SHIPPED_FOLDER)))
    assert bool((made["largest"] > 0).all())
    integers = [name for name in made if name.endswith(".integers")]
    assert len(integers) == 10
    for name in integers:
        assert bool(made[name].any())
        assert not made[name].equal(shipped[name])
    weight, rounded = made["up.weight"], made["up.integers"]
    steps = weight_steps(weight)[:, None]
    assert float((rounded * steps - weight).square().mean().sqrt() / steps.mean()) < 1.0  # a third if to the nearest
