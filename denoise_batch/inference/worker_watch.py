"""Watches over the workers while the driver waits for their answers: an end to waits that would have none.

Ray replaces workers that die for ever, and waits for room on the cluster for ever, without a word.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from denoise_batch.cluster import CALLS_RAY, capacity, full_ray_disk, lost_ray, ray_disk_is_full
from denoise_batch.errors import DenoiseBatchError, ResourceExhausted
from denoise_batch.inference.ledger import Failure, Receipt

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from denoise_batch.inference.pool_size import PoolSize

WORKERS = "workers"
"""The folder of marks, in the run's."""
MARK, LOADING = "worker-", ".loading"
"""The file that an actor leaves in the folder of marks begins so, and ends so until the model is loaded."""

_WATCH_SECONDS = 1.0
_SILENCE_SECONDS = 15.0
_FULL_DISK_SECONDS = 5.0  # of silence; Ray's own processes on a full disk end, and the driver with them
_WORKER_CLASS = "MapWorker"  # as Ray Data names its actors
_ROOM_SECONDS = 8.0  # of silence; a worker that has room begins sooner
_SOON_SECONDS = 2.0  # where there was no room from the start, and the wave before has ended its workers
_STEADY_SECONDS = 5.0
_DEATHS = 5
"""Workers that die with no unit answered in between, before it is the machine that is at fault and not the data."""
_Item = TypeVar("_Item")


@dataclass(frozen=True, slots=True)
class Working:
    """A unit is under way: an actor began it (0 rows), or has come so far."""

    unit: int
    rows: int


