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
import time
import uuid
import warnings
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from denoise_batch import errors
from denoise_batch.cluster.shared_files import not_seen
from denoise_batch.errors import DenoiseBatchError, JobFailed, ResourceExhausted
from denoise_batch.forward import MOST_ROWS
from denoise_batch.inference.denoise_unit import Assignment, UnitOptions, denoise_unit
from denoise_batch.inference.ledger import Failure, Receipt
from denoise_batch.inference.plan import PlannedFile, Unit
from denoise_batch.inference.unit_metrics import UnitMetrics
from denoise_batch.inference.worker_watch import LOADING, MARK, WORKERS, Watch, Working
from denoise_batch.process.environment import refuse_unsafe_switches
from denoise_batch.process.freed_memory import return_freed_memory
from denoise_batch.storage import is_uri

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from denoise_batch.extra_columns import Denoised
    from denoise_batch.images import Polarity
    from denoise_batch.inference.pool_size import PoolSize
    from denoise_batch.precision import Precision

_RAY_TENSOR_TYPES = (
    "ray.data.arrow_tensor",
    "ray.data.arrow_tensor_v2",
    "ray.data.arrow_variable_shaped_tensor",
    "ray.data.arrow_pickled_object",
)
_PROGRESS_SECONDS = 1.0
_UNITS_FOR_AHEAD = 4  # an actor
_RETURN_SECONDS = 30.0
"""Between two times that freed memory goes back, with the end of a unit: taken anew it costs some 0.05 s."""
STUCK_SECONDS = 900.0
"""How long a unit may stand still: a decoder that loops, a file system that does not answer. A chunk takes seconds, and
closing and verifying a file of 200 MB at most minutes."""


@dataclass(frozen=True, slots=True)
class ModelToLoad:
    """The model's folder, its hash as planned, and how it computes; a batch of None is what suits the device."""

    folder: str
    sha256: str
    batch: int | None
    device: str
    precision: Precision


def process_units(
    assignments: Sequence[Assignment],
    options: UnitOptions,
    model: ModelToLoad,
    size: PoolSize,
    *,
    ahead: bool,
    verbose: bool,
    waiting: Callable[[str], None] = lambda _: None,
) -> Iterator[Receipt | Failure | Working]:
    """Gives units to a pool of actors and their answers back as they come.

    A unit that kills its actor has no answer, and where a node goes in a bad moment none has one that is left.

    Ray must be connected.

    Args:
        ahead: where units are many, gives an actor its next one before it has done the last, so that it need not wait
            for Ray (0.15 s a unit). One that dies takes both along.
        waiting: see `Watch`.

    Raises:
        JobFailed: actors cannot start.
        ResourceExhausted: workers die again and again, or Ray's object store or disk is full.
    """
    import ray.data

    # Ray may drop a block whose worker died, because answers are reconciled against the assignments. The smallest block
    # size hands on each answer when it is made. A pool whose actors all have a task is at 1.0, and may grow.
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
        with _quiet(verbose), Watch(_marks_in(options), size, waiting) as watch:
            # The actor that is ready first would take the others' share of a few.
            in_flight = 2 if ahead and len(assignments) >= _UNITS_FOR_AHEAD * size.actors else 1
            blocks = [{"assignment": json.dumps(asdict(assignment))} for assignment in assignments]
            answers = ray.data.from_items(blocks, override_num_blocks=len(blocks)).map_batches(
                DenoiseUnit,
                fn_constructor_kwargs={"options": options, "model": model, "size": size},
                batch_size=1,
                compute=ray.data.ActorPoolStrategy(
                    min_size=min(size.least, len(blocks)),
                    max_size=min(size.most, len(blocks)),
                    initial_size=min(size.actors, len(blocks)),
                    max_tasks_in_flight_per_actor=in_flight,
                ),
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
    except ray.exceptions.ActorUnavailableError:
        # An actor's node went while Ray Data asked the actor something of its own, which it lets end everything. What
        # has no answer is given out again, as what died with its worker is.
        return
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
        marks = _marks_in(options)
        _check_seen(*([options.staging] if marks else []), model.folder)
        mark = marks / f"{MARK}{uuid.uuid4().hex}{LOADING}" if marks else None
        with contextlib.suppress(OSError):  # a full disk is named when the unit's file is written
            if mark:
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
        # No chunk of rows is larger, and a GPU's buffers are made for whole batches.
        batch = None if model.batch is None else min(model.batch, MOST_ROWS)
        self._denoiser = Denoiser(
            bundle, device=model.device, threads=size.threads, batch=batch, precision=model.precision
        )
        taken, given = options.pixel_dtypes
        self._denoiser.prepare(taken, options.model_polarity, given, options.extras)
        # One thread for all units: OpenMP keeps a team of threads for each thread that ever asked for one.
        self._thread = ThreadPoolExecutor(1)
        self._metrics = UnitMetrics()
        self._returned = time.monotonic()
        with contextlib.suppress(OSError):
            if mark:
                mark.rename(mark.with_suffix(""))

    def __call__(self, batch: dict[str, Any]) -> Iterator[dict[str, list[str]]]:
        fields = json.loads(str(batch["assignment"][0]))
        unit, file = Unit(**fields.pop("unit")), PlannedFile(**fields.pop("file"))
        done = 0

        def on_rows(rows: int) -> None:
            nonlocal done
            done = rows

        yield _answer("working", asdict(Working(unit.index, 0)))
        self._metrics.begin()
        future = self._thread.submit(
            denoise_unit,
            Assignment(unit, file, **fields),
            self._options,
            self._forward,
            self._fingerprint,
            on_rows,
        )
        seen, since = done, time.monotonic()
        while not wait([future], timeout=_PROGRESS_SECONDS).done:
            yield _answer("working", asdict(Working(unit.index, done)))
            self._metrics.progress(done)
            if done != seen:
                seen, since = done, time.monotonic()
            elif time.monotonic() - since > STUCK_SECONDS:
                reason = f"nothing moved for {STUCK_SECONDS:.0f} s behind its first {done:,} rows: its worker was ended"
                yield _answer("failure", Failure(unit.index, fields["attempt"], reason).to_json())
                time.sleep(_PROGRESS_SECONDS)  # for the answer to leave
                os._exit(1)  # a thread cannot be stopped
        result = future.result()
        if time.monotonic() - self._returned > _RETURN_SECONDS:
            return_freed_memory()
            self._returned = time.monotonic()
        self._metrics.end(result)
        yield _answer("receipt" if isinstance(result, Receipt) else "failure", result.to_json())

    def _forward(self, pixels: Any, polarity: Polarity, dtype: str) -> Denoised:
        return self._denoiser.denoise(pixels, polarity, dtype, self._options.extras)

    def _fingerprint(self) -> str:
        import pyarrow as pa

        return f"{self._denoiser.fingerprint}; pyarrow {pa.__version__}"


def _marks_in(options: UnitOptions) -> Path | None:
    """Where actors leave their marks, beside the staged files; None where units are staged in an object store."""
    return None if is_uri(options.staging) else Path(options.staging).with_name(WORKERS)


def _check_seen(*paths: str) -> None:
    """Refuses a machine that joined when the others had been asked already, and does not see the run's files."""
    for path in paths:
        if not Path(path).exists():
            import ray.util

            raise not_seen(path, ray.util.get_node_ip_address())


def _answer(kind: str, record: dict[str, Any]) -> dict[str, list[str]]:
    return {"answer": [json.dumps([kind, record])]}


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
