"""What the driver does about training workers that wait for room or die in their start, and about Ctrl-C meanwhile."""

from __future__ import annotations

import signal
import time
from typing import TYPE_CHECKING, Any

import pytest

from denoise_batch.cluster import capacity
from denoise_batch.training import worker_watch
from denoise_batch.training.place import Place
from denoise_batch.training.worker_watch import WorkerWatch

if TYPE_CHECKING:
    from pathlib import Path

PLACE = Place((1, 2), False, 0.875, 1, 2)


class Actors:
    """What Ray's state says of actors, by class, and what is missing."""

    def __init__(self) -> None:
        self.workers: list[dict[str, Any]] = []
        self.controllers: list[dict[str, Any]] = []
        self.missing: str | None = None


@pytest.fixture
def actors(monkeypatch: pytest.MonkeyPatch) -> Actors:
    known = Actors()
    monkeypatch.setattr(worker_watch, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(worker_watch, "_LOOK_SECONDS", 0.0)
    monkeypatch.setattr(worker_watch, "_ROOM_SECONDS", 0.1)
    monkeypatch.setattr(worker_watch, "_ABORT_SECONDS", 0.1)
    monkeypatch.setattr(
        capacity, "own_actors", lambda name: known.workers if name == "RayTrainWorker" else known.controllers
    )
    monkeypatch.setattr(capacity, "waiting_for", lambda *_: known.missing)
    return known


def _until(what: Any) -> None:
    deadline = time.monotonic() + 10
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_wait_for_room_is_told_until_there_are_workers(actors: Actors, tmp_path: Path) -> None:
    told: list[str] = []
    actors.missing = "1 CPU: the cluster has none free"
    with WorkerWatch(PLACE, tmp_path / "progress.json", lambda _: None, told.append) as watch:
        assert told[:1] == [actors.missing]  # at once
        _until(lambda: len(told) > 3)
        actors.workers = [{"State": "PENDING_CREATION"}]  # they have room, and begin
        time.sleep(0.05)
        seen = len(told)
        time.sleep(0.3)
        assert len(told) == seen
    assert watch.verdict is None


def test_workers_that_only_die_end_the_training(actors: Actors, tmp_path: Path) -> None:
    stopped: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: stopped.append(number))
    try:
        with WorkerWatch(PLACE, tmp_path / "progress.json", lambda _: None, lambda _: None) as watch:
            time.sleep(0.3)
            actors.workers = [{"State": "DEAD"}] * 11
            time.sleep(0.4)
            assert watch.verdict is None
            actors.workers = [{"State": "DEAD"}] * 12  # six times each of two
            _until(lambda: stopped)
    finally:
        signal.signal(signal.SIGINT, before)
    assert watch.verdict is not None
    assert "died 12 times with nothing trained in between" in watch.verdict.message


def test_a_controller_that_does_not_hear_ctrl_c_is_ended(
    actors: Actors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed: list[tuple[int, int]] = []
    monkeypatch.setattr(worker_watch.os, "kill", lambda *arguments: killed.append(arguments))
    actors.controllers = [{"State": "DEAD", "Pid": 1}, {"State": "ALIVE", "Pid": 4242}]
    before = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        with WorkerWatch(PLACE, tmp_path / "progress.json", lambda _: None, lambda _: None):
            time.sleep(0.3)
            assert not killed
            signal.raise_signal(signal.SIGINT)
            _until(lambda: killed)
    finally:
        signal.signal(signal.SIGINT, before)
    assert set(killed) == {(4242, signal.SIGKILL)}
