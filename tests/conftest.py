"""What several test modules share: a few drawn digits, Parquet files of them, a model folder, MNIST where it is."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

if "PYTEST_XDIST_WORKER" in os.environ:
    # Before torch loads: processes of several threads each would spin against each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell lets what it runs in the background ignore Ctrl-C, and what the tests start would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from denoise_batch.digits import FOLDER_VARIABLE, draw_digits
from denoise_batch.images import ImageColumn, Layout, encode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy as np
    from numpy.typing import NDArray

    from denoise_batch.inference.denoise_unit import UnitOptions
    from denoise_batch.inference.ledger import Receipt
    from denoise_batch.inference.plan import Plan

    Pixels = NDArray[np.uint8]
    WriteImages = Callable[..., Path]
    DenoiseFile = Callable[..., "Denoised"]

IMAGE_TYPES: dict[str, tuple[Layout, str, Any]] = {
    "binary": (Layout.BINARY, "uint8", pa.binary(784)),
    "variable binary": (Layout.BINARY, "uint8", pa.binary()),
    "list of uint8": (Layout.LIST, "uint8", pa.list_(pa.uint8())),
    "list of float32": (Layout.LIST, "float32", pa.list_(pa.float32())),
    "fixed list of float32": (Layout.LIST, "float32", pa.list_(pa.float32(), 784)),
    "tensor": (Layout.TENSOR, "uint8", pa.fixed_shape_tensor(pa.uint8(), [28, 28])),
    "encoded": (Layout.ENCODED, "uint8", pa.binary()),
}
"""What `write_images` can write, by name."""


@dataclasses.dataclass(frozen=True)
class Denoised:
    """What `denoise_file` made: a receipt and a staged file for each unit of the plan."""

    receipts: list[Receipt]
    files: list[Path]
    plan: Plan
    options: UnitOptions


@pytest.fixture(scope="session")
def digits() -> tuple[Pixels, Pixels]:
    """300 drawn digits: images (300, 28, 28) and labels (300,), both uint8. Not to be written to."""
    images, labels = draw_digits(300, seed=5)
    images.setflags(write=False)
    labels.setflags(write=False)
    return images, labels


@pytest.fixture(scope="session")
def write_images() -> WriteImages:
    """Writes images as Parquet in one of `IMAGE_TYPES`.

    Called as `write_images(path, images, kind="binary", column="image", bad=None, row_group_size=None, **columns)`;
    gives the path. `bad` marks rows that are null; `columns` are further columns.
    """

    def write(
        path: Path,
        images: NDArray[Any],
        kind: str = "binary",
        column: str = "image",
        bad: NDArray[np.bool_] | None = None,
        row_group_size: int | None = None,
        **columns: Any,
    ) -> Path:
        layout, dtype, type_ = IMAGE_TYPES[kind]
        array = encode(images.reshape(len(images), 784), bad, ImageColumn(column, layout, dtype, type_))
        table = pa.table({column: array, **columns})
        pq.write_table(table, path, row_group_size=row_group_size)
        return path

    return write


@pytest.fixture
def categories() -> Callable[[str, int], pa.Array]:
    """Makes 100 rows of words `w{start}` and on, each a category of int8: itself, in a list or in a struct."""

    def make(kind: str, start: int) -> pa.Array:
        words = pa.array([f"w{start + i}" for i in range(100)])
        array = pa.DictionaryArray.from_arrays(pa.array(range(100), pa.int8()), words)
        if kind == "list":
            return pa.ListArray.from_arrays(pa.array(range(101), pa.int32()), array)
        return pa.StructArray.from_arrays([array], ["word"]) if kind == "struct" else array

    return make


@pytest.fixture
def without_rays_arrow_types() -> Iterator[None]:
    """What imports Ray Data or Ray Train registers Arrow types of Ray's, which no other test is to find."""
    from denoise_batch.inference.unit_pool import _RAY_TENSOR_TYPES

    yield
    for name in _RAY_TENSOR_TYPES:
        with contextlib.suppress(pa.ArrowException, KeyError):
            pa.unregister_extension_type(name)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with the seed's network, untrained. Tests that damage it copy it first."""
    import torch

    from denoise_batch import models
    from denoise_batch.bundle.saving import BundleCard, save_bundle

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "untrained"
    save_bundle(folder, models.build("seed"), BundleCard("seed"))
    return folder


