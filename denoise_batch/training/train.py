"""Trains a model with Ray Train, and writes its folder.

    bundle = train(TrainSettings(output=Path("denoise-model")), progress=print)

While it runs, everything is in a hidden folder beside the output (`.denoise-model.training`): the settings, a
checkpoint of the last epoch, the history, TensorBoard's curves. The same call again goes on from there,
whatever ended the run. When it is done, the output appears by one rename and the hidden folder goes; the same call then
does nothing.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from denoise_batch import errors, storage
from denoise_batch.bundle import MODEL_FILE, Bundle, find_bundle, read_bundle, training_folder
from denoise_batch.bundle.history import HISTORY_FILE
from denoise_batch.bundle.saving import save_bundle
from denoise_batch.cluster import capacity, connect
from denoise_batch.cluster.shared_files import check_seen_by_nodes
from denoise_batch.errors import Interrupted, JobFailed, OutputError, RequestError
from denoise_batch.process.environment import environment, refuse_old_ray_train
from denoise_batch.storage import publishing
from denoise_batch.training.card import card_of
from denoise_batch.training.data import held_out_count, open_parquet
from denoise_batch.training.failure import left_failure
from denoise_batch.training.place import choose_place
from denoise_batch.training.request import (
    RAY_FOLDER,
    begun,
    digest_of,
    enter,
    identity_of,
    made_before,
    remove_left_over,
)
from denoise_batch.training.worker_watch import WorkerWatch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from denoise_batch.training.checkpoint import Weights
    from denoise_batch.training.data import ParquetImages
    from denoise_batch.training.loop import LoopConfig
    from denoise_batch.training.place import Place
    from denoise_batch.training.progress import TrainProgress
    from denoise_batch.training.recipes import Recipe, TrainSettings

MAX_FAILURES = 5
"""How often the workers are started again after one of them died, in one run."""

_START_SECONDS = 8
"""How long Ray Train waits for room before it looks again how many workers find some; so long, too, Ctrl-C may take."""

_RAY_TRAIN = {
    # A worker's report waits until the controller asks for it, every 2 s by default: an epoch may take less.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(_START_SECONDS),
    "RAY_TRAIN_V2_ENABLED": "1",  # whatever a node's environment says
}
_WORKER_ENVIRONMENT = {
    # Threads that spin while they wait slow each other down up to tenfold as soon as anything else wants a core.
    "OMP_WAIT_POLICY": "PASSIVE",
}


def train(
    settings: TrainSettings,
    progress: Callable[[TrainProgress], None],
    *,
    noted: Callable[[str], None] = lambda _: None,
    starting: Callable[[], None] = lambda: None,
    waiting: Callable[[str], None] = lambda _: None,
    finished: Callable[[], None] = lambda: None,
) -> Bundle:
    """Trains, or goes on with an unfinished training of the same settings, and writes the model folder.

    Where the model folder is there already, of the same settings and data, it is returned as it is.

    Args:
        settings: what to train on what.
        progress: called with the newest state about twice a second, from a thread of its own.
        noted: called with a line for each thing that is odd about the data, before anything starts.
        starting: called once, when the request is found sound and Ray starts, which takes seconds.
        waiting: called with what the cluster has no room for, while the workers wait for it; from that thread too.
        finished: called where the model folder is there already; nothing else is done then.

    Returns:
        The model folder, written and checked.

    Raises:
        RequestError: the request cannot be met (found before torch and Ray load wherever possible).
        JobFailed: the training diverged, or its workers died too often.
        Interrupted: Ctrl-C. The same call goes on from the last checkpoint.
    """
    recipe = settings.resolve()
    if settings.architecture is not None:
        from denoise_batch import models

        models.build(recipe.architecture, recipe.parameters)  # a wrong name is told before the data are looked at
    output = Path(settings.output).absolute()
    _check_output(output, settings.overwrite)
    parquet = None if settings.data is None else open_parquet(settings)
    for note in () if parquet is None else parquet.notes:
        noted(note)
    initial = None if settings.init is None else _read_initial(settings.init)
    folder, identity = training_folder(output), identity_of(settings, recipe, parquet, initial)
    if output.exists() and not settings.overwrite:
        bundle = made_before(output, identity)
        remove_left_over(folder, identity, bundle)
        finished()
        return bundle
    refuse_old_ray_train()
    mnist = weights = None
    if parquet is None:
        from denoise_batch.digits import find_mnist

        mnist = find_mnist(settings.mnist)
    if initial is not None:
        from denoise_batch.training.checkpoint import initial_weights

        weights = initial_weights(initial, recipe)
    with publishing.exclusive(folder):
        if output.exists() and not settings.overwrite:  # another run has shown it since we looked
            bundle = made_before(output, identity)
            if begun(folder) is None:
                publishing.remove(folder)
            finished()
            return bundle
        enter(folder, settings, identity)
        if not (folder / "finished").exists():
            starting()
            try:
                with connect(address=settings.address, training=True, verbose=settings.verbose):
                    place = choose_place(settings, capacity.living_nodes(), capacity.nodes_to_come())
                    check_seen_by_nodes(folder, _data_paths(parquet), place.cpus, 1.0 if place.gpu else 0.0)
                    config = _loop_config(settings, recipe, folder, parquet, mnist, weights, place)
                    _fit(config, place, folder, progress, waiting)
            except (RequestError, JobFailed):
                if not (folder / HISTORY_FILE).exists():  # nothing is trained yet: no settings are to be kept to
                    publishing.remove(folder)
                raise
        from denoise_batch import models
        from denoise_batch.training.checkpoint import read_finished

        state, weights = read_finished(folder / "finished")
        network = models.build(recipe.architecture, recipe.parameters)
        network.load_state_dict(weights)
        card = card_of(settings, recipe, parquet, state, network.parameters_json, initial)
        card = replace(card, request=digest_of(identity))
        board = folder / "tensorboard"
        save_bundle(output, network, card, tensorboard=board, overwrite=settings.overwrite, build_in=folder)
        publishing.remove(folder)
    return read_bundle(output)


# --- before Ray -------------------------------------------------------------------------------------------------------


def _check_output(output: Path, overwrite: bool) -> None:
    publishing.check_parent(output)
    if not (output.exists() or output.is_symlink()):
        return
    if output.is_symlink() or not (output.is_dir() and ((output / MODEL_FILE).exists() or not any(output.iterdir()))):
        raise OutputError(f"{output} exists, and is no model folder: it is not replaced", hint="give another --out")
    if not overwrite and not (output / MODEL_FILE).is_file():
        raise publishing.output_exists(output)


def _read_initial(folder: Path) -> Bundle:
    try:
        return find_bundle(folder)
    except errors.ModelError as error:
        raise errors.ModelError(error.message, hint=error.hint.replace("--model", "--init")) from error


# --- with Ray ---------------------------------------------------------------------------------------------------------


def _data_paths(parquet: ParquetImages | None) -> list[Path]:
    """The first and the last local file to train on: what every node must see of them."""
    files = [] if parquet is None else [path for path, _, _ in parquet.files if not storage.is_uri(path)]
    return [Path(path) for path in dict.fromkeys(files[:1] + files[-1:])]


def _loop_config(
    settings: TrainSettings,
    recipe: Recipe,
    folder: Path,
    parquet: ParquetImages | None,
    mnist: Path | None,
    weights: Weights | None,
    place: Place,
) -> LoopConfig:
    import ray

    from denoise_batch.training.loop import LoopConfig

    shared = None
    if mnist is not None:
        from denoise_batch.digits import Split, load_mnist

        images = load_mnist(mnist, Split.TRAIN)[0][: settings.max_images]
        if recipe.held_out:
            count = held_out_count(len(images), recipe.held_out)
            images, validation = images[:-count], images[-count:]
        else:
            validation = load_mnist(mnist, Split.TEST)[0][: max(1, len(images) // 6)]
        # 47 MB in the object store reach every node of a cluster; the cache folder does not.
        shared = (ray.put(images), ray.put(validation))
    return LoopConfig(
        recipe=recipe,
        seed=settings.seed,
        folder=str(folder),
        parquet=parquet,
        max_images=settings.max_images,
        initial=None if weights is None else ray.put(weights),
        mnist=shared,
        resident_limit=settings.resident_limit,
        threads=place.threads,
        workers_on_node=place.workers_on_node,
    )


def _fit(
    config: LoopConfig,
    place: Place,
    folder: Path,
    progress: Callable[[TrainProgress], None],
    waiting: Callable[[str], None],
) -> None:
    """Runs Ray Train to its end."""
    import ray.train
    import ray.train.torch

    from denoise_batch.training.loop import train_worker

    try:
        from denoise_batch.training.one_machine import only_what_is_used
    except ImportError:  # another Ray than it was made for
        only_what_is_used = contextlib.nullcontext  # type: ignore[assignment]

    fewest, most = place.workers
    trainer = ray.train.torch.TorchTrainer(
        train_worker,
        train_loop_config={"config": config},
        scaling_config=ray.train.ScalingConfig(
            num_workers=fewest if fewest == most else place.workers,
            use_gpu=place.gpu,
            resources_per_worker=place.resources,
        ),
        run_config=ray.train.RunConfig(
            name=RAY_FOLDER,
            storage_path=str(folder),
            worker_runtime_env={"env_vars": _WORKER_ENVIRONMENT},
            # It counts waits for room as failures of the controller: they have no end but Ctrl-C.
            failure_config=ray.train.FailureConfig(max_failures=MAX_FAILURES, controller_failure_limit=-1),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
        ),
    )
    watch = WorkerWatch(place, folder / "progress.json", progress, waiting)
    with _sigint_kept(), environment(_RAY_TRAIN), only_what_is_used(), watch:
        try:
            trainer.fit()
        except SystemExit as stopped:  # Ray Train's own handler of SIGINT ends so
            if watch.verdict is not None:
                raise watch.verdict from stopped
            raise Interrupted("stopped by Ctrl-C", hint="run the same command again to go on from here") from stopped
        except ray.train.ControllerError as error:
            raise _not_started(error, place) from error
        except ray.train.TrainingFailedError as error:
            if not folder.is_dir():
                raise JobFailed(
                    f"{folder} was removed while a training was at work in it",
                    hint="run the same command again: it begins anew",
                ) from error
            raise left_failure(folder) or _failed(error) from error
    failure = left_failure(folder)
    if failure is not None:
        raise failure


def _not_started(error: Exception, place: Place) -> JobFailed:
    if "NCCL" in str(error):  # Ray counts GPUs without PyTorch
        return JobFailed(
            f"there is a GPU, but PyTorch cannot use it: {_lines(error)[-1]}",
            hint="give --device cpu, or install PyTorch's CUDA build and a driver that it knows",
        )
    return _import_failed(error) or JobFailed(
        f"Ray cannot start {place.workers[0]} workers of {place.resources}: {_lines(error)[-1]}",
        hint="lower --workers; -v shows Ray's log",
    )


def _failed(error: Exception) -> JobFailed:
    return _import_failed(error) or JobFailed(
        f"the training's workers failed {MAX_FAILURES + 1} times: {_lines(error)[-1]}",
        hint="run the same command again to go on from the last checkpoint; -v shows the workers' log",
    )


def _import_failed(error: Exception) -> JobFailed | None:
    said = [line for line in _lines(error) if "ModuleNotFoundError" in line or "ImportError" in line]
    if not said:
        return None
    return JobFailed(
        f"the training's workers cannot import what they need: {said[-1].strip()}",
        hint="every machine needs this package and what it needs, in the same versions; -v shows Ray's log",
    )


def _lines(error: Exception) -> list[str]:
    return str(error).strip().splitlines() or [type(error).__name__]


@contextlib.contextmanager
def _sigint_kept() -> Iterator[None]:
    """Ray Train leaves its own SIGINT handler behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