class Watch:
    """Ends the wait for workers that die again and again, or cannot start; tells what a wait for room is for.

    Each actor leaves a mark when it starts: with more marks than actors, some have died. It is not told by their units,
    which may die before a word of theirs arrives. As long as one worker gets on, those that cannot are no reason to
    stop.

        with Watch(marks, size, waiting) as watch:
            for batch in watch.over(batches):  # ends their wait
                watch.heard(answer)  # with each answer in it

    Args:
        marks: the folder where actors leave their marks, and nothing else is: it is listed every second. None where
            they cannot (units are staged in an object store): deaths are then counted by Ray's restarts alone, once
            nothing has been heard for a while.
        waiting: told what the cluster has no room for, again and again, and "" once it has. From another thread, while
            nobody uses an answer.

    Raises:
        ResourceExhausted: on leaving, as is
        JobFailed: Ray itself died, or the cluster's head.
    """

    def __init__(self, marks: Path | None, size: PoolSize, waiting: Callable[[str], None] = lambda _: None) -> None:
        self._folder, self._size, self._tell = marks, size, waiting
        self._actors = size.actors  # that may be alive; more once machines have joined
        self._told = ""
        self._lost: set[str] = set()
        self._left = threading.Event()
        self._waiting, self._lock = False, threading.Lock()
        self._verdict: DenoiseBatchError | None = None
        self._starts = 0
        self._base = 0  # starts when a unit was last answered
        self._restarts: int | None = None  # of those that left no mark, when the silence was first noticed
        self._last = time.monotonic()
        self._under_way: dict[int, tuple[int, float]] = {}
        self._before: Any = None
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Watch:
        # Nothing is ours yet: what is not free is others'.
        self._told = capacity.waiting_for(1, self._size.cpus, self._size.gpus) or ""
        if self._folder:
            self._folder.mkdir(exist_ok=True)  # a run of an earlier version's has none
            for name in self._marks():
                (self._folder / name).unlink(missing_ok=True)
        if threading.current_thread() is threading.main_thread():
            # A signal of its own: Ctrl-C may be ignored (a shell does that to what it runs in the background).
            self._before = signal.signal(signal.SIGUSR1, signal.default_int_handler)
            threading.Thread(target=self._watch, daemon=True, name=f"{CALLS_RAY}infer-watch").start()
            # Not that thread, which may be waiting for an answer of Ray's.
            self._stack.enter_context(lost_ray.watched(self._end))
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        self._left.set()
        self._stack.close()
        if self._before is not None:
            signal.signal(signal.SIGUSR1, self._before)
        if self._verdict is not None and error is not None and error is not self._verdict:
            raise self._verdict from error

    def over(self, items: Iterator[_Item]) -> Iterator[_Item]:
        """The items; the wait for the next one ends with the verdict, but nobody is disturbed who uses an item."""
        while True:
            if self._verdict is not None:
                raise self._verdict
            try:
                self._waiting = True
                item = next(items)
            except StopIteration:
                return
            finally:
                with self._lock:  # a signal that was sent comes now, not when the item is used
                    self._waiting = False
            yield item

    def heard(self, answer: Receipt | Failure | Working) -> None:
        """Takes note of a sign of life."""
        self._last = time.monotonic()
        if isinstance(answer, Receipt | Failure):
            self._under_way.pop(answer.unit, None)
            self._base = self._starts
        else:
            begun, _ = self._under_way.get(answer.unit, (self._starts, 0.0))
            self._under_way[answer.unit] = (begun, self._last)

    def _watch(self) -> None:
        while self._verdict is None and not self._left.wait(_WATCH_SECONDS):
            try:
                verdict = self._judge()
            except Exception:  # a look that failed says nothing
                continue
            if verdict is not None:
                self._end(verdict)

    def _end(self, verdict: DenoiseBatchError) -> None:
        with self._lock:
            if self._verdict is not None:
                return
            self._verdict = verdict
            if self._waiting and not self._left.is_set():
                # Ray's waits end for nothing but signals.
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

    def _judge(self) -> DenoiseBatchError | None:
        marks = self._marks()
        self._starts, now = len(marks), time.monotonic()
        full = full_ray_disk() if now - self._last > _FULL_DISK_SECONDS else None
        if full is not None:
            return ray_disk_is_full(full)
        if now - self._last > (_SOON_SECONDS if self._told else _ROOM_SECONDS):
            self._tell_of_room()
        if now - self._last > _SILENCE_SECONDS:
            # Of those that left a mark is judged below: a death is known before the next one's mark.
            restarts, lost = _restarts() - self._starts, capacity.lost_nodes()
            if self._restarts is None or lost != self._lost:  # a lost machine's workers die for no fault of their own
                self._restarts, self._lost = restarts, lost
            if restarts - self._restarts >= _DEATHS:
                return self._killed(f"{restarts - self._restarts} times before they could begin")
        else:
            self._restarts = None
        dead = self._starts - self._base - self._actors
        if dead >= _DEATHS:  # or are they on machines that joined?
            size = self._size
            now_living = min(size.most, capacity.room(capacity.living_nodes(), size.cpus, size.gpus))
            self._actors = max(self._actors, now_living)
            dead = self._starts - self._base - self._actors
        getting_on = any(
            self._starts - begun >= _DEATHS and now - last < _STEADY_SECONDS
            for begun, last in list(self._under_way.values())
        )
        if dead < _DEATHS or getting_on:
            return None
        doing = f"and none finished a unit (units {', '.join(map(str, sorted(self._under_way)))})"
        if sum(name.endswith(LOADING) for name in marks) >= _DEATHS:
            doing = "while they loaded the model"
        return self._killed(f"{dead} times in a row {doing}")

    def _marks(self) -> list[str]:
        paths = self._folder.iterdir() if self._folder else ()
        return [path.name for path in paths if path.name.startswith(MARK)]

    def _tell_of_room(self) -> None:
        missing = capacity.waiting_for(1, self._size.cpus, self._size.gpus)
        placed = any(
            actor["State"] == "ALIVE" or (actor["State"] == "PENDING_CREATION" and actor["Pid"])
            for actor in capacity.own_actors(_WORKER_CLASS)
        )
        told = missing if missing and not placed else ""
        with self._lock:
            if self._waiting and (told or self._told):
                self._told = told
                self._tell(told)

    def _killed(self, how: str) -> ResourceExhausted:
        return ResourceExhausted(
            f"the workers died {how}: most often memory ran out",
            hint="give fewer --workers, a smaller --batch-size or more memory, then run the same command again to go "
            "on; -v shows Ray's own log",
        )


def _restarts() -> int:
    """How often Ray replaced actors of this driver that died: those that leave no mark die before our code runs."""
    return sum(int(actor["NumRestarts"]) for actor in capacity.own_actors(""))
