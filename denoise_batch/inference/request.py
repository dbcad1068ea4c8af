"""What a user asks of `infer`, and whether it can be met: everything that is known before torch or Ray load."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from denoise_batch import storage
from denoise_batch.bundle import Bundle, few_levels_bundle, find_bundle
from denoise_batch.bundle.card import of_pairs
from denoise_batch.cluster.worker_count import WorkerCount, check_workers
from denoise_batch.errors import FlagError, OutputExists
from denoise_batch.extra_columns import NO_EXTRAS, ExtraColumns
from denoise_batch.images import Polarity
from denoise_batch.images.layouts import ImageColumn, Layout, output_column
from denoise_batch.inference.denoise_unit import OnBadRow
from denoise_batch.inference.finished import FEW_LEVELS_MODEL, finished_report
from denoise_batch.inference.plan import Plan, make_plan
from denoise_batch.inference.run_folder import check_output, output_path
from denoise_batch.inference.store_run import check_store_output
from denoise_batch.parquet.output_file import check_parquet_name
from denoise_batch.precision import Precision
from denoise_batch.process.environment import refuse_unsafe_switches
from denoise_batch.storage.listing import Listing, list_inputs
from denoise_batch.storage.store_prefix import StorePrefix

if TYPE_CHECKING:
    from pathlib import Path

    from denoise_batch.inference.report import InferReport

COMPRESSIONS = ("zstd", "lz4", "snappy", "none")


class OutputShape(StrEnum):
    """What OUT is."""

    AUTO = "auto"
    """As the input: one file in, one file out; anything else, and all in an object store, a folder."""
    DIRECTORY = "directory"
    SINGLE_FILE = "single-file"


@dataclass(frozen=True)
class InferSettings:
    """A request. Result options change the output and belong to the run's identity; run options may change on resume.

    Attributes:
        inputs: files, folders, globs or URIs.
        output: the file or folder to make.
        model: a model folder; None takes ./denoise-model, else the one that ships.
        column, output_column, layout, dtype, polarity, on_bad_row, shape, compression, precision, extras: result
            options.
        max_bad: share of all rows, 0..1, that may be bad.
        overwrite: replace OUT, and discard an unfinished run of another request.
        workers: the most actors, or the fewest and the most; None: as `pool_size` has it, of what the cluster has and
            comes to have.
        gpus_per_worker: share of a GPU that each actor takes, above 0 to 1; None: as `pool_size` has it.
        device: `auto`, `cpu` or `cuda`.
        batch_size: images a forward pass; None suits the device.
        address: a Ray cluster.
    """

    inputs: tuple[str, ...]
    output: str
    model: Path | None = None
    column: str | None = None
    output_column: str = "denoised"
    layout: Layout | None = None
    dtype: str | None = None
    polarity: Polarity = Polarity.AUTO
    on_bad_row: OnBadRow = OnBadRow.NULL
    shape: OutputShape = OutputShape.AUTO
    compression: str = "zstd"
    precision: Precision = Precision.AUTO
    extras: ExtraColumns = NO_EXTRAS
    max_bad: float = 0.01
    overwrite: bool = False
    workers: WorkerCount | None = None
    gpus_per_worker: float | None = None
    device: str = "auto"
    batch_size: int | None = None
    address: str | None = None


@dataclass(frozen=True)
class Request:
    """Settings whose model, inputs and output have been looked at; planning comes next.

    Attributes:
        bundle: the model that is named, or the default.
        few_levels: the model that takes its place where none is named, and the images have few levels of grey.
        out: absolute path of the output, or its prefix in an object store.
        single: whether OUT is one file.
        identity: what the result depends on beside the input files: model and result options.
        finished: where OUT is the finished result of this very request, the report of the run that made it.
    """

    settings: InferSettings
    bundle: Bundle
    listing: Listing
    out: Path | StorePrefix
    single: bool
    identity: dict[str, Any]
    finished: InferReport | None = None
    few_levels: Bundle | None = None

    def bundle_for(self, plan: Plan) -> Bundle:
        """The model for the images that were found."""
        return self.bundle if plan.tone.levels is None or self.few_levels is None else self.few_levels

    def plan(self) -> Plan:
        """Reads footers and first rows, and cuts the input into units.

        Raises:
            ParquetError, ColumnError: see `make_plan`.
            FlagError: `--layout` and `--dtype` do not fit.
        """
        settings = self.settings
        added = [field.name for field in settings.extras.fields(settings.output_column)]
        plan = make_plan(
            self.listing.files,
            settings.column,
            settings.polarity,
            settings.output_column,
            *added,
            own_noise=of_pairs(self.bundle.model),
        )
        self.output_column(plan)
        return plan

    def output_column(self, plan: Plan) -> ImageColumn:
        """The column that is added."""
        settings = self.settings
        return output_column(plan.column, settings.output_column, settings.layout, settings.dtype)


def look_at(settings: InferSettings) -> Request:
    """Checks flags, model folder, inputs and output.

    Raises:
        RequestError: the request cannot be met.
    """
    _check(settings)
    refuse_unsafe_switches()
    bundle = find_bundle(settings.model)
    if not storage.is_utf8(str(bundle.folder.absolute())):
        raise FlagError(
            f"model folder {bundle.folder.absolute()}: its path is not UTF-8, and Ray hands on no other",
            hint="rename or copy it, and name it with --model",
        )
    settings.extras.check(bundle)
    few_levels = few_levels_bundle(bundle) if settings.model is None else None
    listing = list_inputs(settings.inputs)
    remote = storage.is_remote(settings.output)
    if remote and settings.shape is OutputShape.SINGLE_FILE:
        raise FlagError(
            f"--single-file: {storage.redact(settings.output)} is in an object store, where an output is a folder",
            hint="leave it out; a reader takes the folder's part-*.parquet as one",
        )
    single = not remote and (
        settings.shape is OutputShape.SINGLE_FILE or (settings.shape is OutputShape.AUTO and listing.single_file)
    )
    if single and listing.keys:
        raise FlagError(
            f"--single-file: the input's folders have the keys {', '.join(listing.keys)}, which one file cannot keep",
            hint="leave it out: an output folder has the same folders",
        )
    identity = {
        "model_sha256": bundle.sha256,
        FEW_LEVELS_MODEL: None if few_levels is None else few_levels.sha256,
        "architecture": bundle.architecture,
        "column": settings.column,
        "output_column": settings.output_column,
        "layout": settings.layout.value if settings.layout else None,
        "dtype": settings.dtype,
        "polarity": settings.polarity.value,
        "on_bad_row": settings.on_bad_row.value,
        "single_file": single,
        "compression": settings.compression,
        "precision": settings.precision.value,
        **settings.extras.to_json(),
    }
    out: Path | StorePrefix
    overwrite, finished = settings.overwrite, None
    try:
        if remote:
            out = check_store_output(settings.output, settings.inputs, listing, overwrite=overwrite)
        else:
            out = check_output(settings.output, listing, overwrite=overwrite)
            if single:
                check_parquet_name(out)
    except OutputExists as error:
        out = StorePrefix.at(settings.output) if remote else output_path(settings.output)
        found = finished_report(out, identity, listing.files, settings.max_bad)
        if isinstance(found, str):
            raise OutputExists(f"{error.message}, {found}" if found else error.message, hint=error.hint) from error
        finished = found
    return Request(settings, bundle, listing, out, single, identity, finished, few_levels)


def _check(settings: InferSettings) -> None:
    check_workers(settings.workers)
    if settings.gpus_per_worker is not None and not 0.0 < settings.gpus_per_worker <= 1.0:
        raise FlagError(
            f"--gpus-per-worker {settings.gpus_per_worker:g} is no share of a GPU", hint="give more than 0, at most 1"
        )
    if settings.batch_size is not None and settings.batch_size < 1:
        raise FlagError(f"--batch-size {settings.batch_size} is impossible", hint="give 1 or more")
    if not 0.0 <= settings.max_bad <= 1.0:
        raise FlagError(f"--max-bad {settings.max_bad:g} is not a share of the rows", hint="give a number from 0 to 1")
    if settings.compression not in COMPRESSIONS:
        raise FlagError(
            f"--compression {settings.compression!r} is unknown", hint=f"there are: {', '.join(COMPRESSIONS)}"
        )
    if settings.device not in {"auto", "cpu", "cuda"}:
        raise FlagError(f"--device {settings.device!r} is unknown", hint="there are: auto, cpu, cuda")
    if not settings.output_column:
        raise FlagError("--output-column is empty", hint="give the new column a name")
    if not settings.inputs:
        raise FlagError("no input was given", hint="name a Parquet file, a folder or a glob")
