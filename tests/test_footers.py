"""Files that differ in a column: which are named. How footers are read, test_bad_files.py says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from denoise_batch.errors import ColumnError, JobFailed
from denoise_batch.inference.unit_rows import chunk_rows
from denoise_batch.parquet import footers
from denoise_batch.parquet.footers import Footer, Sample, Unreadable, check_type, read_footers, read_samples

if TYPE_CHECKING:
    from pathlib import Path


def _footer(**types: pa.DataType) -> Footer:
    return Footer(pa.schema(types.items()).serialize().to_pybytes(), (1,), 784)


EMPTY = _footer(image=pa.null())
BINARY = _footer(image=pa.binary(784))
OTHER = _footer(picture=pa.binary(784))


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ([BINARY, EMPTY], "in a.parquet, but b.parquet has it of type null"),
        ([EMPTY, BINARY], "in b.parquet, but a.parquet has it of type null"),
        ([OTHER, BINARY, BINARY], "in b.parquet, but a.parquet has no such column"),
        ([BINARY, BINARY, OTHER, EMPTY], "in a.parquet, but c.parquet has no such column"),
    ],
)
def test_the_file_that_differs_is_named_after_one_that_fits(found: list[Footer], said: str) -> None:
    paths = [f"{name}.parquet" for name in "abcd"[: len(found)]]
    with pytest.raises(ColumnError) as caught:
        check_type(paths, found, "image", pa.binary(784))
    assert caught.value.message == f"column 'image' is fixed_size_binary[784] {said}"


def test_files_of_one_type_pass() -> None:
    check_type(["a", "b"], [BINARY, BINARY], "image", pa.binary(784))


def test_categories_are_no_weight_of_each_row(tmp_path: Path) -> None:
    words = pa.DictionaryArray.from_arrays(pa.array(range(1000), pa.int32()), [f"{n:032}" for n in range(100_000)])
    lists = pa.ListArray.from_arrays(pa.array(range(1001), pa.int32()), words)
    path = str(tmp_path / "a.parquet")
    pq.write_table(pa.table({"word": words, "words": lists, "number": range(1000)}), path)
    (sample,) = read_samples([(path, 0, ("number",))], 64)
    assert isinstance(sample, Sample)
    assert 2 * 32 < sample.row_bytes < 150  # an entry of each counts, as it does where pages are looked at
    assert sample.table.num_rows == 64
    assert chunk_rows(sample.row_bytes) == 4096


def test_a_process_that_cannot_be_started_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.touch()
    monkeypatch.setattr("sys.executable", str(python))
    with pytest.raises(JobFailed, match="no process can be started to read the files' footers: Permission denied"):
        read_footers(["a.parquet", "b.parquet"])


@pytest.mark.parametrize(("start", "processes"), [("", 1), ("s3://bucket/", 10)])
def test_footers_in_a_store_are_waited_for_side_by_side(
    start: str, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def serve(requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
        asked.append(len(requests))
        return [{"error": request["path"]} for request in requests]

    monkeypatch.setattr(footers, "_serve", serve)
    paths = [f"{start}{number}.parquet" for number in range(95)]
    assert read_footers(paths) == [Unreadable(path) for path in paths]
    assert len(asked) == processes
