"""Units through Ray Data: one a block, to stateful actors that write files and answer with receipts.

Image bytes never enter the object store: what goes in is a unit's description, what comes back, as soon as it is known,
is that it was begun, how far it is, and its receipt or its failure.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import signal
import threading
import time
import uuid
import warnings
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from denoise_batch import errors
from denoise_batch.cluster import full_ray_disk, ray_died, ray_disk_is_full, refuse_unsafe_switches
from denoise_batch.errors import DenoiseBatchError, FlagError, JobFailed, ResourceExhausted
from denoise_batch.inference.denoise_unit import Assignment, UnitOptions, denoise_unit
from denoise_batch.inference.ledger import Failure, Receipt
from denoise_batch.inference.plan import PlannedFile, Unit

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_RAY_TENSOR_TYPES = (
    "ray.data.arrow_tensor",
    "ray.data.arrow_tensor_v2",
    "ray.data.arrow_variable_shaped_tensor",
    "ray.data.arrow_pickled_object",
)
_PROGRESS_SECONDS = 1.0
STUCK_SECONDS = 900.0
"""How long a unit may stand still: a decoder that loops, a file system that does not answer. A chunk takes seconds, and
closing and verifying a file of 200 MB at most minutes."""

_WATCH_SECONDS = 1.0
_SILENCE_SECONDS = 15.0
_FULL_DISK_SECONDS = 5.0  # of silence; Ray's own processes on a full disk end, and the driver with them
_STEADY_SECONDS = 5.0
_DEATHS = 5
"""Workers that die with no unit answered in between, before it is the machine that is at fault and not the data."""
_Item = TypeVar("_Item")
# The file that an actor leaves in the staging folder begins so, and ends so until the model is loaded.
_MARK, _LOADING = "worker-", ".loading"


@dataclass(frozen=True, slots=True)
class PoolSize:
    """How many actors, and what each takes of the cluster."""

    actors: int
    threads: int
    cpus: float
    gpus: float


@dataclass(frozen=True, slots=True)
class Working:
    """A unit is under way: an actor began it (0 rows), or has come so far."""

    unit: int
    rows: int


@dataclass(frozen=True, slots=True)
class ModelToLoad:
    """The model's folder, its hash as planned, and the images of a forward pass (None: what suits the device)."""

    folder: str
    sha256: str
    batch: int | None
    device: str


