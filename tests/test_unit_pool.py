"""What watches over the workers: a wait for dead ones ends, and so does a unit that stands still."""

from __future__ import annotations

import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pytest

from denoise_batch.cluster import capacity
from denoise_batch.errors import JobFailed, ModelError, ResourceExhausted
from denoise_batch.inference import unit_pool, worker_watch
from denoise_batch.inference.denoise_unit import Assignment
from denoise_batch.inference.plan import PlannedFile, Unit
from denoise_batch.inference.pool_size import PoolSize
from denoise_batch.inference.unit_metrics import UnitMetrics
from denoise_batch.precision import Precision

if TYPE_CHECKING:
    from collections.abc import Iterator


class Condemned(worker_watch.Watch):
    """Finds, as soon as it is told, that the workers died."""

    def __init__(self, marks: Path) -> None:
        super().__init__(marks, PoolSize(1, 1, 1, 1, 0.9, 0.0))
        self.told = threading.Event()

    def _judge(self) -> ResourceExhausted | None:
        return ResourceExhausted("the workers died", hint="give them memory") if self.told.is_set() else None


@pytest.fixture
def watch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Condemned:
    monkeypatch.setattr(worker_watch, "_WATCH_SECONDS", 0.02)
    monkeypatch.setattr(capacity, "waiting_for", lambda *_: None)
    return Condemned(tmp_path)


def test_a_wait_for_workers_that_died_ends(watch: Condemned) -> None:
    def answers() -> Iterator[int]:
        yield 1
        watch.told.set()
        time.sleep(30)
        yield 2

    begun = time.monotonic()
    with pytest.raises(ResourceExhausted, match="the workers died"), watch:
        for _ in watch.over(answers()):
            pass
    assert time.monotonic() - begun < 10


def test_who_uses_an_answer_is_not_disturbed(watch: Condemned) -> None:
    used = []

    def units() -> Iterator[int]:  # as `process_units`: the one who uses its answers is outside of the watch
        with watch:
            yield from watch.over(iter(range(5)))

    answers = units()
    used.append(next(answers))
    watch.told.set()
    time.sleep(0.3)  # writing the receipt
    with pytest.raises(ResourceExhausted, match="the workers died"):
        next(answers)
    assert used == [0]


@pytest.mark.usefixtures("without_rays_arrow_types")
def test_the_watch_lists_marks_of_workers_and_no_units_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which a run may have a million: it looks every second."""
    monkeypatch.setattr(capacity, "waiting_for", lambda *_: None)
    staging, model = tmp_path / "staging", tmp_path / "model"
    staging.mkdir()
    model.mkdir()
    (staging / "unit-0000000.s000001.a1.parquet").touch()
    (staging / "worker-12").touch()  # of a run that an earlier version left unfinished
    options: Any = SimpleNamespace(staging=str(staging))
    size = PoolSize(1, 1, 1, 1, 0.9, 0.0)
    folder = unit_pool._marks_in(options)
    assert folder is not None
    listed, iterdir = list[Path](), Path.iterdir

    def noted(path: Path) -> Iterator[Path]:
        listed.append(path)
        return iterdir(path)

    monkeypatch.setattr(Path, "iterdir", noted)
    for _ in range(2):  # a wave each
        with worker_watch.Watch(folder, size) as watch:
            assert watch._marks() == []
            with pytest.raises(ModelError):
                unit_pool.DenoiseUnit(options, unit_pool.ModelToLoad(str(model), "", None, "cpu", Precision.AUTO), size)
            (mark,) = watch._marks()
            assert mark.startswith(worker_watch.MARK)
            assert mark.endswith(worker_watch.LOADING)
    assert staging not in listed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "staging", "workers"]


@pytest.mark.usefixtures("without_rays_arrow_types")
def test_an_actor_whose_node_goes_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Units that have answered are kept; the others have no answer, as where a worker dies."""
    import ray.data

    ending: list[Exception] = []

    class Answers:
        def map_batches(self, *_: Any, **__: Any) -> Answers:
            return self

        def iter_batches(self, **_: Any) -> Iterator[pa.Table]:
            yield pa.table(unit_pool._answer("working", {"unit": 7, "rows": 0}))
            raise ending[0]

    monkeypatch.setattr(ray.data, "from_items", lambda *_, **__: Answers())
    monkeypatch.setattr(capacity, "waiting_for", lambda *_: None)
    file = PlannedFile("a.parquet", "", 1, 1, 256, 784)
    assignment = Assignment(Unit(7, 0, 0, 0, 0, 256, 0), file, 1, "a.parquet")
    options: Any = SimpleNamespace(staging=str(tmp_path / "staging"))
    size = PoolSize(1, 1, 1, 1, 0.9, 0.0)

    def heard(error: Exception) -> list[Any]:
        ending[:] = [error]
        model: Any = None
        return list(unit_pool.process_units([assignment], options, model, size, ahead=False, verbose=False))

    assert heard(ray.exceptions.ActorUnavailableError("no connection", None)) == [unit_pool.Working(7, 0)]
    with pytest.raises(JobFailed, match="the workers failed"):
        heard(ray.exceptions.ActorDiedError())


def test_a_unit_that_stands_still_is_a_failure_and_its_worker_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    stuck, ended = threading.Event(), list[int]()

    def denoise_unit(_assignment: Any, _options: Any, _forward: Any, _fingerprint: Any, on_rows: Any) -> None:
        on_rows(128)
        stuck.wait()

    monkeypatch.setattr(unit_pool, "denoise_unit", denoise_unit)
    monkeypatch.setattr(unit_pool, "_PROGRESS_SECONDS", 0.05)
    monkeypatch.setattr(unit_pool, "STUCK_SECONDS", 0.2)
    monkeypatch.setattr(os, "_exit", ended.append)
    actor = unit_pool.DenoiseUnit.__new__(unit_pool.DenoiseUnit)
    actor._options = None  # type: ignore[assignment]
    actor._metrics = UnitMetrics()
    actor._thread = ThreadPoolExecutor(1)
    file = PlannedFile("a.parquet", "", 1, 1, 256, 784)
    assignment = Assignment(Unit(7, 0, 0, 0, 0, 256, 0), file, 2, "a.parquet")
    try:
        for answer in actor({"assignment": [json.dumps(asdict(assignment))]}):
            kind, fields = json.loads(answer["answer"][0])
            if kind == "failure":
                break
    finally:
        stuck.set()
        actor._thread.shutdown()
    assert (kind, fields["unit"], fields["attempt"], fields["final"]) == ("failure", 7, 2, False)
    assert fields["reason"] == "nothing moved for 0 s behind its first 128 rows: its worker was ended"
    assert not ended  # only once the answer has been taken