def _answers(requests: list[dict[str, Any]], _processes: int | None) -> list[dict[str, Any]]:
    """Stands in for `footers._ask`: the same reading and the same JSON, in this process."""
    from denoise_batch.parquet import footers

    answers: list[dict[str, Any]] = []
    for request in requests:
        try:
            found = footers._read_sample(**request) if "group" in request else footers._read_footer(**request)
        except Exception as error:  # as the process would answer
            found = {"error": footers._first_line(error)}
        answers.append(json.loads(json.dumps(found)))
    return answers


@pytest.fixture
def footers_read_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Footers and samples are read in this process: to start another for each small file takes most of a test's time.

    Not for tests of how files are read, nor of files that could crash their reader.
    """
    monkeypatch.setattr("denoise_batch.parquet.footers._ask", _answers)


@pytest.fixture
def ink_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """No ink is pale: for tests whose images are numbers in the guise of digits."""
    monkeypatch.setattr("denoise_batch.images.tone.find_ink", lambda *_: None)


@pytest.fixture(scope="session")
def denoise_file() -> DenoiseFile:
    """Plans a file and runs all its units in this process, without Ray.

    Called as `denoise_file(path, work, forward, column=None, polarity=…, unit_rows=None, chunk_rows=None, layout=None,
    dtype=None, **changes_of_UnitOptions)`; gives the receipts, the staged files in order, the plan and the options.
    """
    from denoise_batch.forward import in_float32
    from denoise_batch.images import Polarity, output_column
    from denoise_batch.inference import denoise_unit, plan
    from denoise_batch.inference.ledger import Receipt
    from denoise_batch.parquet import footers
    from denoise_batch.storage.listing import list_inputs

    def run(
        path: Path,
        work: Path,
        forward: Any,
        *,
        column: str | None = None,
        polarity: Polarity = Polarity.LIGHT_ON_DARK,
        unit_rows: int | None = None,
        chunk_rows: int | None = None,
        layout: Layout | None = None,
        dtype: str | None = None,
        **changes: Any,
    ) -> Denoised:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(footers, "_ask", _answers)
            if unit_rows:
                patch.setattr(plan, "UNIT_ROWS", unit_rows)
            if chunk_rows:
                patch.setattr(denoise_unit, "chunk_rows", lambda *_: chunk_rows)
            made = plan.make_plan(list_inputs([str(path)]).files, column, polarity, "denoised")
            output = output_column(made.column, "denoised", layout, dtype)
            options = denoise_unit.UnitOptions(
                str(work), made.column, output, made.polarity, denoise_unit.OnBadRow.NULL, "zstd"
            )
            options = dataclasses.replace(options, **changes)
            receipts, files = [], []
            for index in range(len(made)):
                unit = made.unit(index)
                assignment = denoise_unit.Assignment(unit, made.files[unit.file], 1, f"unit-{index:03}.parquet")
                receipt = denoise_unit.denoise_unit(assignment, options, in_float32(forward))
                assert isinstance(receipt, Receipt), receipt
                receipts.append(receipt)
                files.append(work / receipt.file)
        return Denoised(receipts, files, made, options)

    return run


@pytest.fixture(scope="session")
def mnist_folder() -> Path:
    """The folder of MNIST's IDX files; the test is skipped where DENOISE_BATCH_MNIST does not name one."""
    folder = os.environ.get(FOLDER_VARIABLE)
    if not folder:
        pytest.skip(f"{FOLDER_VARIABLE} is not set")
    return Path(folder)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu:
        import torch

        if not torch.cuda.is_available():
            for item in gpu:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
