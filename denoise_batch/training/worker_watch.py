"""Watches over the training's workers from the driver: their progress, what they wait for, whether they ever begin."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from typing import TYPE_CHECKING, Any

from denoise_batch.cluster import capacity, lost_ray
from denoise_batch.errors import JobFailed
from denoise_batch.training.progress import TrainProgress

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from denoise_batch.training.place import Place

_WORKER_CLASS = "RayTrainWorker"
_POLL_SECONDS = 0.5
_LOOK_SECONDS = 2.0
_ROOM_SECONDS = 6.0  # without workers; those that have room begin sooner
_ABORT_SECONDS = 4.0  # for Ray Train to end after Ctrl-C; while it waits for room it does not hear of it for minutes
_CONTROLLER_CLASS = "TrainController"
_STARTS = 6
"""How often each worker may die with nothing trained in between. Ray Train would start them for ever."""


class WorkerWatch:
    """Tells how far the training is, and what its workers wait for.

        with WorkerWatch(place, path, progress, waiting) as watch:
            trainer.fit()

    Args:
        path: where worker 0 writes how far it is.
        progress: called with each new state, from a thread of the watch.
        waiting: called with what the cluster has no room for, again and again, from that thread.

    Attributes:
        verdict: why the training was stopped from here (by Ctrl-C's signal); None if it was not.

    Raises:
        JobFailed: on leaving: Ray itself died, or the cluster's head.
    """

    def __init__(
        self, place: Place, path: Path, progress: Callable[[TrainProgress], None], waiting: Callable[[str], None]
    ) -> None:
        self._place, self._path, self._progress, self._tell = place, path, progress, waiting
        self.verdict: JobFailed | None = None
        self._done = threading.Event()
        self._main = threading.current_thread() is threading.main_thread()
        self._thread = threading.Thread(target=self._watch, name="train-progress", daemon=True)
        self._shown = ""
        self._alive = self._looked = time.monotonic()
        self._dead_before = 0
        self._waits = False
        self._signals: tuple[int, int] | None = None
        self._wakeup_before = -1
        self._interrupted: float | None = None
        self._lost: JobFailed | None = None
        self._lock = threading.Lock()
        self._stack = contextlib.ExitStack()
        self._before: Any = None

    def __enter__(self) -> WorkerWatch:
        self._dead_before = _dead(capacity.own_actors(_WORKER_CLASS))
        self._tell_of_room()  # nothing is ours yet: what is not free is others'
        if self._main:
            self._signals = os.pipe2(os.O_NONBLOCK)
            self._wakeup_before = signal.set_wakeup_fd(self._signals[1], warn_on_full_buffer=False)
            # Not SIGINT: Ray Train's handler would wait for a controller that cannot do anything either.
            self._before = signal.signal(signal.SIGUSR1, signal.default_int_handler)
            self._stack.enter_context(lost_ray.watched(self._end_without_ray))
        self._thread.start()
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        with self._lock:
            self._done.set()
        while self._thread.is_alive() and self._lost is None:  # it may be waiting for an answer that never comes
            self._thread.join(_POLL_SECONDS)
        self._stack.close()
        if self._signals:
            signal.signal(signal.SIGUSR1, self._before)
            signal.set_wakeup_fd(self._wakeup_before)
            for end in self._signals:
                os.close(end)
        if self._lost is not None and error is not None:
            raise self._lost from error

    def _end_without_ray(self, why: JobFailed) -> None:
        with self._lock:
            self._lost = why
            if not self._done.is_set():
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

    def _watch(self) -> None:
        last = False
        while not last:
            last = self._done.wait(_POLL_SECONDS)
            with contextlib.suppress(OSError):
                self._show()
            with contextlib.suppress(Exception):  # what is to be ended may just have ended
                self._end_on_ctrl_c()
            if not last and self.verdict is None and time.monotonic() - self._looked > _LOOK_SECONDS:
                with contextlib.suppress(Exception):  # a look that failed says nothing
                    self._look()
                self._looked = time.monotonic()

    def _show(self) -> None:
        text = self._path.read_text(encoding="utf-8")
        if text != self._shown:
            self._shown = text
            self._alive, self._waits = time.monotonic(), False
            self._progress(TrainProgress(**json.loads(text)))

    def _look(self) -> None:
        place, workers = self._place, capacity.own_actors(_WORKER_CLASS)
        if time.monotonic() - self._alive < _ROOM_SECONDS and not self._waits:
            self._dead_before = _dead(workers)
            return
        most = place.workers[1]
        died = _dead(workers) - self._dead_before
        if died >= _STARTS * most and self._main:
            self.verdict = JobFailed(
                f"the training's workers died {died} times with nothing trained in between: most often memory ran out",
                hint="give fewer --workers or more memory, then run the same command again; -v shows Ray's log",
            )
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)  # which Ray Train handles
        elif _dead(workers) == len(workers):  # Ray Train makes them once there is room for all
            self._tell_of_room()

    def _tell_of_room(self) -> None:
        place = self._place
        missing = capacity.waiting_for(place.workers[0], place.cpus, 1.0 if place.gpu else 0.0)
        self._waits = missing is not None
        if missing:
            self._tell(missing)

    def _end_on_ctrl_c(self) -> None:
        """Ends the controller that does not end itself: the driver's handler of SIGINT waits for no more than that."""
        with contextlib.suppress(BlockingIOError):
            if self._signals and signal.SIGINT in os.read(self._signals[0], 64):
                self._interrupted = self._interrupted or time.monotonic()
        if self._interrupted and time.monotonic() - self._interrupted > _ABORT_SECONDS and not self._done.is_set():
            for actor in capacity.own_actors(_CONTROLLER_CLASS):  # it lives on the driver's machine
                if actor["State"] == "ALIVE":
                    os.kill(actor["Pid"], signal.SIGKILL)


def _dead(actors: list[dict[str, Any]]) -> int:
    return sum(actor["State"] == "DEAD" for actor in actors)
