"""That a Ray which is gone is noticed without asking it, and ends the waits for it."""

from __future__ import annotations

import atexit
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
import ray
from ray._private import worker

from denoise_batch import cluster
from denoise_batch.cluster import capacity, lost_ray
from denoise_batch.errors import JobFailed
from denoise_batch.inference import worker_watch
from denoise_batch.inference.pool_size import PoolSize
from denoise_batch.training.place import Place
from denoise_batch.training.worker_watch import WorkerWatch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


class Connected:
    """A Ray that this process seems to use.

    Attributes:
        dead: the processes that it lost.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, own: bool, address: str) -> None:
        self.dead: list[str] = []
        node = SimpleNamespace(
            all_processes={"raylet": [object()]} if own else {},
            dead_processes=lambda: [(name, object()) for name in self.dead],
        )
        monkeypatch.setattr(worker, "_global_node", node)
        monkeypatch.setattr("ray.is_initialized", lambda: True)
        monkeypatch.setattr("ray.get_runtime_context", lambda: SimpleNamespace(gcs_address=address))


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """A cluster's head, as far as a driver's watch can tell."""
    monkeypatch.setattr(lost_ray, "_LOOK_SECONDS", 0.02)
    monkeypatch.setattr(lost_ray, "_REFUSED_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0), backlog=1000) as listening:
        Connected(monkeypatch, own=False, address=f"127.0.0.1:{listening.getsockname()[1]}")
        yield listening


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> Connected:
    """A Ray that was started here, and is not reached by its address."""
    monkeypatch.setattr(lost_ray, "_LOOK_SECONDS", 0.02)
    monkeypatch.setattr(lost_ray, "_answers", lambda _: pytest.fail("its processes tell"))
    return Connected(monkeypatch, own=True, address="127.0.0.1:1")


@pytest.fixture
def waits() -> Iterator[Callable[..., None]]:
    """Ray, asked for anything once its service is gone."""
    over = threading.Event()

    def wait(*_: object) -> None:
        over.wait(30)

    yield wait
    over.set()


def _found(seconds: float) -> list[JobFailed]:
    found, told = list[JobFailed](), threading.Event()
    with lost_ray.watched(lambda verdict: (found.append(verdict), told.set())[0]):
        told.wait(seconds)
    return found


@pytest.mark.usefixtures("head")
def test_a_head_that_answers_is_not_lost() -> None:
    assert _found(0.6) == []
    assert not lost_ray.is_gone()


def test_a_head_that_answers_no_more_is_named(head: socket.socket) -> None:
    port = head.getsockname()[1]
    head.close()
    (verdict,) = _found(20)
    assert verdict.message == f"the cluster's head at 127.0.0.1:{port} does not answer any more"
    assert "once it is up" in verdict.hint
    assert lost_ray.is_gone()


@pytest.mark.usefixtures("head")
def test_a_head_that_comes_back_in_time_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([False] * 3 + [True] + [False] * 3)
    monkeypatch.setattr(lost_ray, "_REFUSED_SECONDS", 0.1)
    monkeypatch.setattr(lost_ray, "_answers", lambda _: next(answers, True))
    assert _found(0.6) == []


@pytest.mark.parametrize(("name", "gone"), [("gcs_server", True), ("raylet", False)])
def test_processes_that_ray_never_replaces_are_missed_at_once(own: Connected, name: str, gone: bool) -> None:
    own.dead = ["log_monitor"]
    assert _found(0.2) == []
    own.dead = ["log_monitor", name]
    (verdict,) = _found(20)
    assert f"Ray's own process on this machine ({name}) died" in verdict.message
    assert lost_ray.is_gone() is gone


def test_the_wait_for_units_ends_though_the_watch_itself_waits_for_ray(
    own: Connected, waits: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capacity, "waiting_for", lambda *_: None)
    monkeypatch.setattr(worker_watch, "_WATCH_SECONDS", 0.02)
    monkeypatch.setattr(worker_watch, "full_ray_disk", waits)
    monkeypatch.setattr(worker_watch, "_FULL_DISK_SECONDS", 0.0)

    def answers() -> Iterator[int]:
        own.dead = ["gcs_server"]
        time.sleep(30)
        yield 1

    begun = time.monotonic()
    watch = worker_watch.Watch(tmp_path / "workers", PoolSize(1, 1, 1, 1, 0.9, 0.0))
    with pytest.raises(JobFailed, match="gcs_server"), watch:
        list(watch.over(answers()))
    assert time.monotonic() - begun < 10


def test_a_training_ends_though_its_watch_itself_waits_for_ray(
    head: socket.socket, waits: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capacity, "waiting_for", lambda *_: None)
    monkeypatch.setattr(capacity, "own_actors", lambda _: [])
    monkeypatch.setattr("denoise_batch.training.worker_watch._POLL_SECONDS", 0.02)
    monkeypatch.setattr("denoise_batch.training.worker_watch._LOOK_SECONDS", 0.0)
    begun = time.monotonic()
    watch = WorkerWatch(Place((1, 1), False, 0.875, 1, 1), tmp_path / "progress", lambda _: None, lambda _: None)

    def fit() -> None:
        monkeypatch.setattr(capacity, "own_actors", waits)
        head.close()
        time.sleep(30)

    with pytest.raises(JobFailed, match="does not answer any more"), watch:
        fit()
    assert time.monotonic() - begun < 10


@pytest.mark.parametrize(("name", "ended"), [("gcs_server", True), ("raylet", False)])
def test_a_process_that_does_not_come_back_from_ray_is_ended_with_the_error(
    own: Connected, monkeypatch: pytest.MonkeyPatch, name: str, ended: bool
) -> None:
    monkeypatch.setattr(lost_ray, "_OWN_SECONDS", 0.05)
    own.dead, said = [name], list[JobFailed]()
    with lost_ray.ended_by(said.append), lost_ray.watched(lambda _: None):
        time.sleep(0.5)
    assert [name in error.message for error in said] == [True] * ended


def test_the_end_of_a_command_says_why() -> None:
    script = (
        "import threading, time; from denoise_batch import console; from denoise_batch.errors import JobFailed\n"
        "threading.Thread(target=console._end, args=(JobFailed('Ray is gone', hint='again'),)).start()\n"
        "time.sleep(30)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=20)
    assert (done.returncode, done.stderr) == (1, "error: Ray is gone\nhint: again\n")


def test_a_ray_that_is_gone_is_not_shut_down(own: Connected, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its core would end this process before the error is shown, or hold it up when Python ends."""
    left = []
    monkeypatch.setattr("ray.shutdown", lambda: pytest.fail("shut down"))
    monkeypatch.setattr(atexit, "unregister", left.append)
    own.dead = ["gcs_server"]
    cluster._shut_down(None)
    assert left == [ray.shutdown]