def pool_size(resources: dict[str, Any], workers: int | None, device: str, units: int, node_cores: int) -> PoolSize:
    """One actor for each GPU, or one single-threaded actor for each core; never more actors than units.

    Args:
        resources: `ray.cluster_resources()`.
        workers: a number of actors asked for, or None.
        device: `auto`, `cpu` or `cuda`.
        units: of the whole run, so that a resumed or retried part of it computes with the same threads.
        node_cores: of the smallest node: an actor lives on one.

    Raises:
        FlagError: `cuda` was asked for and no node has a GPU.
    """
    gpus = int(resources.get("GPU", 0)) if device != "cpu" else 0
    if device == "cuda" and not gpus:
        raise FlagError("--device cuda: Ray finds no GPU", hint="give --device cpu or auto")
    cores = max(1, int(resources.get("CPU", 1)))
    most = gpus or cores
    actors = max(1, min(workers or most, most, units))
    threads = max(1, min(cores // actors, node_cores))
    # Less than the whole: a pool that takes every CPU leaves none for Ray Data's other operators, and hangs.
    return PoolSize(actors, threads, 0.9 if gpus else threads - 0.1, 1.0 if gpus else 0.0)


def process_units(
    assignments: Sequence[Assignment], options: UnitOptions, model: ModelToLoad, size: PoolSize, *, verbose: bool
) -> Iterator[Receipt | Failure | Working]:
    """Gives units to a pool of actors and their answers back as they come. A unit that kills its actor has no answer.

    Ray must be connected.

    Raises:
        JobFailed: actors cannot start.
        ResourceExhausted: workers die again and again, or Ray's object store or disk is full.
    """
    import ray.data

    # Ray may drop a block whose worker died, because answers are reconciled against the assignments. With one task in
    # flight for each actor (so that no unit is charged for its neighbour's crash) a pool is at its busiest at 1.0.
    # The smallest block size hands on each answer when it is made.
    wanted = {
        "max_errored_blocks": -1,
        "enable_progress_bars": False,
        "print_on_execution_start": verbose,
        "target_max_block_size": 1,
    }
    context = ray.data.DataContext.get_current()
    before = {name: getattr(context, name) for name in wanted}
    threshold = context.autoscaling_config.actor_pool_util_upscaling_threshold
    for name, value in wanted.items():
        setattr(context, name, value)
    context.autoscaling_config.actor_pool_util_upscaling_threshold = 1.0
    try:
        with _quiet(verbose), _Watch(Path(options.staging), size.actors) as watch:
            blocks = [{"assignment": json.dumps(asdict(assignment))} for assignment in assignments]
            answers = ray.data.from_items(blocks, override_num_blocks=len(blocks)).map_batches(
                DenoiseUnit,
                fn_constructor_kwargs={"options": options, "model": model, "size": size},
                batch_size=1,
                compute=ray.data.ActorPoolStrategy(min_size=1, max_size=size.actors, max_tasks_in_flight_per_actor=1),
                num_cpus=size.cpus,
                num_gpus=size.gpus or None,
                # A dead actor is replaced (Ray's default), but its unit is not given to the next one for ever.
                max_task_retries=0,
            )
            # Nothing is fetched ahead: an answer would wait for the next one before it could be committed.
            batches = answers.iter_batches(batch_size=None, prefetch_batches=0, batch_format="pyarrow")
            for batch in watch.over(iter(batches)):
                for record in batch.column("answer").to_pylist():
                    kind, fields = json.loads(record)
                    answer = _ANSWERS[kind](**fields)
                    watch.heard(answer)
                    yield answer
    except ray.exceptions.RayError as error:
        raise _ray_failed(error) from error
    finally:
        for name, value in before.items():
            setattr(context, name, value)
        context.autoscaling_config.actor_pool_util_upscaling_threshold = threshold


_ANSWERS: dict[str, type[Receipt | Failure | Working]] = {
    "receipt": Receipt,
    "failure": Failure,
    "working": Working,
}


class DenoiseUnit:
    """The actor: loads the model once, then makes one unit's file a call."""

    def __init__(self, options: UnitOptions, model: ModelToLoad, size: PoolSize) -> None:
        refuse_unsafe_switches()  # a node's environment may be another than the driver's
        mark = Path(options.staging, f"{_MARK}{uuid.uuid4().hex}{_LOADING}")
        with contextlib.suppress(OSError):  # a full disk is named when the unit's file is written
            mark.touch()
        import pyarrow as pa

        # Imported here: the driver never loads torch.
        from denoise_batch.bundle import read_bundle
        from denoise_batch.denoiser import Denoiser

        for name in _RAY_TENSOR_TYPES:
            # Ray registers types whose metadata it may unpickle; without them pyarrow gives the plain storage.
            with contextlib.suppress(pa.ArrowException, KeyError):
                pa.unregister_extension_type(name)
        bundle = read_bundle(Path(model.folder))
        if bundle.sha256 != model.sha256:
            raise DenoiseBatchError(f"{model.folder} changed since the run was planned", hint="put the model back")
        self._options = options
        self._denoiser = Denoiser(bundle, device=model.device, threads=size.threads, batch=model.batch)
        # One thread for all units: OpenMP keeps a team of threads for each thread that ever asked for one.
        self._thread = ThreadPoolExecutor(1)
        with contextlib.suppress(OSError):
            mark.rename(mark.with_suffix(""))

    def __call__(self, batch: dict[str, Any]) -> Iterator[dict[str, list[str]]]:
        fields = json.loads(str(batch["assignment"][0]))
        unit, file = Unit(**fields.pop("unit")), PlannedFile(**fields.pop("file"))
        done = 0

        def on_rows(rows: int) -> None:
            nonlocal done
            done = rows

        yield _answer("working", asdict(Working(unit.index, 0)))
        future = self._thread.submit(
            denoise_unit, Assignment(unit, file, **fields), self._options, self._forward, self._fingerprint, on_rows
        )
        seen, since = done, time.monotonic()
        while not wait([future], timeout=_PROGRESS_SECONDS).done:
            yield _answer("working", asdict(Working(unit.index, done)))
            if done != seen:
                seen, since = done, time.monotonic()
            elif time.monotonic() - since > STUCK_SECONDS:
                reason = f"nothing moved for {STUCK_SECONDS:.0f} s behind its first {done:,} rows: its worker was ended"
                yield _answer("failure", Failure(unit.index, fields["attempt"], reason).to_json())
                time.sleep(_PROGRESS_SECONDS)  # for the answer to leave
                os._exit(1)  # a thread cannot be stopped
        result = future.result()
        yield _answer("receipt" if isinstance(result, Receipt) else "failure", result.to_json())

    def _forward(self, noisy: Any) -> Any:
        return self._denoiser.run(noisy, self._options.extras)

    def _fingerprint(self) -> str:
        import pyarrow as pa

        return f"{self._denoiser.fingerprint}; pyarrow {pa.__version__}"


def _answer(kind: str, record: dict[str, Any]) -> dict[str, list[str]]:
    return {"answer": [json.dumps([kind, record])]}


class _Watch:
    """Ends the wait for workers that die again and again, or cannot start: Ray would replace them for ever.

    Each actor leaves a mark in the staging folder when it starts: with more marks than actors, some have died. It is
    not told by their units, which may die before a word of theirs arrives. As long as one worker gets on, those that
    cannot are no reason to stop.

        with _Watch(staging, actors) as watch:
            for batch in watch.over(batches):  # ends their wait
                watch.heard(answer)  # with each answer in it

    Raises:
        ResourceExhausted: on leaving, as is
        JobFailed: Ray itself died.
    """

    def __init__(self, staging: Path, actors: int) -> None:
        self._staging, self._actors = staging, actors
        self._left = threading.Event()
        self._waiting, self._lock = False, threading.Lock()
        self._verdict: DenoiseBatchError | None = None
        self._starts = 0
        self._base = 0  # starts when a unit was last answered
        self._restarts: int | None = None  # when the silence was first noticed
        self._last = time.monotonic()
        self._under_way: dict[int, tuple[int, float]] = {}
        self._before: Any = None

    def __enter__(self) -> _Watch:
        for mark in self._staging.glob(f"{_MARK}*"):
            mark.unlink(missing_ok=True)
        if threading.current_thread() is threading.main_thread():
            # A signal of its own: Ctrl-C may be ignored (a shell does that to what it runs in the background).
            self._before = signal.signal(signal.SIGUSR1, signal.default_int_handler)
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        self._left.set()
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
        if isinstance(answer, Working):
            begun, _ = self._under_way.get(answer.unit, (self._starts, 0.0))
            self._under_way[answer.unit] = (begun, self._last)
        else:
            self._under_way.pop(answer.unit, None)
            self._base = self._starts

    def _watch(self) -> None:
        while not self._left.wait(_WATCH_SECONDS):
            try:
                self._verdict = self._judge()
            except Exception:  # a look that failed says nothing
                continue
            if self._verdict is not None:
                with self._lock:
                    if self._waiting and not self._left.is_set():
                        # Ray's waits end for nothing but signals.
                        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
                return

    def _judge(self) -> DenoiseBatchError | None:
        marks = [path.name for path in self._staging.iterdir() if path.name.startswith(_MARK)]
        self._starts, now = len(marks), time.monotonic()
        full = full_ray_disk() if now - self._last > _FULL_DISK_SECONDS else None
        if full is not None:
            return ray_disk_is_full(full)
        if ray_died():
            return JobFailed(
                "Ray's own process on this machine (raylet) died: it was killed, or memory ran out",
                hint="what is done is kept; run the same command again to go on",
            )
        if now - self._last > _SILENCE_SECONDS:
            restarts = _restarts()
            if self._restarts is None:
                self._restarts = restarts
            if restarts - self._restarts >= _DEATHS:
                return self._killed(f"{restarts} times before they could begin")
        else:
            self._restarts = None
        dead = self._starts - self._base - self._actors
        getting_on = any(
            self._starts - begun >= _DEATHS and now - last < _STEADY_SECONDS
            for begun, last in list(self._under_way.values())
        )
        if dead < _DEATHS or getting_on:
            return None
        doing = f"and none finished a unit (units {', '.join(map(str, sorted(self._under_way)))})"
        if sum(name.endswith(_LOADING) for name in marks) >= _DEATHS:
            doing = "while they loaded the model"
        return self._killed(f"{dead} times in a row {doing}")

    def _killed(self, how: str) -> ResourceExhausted:
        return ResourceExhausted(
            f"the workers died {how}: most often memory ran out",
            hint="give fewer --workers, a smaller --batch-size or more memory, then run the same command again to go "
            "on; -v shows Ray's own log",
        )


def _restarts() -> int:
    """How often Ray replaced actors of this driver that died: those that leave no mark die before our code runs."""
    import ray
    from ray._private import state

    job = ray.get_runtime_context().get_job_id()
    return sum(int(actor["NumRestarts"]) for actor in state.actors().values() if actor["JobID"] == job)


def _ray_failed(error: BaseException) -> DenoiseBatchError:
    """Ray's word that it cannot go on, as the error of ours that caused it or as one that names what is missing."""
    import ray

    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, DenoiseBatchError):
            return cause
        for kind, what in (
            (ray.exceptions.ObjectStoreFullError, "Ray's object store is full"),
            (ray.exceptions.OutOfDiskError, "the disk that Ray spills to is full"),
            (ray.exceptions.OutOfMemoryError, "a node of the cluster ran out of memory"),
        ):
            if isinstance(cause, kind):
                return ResourceExhausted(what, hint="make room, then run the same command again to go on")
        cause = getattr(cause, "cause", None) or cause.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # What an actor raises while it starts comes as text alone.
    named = re.match(r"denoise_batch\.errors\.(\w+): (.+)", lines[-1]) if lines else None
    if named and issubclass(getattr(errors, named[1], Exception), DenoiseBatchError):
        raised: DenoiseBatchError = getattr(errors, named[1])(
            named[2], hint="once that is mended, run the same command again to go on"
        )
        return raised
    return JobFailed(
        f"the workers failed: {lines[-1] if lines else type(error).__name__}",
        hint="what is done is kept; run with -v for Ray's own log",
    )


def cores_of_a_node() -> int:
    """CPU cores of the smallest living node that has any."""
    import ray

    found = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    return min((cores for cores in found if cores), default=1)


def living_nodes() -> set[str]:
    """The ids of the cluster's living nodes."""
    import ray

    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


@contextlib.contextmanager
def _quiet(verbose: bool) -> Iterator[None]:
    """Keeps Ray Data's log off the console (its file goes on): it repeats with tracebacks what answers say."""
    if verbose:
        yield
        return
    handlers = [h for h in logging.getLogger("ray.data").handlers if isinstance(h, logging.StreamHandler)]
    levels = [handler.level for handler in handlers]
    for handler in handlers:
        handler.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            # There is no other way yet to say `max_task_retries`.
            warnings.filterwarnings("ignore", message=".*ray_remote_args.*")
            yield
    finally:
        for handler, level in zip(handlers, levels, strict=True):
            handler.setLevel(level)
