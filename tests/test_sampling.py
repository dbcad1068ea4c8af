"""Samples: every row of a small dataset, rows from everywhere of a large one, never a row twice."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from denoise_batch.errors import ColumnError, MissingFileError, ParquetError
from denoise_batch.evaluation import sampling
from denoise_batch.evaluation.sampling import Dataset, Sample, open_dataset, rows_at, sample_rows
from denoise_batch.images import find_image_column
from denoise_batch.parquet.footers import Footer

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("footers_read_here")


def _numbered(start: int, count: int) -> pa.Table:
    """Images whose first four pixels spell the row's number."""
    pixels = np.zeros((count, 784), np.uint8)
    pixels[:, :4] = np.arange(start, start + count, dtype=">u4").view(np.uint8).reshape(-1, 4)
    return pa.table(
        {"id": pa.array(range(count)), "image": pa.array([row.tobytes() for row in pixels], pa.binary(784))}
    )


def _numbers(sample: Sample) -> np.ndarray:
    return np.rint(sample.pixels[0][:, :4] * 255).astype(np.uint8).view(">u4").ravel()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three files of 3,000, 0 and 5,000 rows in row groups of 700."""
    path = tmp_path_factory.mktemp("dataset")
    for index, (start, count) in enumerate(((0, 3000), (3000, 0), (3000, 5000))):
        pq.write_table(_numbered(start, count), path / f"part-{index}.parquet", row_group_size=700)
    return path


def _sample(dataset: Dataset, count: int, seed: int = 0) -> Sample:
    return sample_rows(dataset, [find_image_column(dataset.schema, None, dataset.first_rows)], count, seed=seed)


def test_a_small_dataset_is_read_whole_and_in_order(folder: Path) -> None:
    dataset = open_dataset(str(folder))
    assert dataset.rows == 8000
    sample = _sample(dataset, 8000)
    np.testing.assert_array_equal(_numbers(sample), np.arange(8000))
    np.testing.assert_array_equal(sample.row[3000:], np.arange(5000))
    assert set(sample.file) == {0, 2}


def test_images_are_looked_for_all_over_the_dataset(tmp_path: Path) -> None:
    """Not in its first rows alone, which may hold none."""
    none = _numbered(0, 700).set_column(1, "image", pa.nulls(700, pa.binary()))
    pq.write_table(none.slice(0, 0).set_column(1, "image", pa.nulls(0)), tmp_path / "a.parquet")
    images = _numbered(700, 700).cast(none.schema)
    pq.write_table(pa.concat_tables([none, images]), tmp_path / "b.parquet", row_group_size=700)
    dataset = open_dataset(str(tmp_path / "b.parquet"))
    found = find_image_column(dataset.schema, None, dataset.first_rows)
    assert (found.name, sample_rows(dataset, [found], 1400, seed=0).good[0].sum()) == ("image", 700)
    assert open_dataset(str(tmp_path)).schema == none.schema


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 7, 100, 1000, 7999])
def test_a_sample_has_the_rows_asked_for_and_none_twice(folder: Path, count: int) -> None:
    sample = _sample(open_dataset(str(folder)), count)
    numbers = _numbers(sample)
    assert len(np.unique(numbers)) == len(numbers)
    assert len(numbers) == count
    np.testing.assert_array_equal(numbers, np.where(sample.file == 2, 3000, 0) + sample.row)


def test_the_same_seed_gives_the_same_rows_and_another_gives_others(folder: Path) -> None:
    dataset = open_dataset(str(folder))
    np.testing.assert_array_equal(_numbers(_sample(dataset, 100)), _numbers(_sample(dataset, 100)))
    assert not np.array_equal(_numbers(_sample(dataset, 100)), _numbers(_sample(dataset, 100, seed=1)))


def test_samples_come_from_all_over(folder: Path) -> None:
    numbers = _numbers(_sample(open_dataset(str(folder)), 320))
    assert len(set(numbers // 700)) >= 10


@pytest.mark.parametrize(
    "type_",
    [pa.binary_view(), pa.large_binary(), pa.dictionary(pa.int32(), pa.binary()), pa.list_view(pa.uint8())],
    ids=str,
)
def test_given_rows_are_read_of_every_type(tmp_path: Path, type_: pa.DataType) -> None:
    """pyarrow itself takes no rows of some."""
    values = [*_numbered(0, 100)["image"].to_pylist()[:99], None]
    if pa.types.is_dictionary(type_):
        images = pa.array(values, pa.binary()).dictionary_encode()
    elif pa.types.is_list_view(type_):
        images = pa.array([value and list(value) for value in values], type_)
    else:
        images = pa.array(values, type_)
    pq.write_table(pa.table({"image": images}), tmp_path / "a.parquet", row_group_size=30)
    dataset = open_dataset(str(tmp_path / "a.parquet"))
    column = find_image_column(dataset.schema, None, dataset.first_rows)
    assert column.type == type_
    wanted = np.array([98, 3, 40, 99, 5])
    found = rows_at(dataset, [column], np.zeros(5, np.int64), wanted)
    assert found.good[0].tolist() == [True, True, True, False, True]
    np.testing.assert_array_equal(_numbers(found), [98, 3, 40, 0, 5])


def test_a_dataset_that_is_read_whole_opens_each_file_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To open a file is to parse all of its footer, which is long where there are many row groups."""
    opened: list[str] = []
    open_parquet = sampling.open_parquet

    def counted(path: str, **options: Any) -> Any:
        opened.append(path)
        return open_parquet(path, **options)

    monkeypatch.setattr(sampling, "open_parquet", counted)
    dataset = open_dataset(str(folder))
    assert len(_sample(dataset, 8000)) == 8000
    assert opened == [dataset.files[0], dataset.files[2]]


def test_runs_in_many_row_groups_are_found_quickly() -> None:
    dataset = Dataset("x", ("x",), (Footer(b"", (0, *[1000] * 60_000), 1),), None, None)
    begun = time.process_time()
    runs = sampling._runs(dataset, 20_000, np.random.default_rng(0))
    assert time.process_time() - begun < 3.0
    assert 32 <= len(runs) <= 64  # one may go on in the next row group
    assert all(group and start == (group - 1) * 1000 for _, group, start, _ in runs)
    assert sum(take for *_, inner in runs for _, take in inner) == 20_000


@pytest.mark.parametrize("row_groups", [(100_000,), (40_000, 0, 60_000), (1000,) * 100, (1,) * 500])
@pytest.mark.parametrize("count", [31, 32, 33, 255, 499])
def test_runs_are_spread_over_all_rows_and_never_meet(row_groups: tuple[int, ...], count: int) -> None:
    dataset = Dataset("x", ("x",), (Footer(b"", row_groups, 1),), None, None)
    met = np.zeros(dataset.rows, np.int64)
    for seed in range(200):
        rows = [
            start + skip + row
            for _, _, start, inner in sampling._runs(dataset, count, np.random.default_rng(seed))
            for skip, take in inner
            for row in range(take)
        ]
        assert len(set(rows)) == len(rows) == count
        assert rows == sorted(rows)
        met[rows] += 1
    stretches = [part.mean() for part in np.array_split(met, min(10, dataset.rows))]
    assert max(stretches) < 1.5 * min(stretches)  # no rows beyond a place, or before it, are left out
    # A single row group is read in several places, from its beginning to its end.
    assert max(rows) - min(rows) > 0.8 * dataset.rows


def test_of_many_large_row_groups_the_first_rows_are_enough() -> None:
    footer = Footer(b"", (1_000_000,) * 9, 784)
    found = sampling._runs(Dataset("x", ("x",), (footer,), None, None), 10_000, np.random.default_rng(0))
    assert sum(take for runs in found for _, take in runs.runs) == 10_000
    assert len(found) == 9
    last = max(skip + take for runs in found for skip, take in runs.runs)
    assert 65_536 < last <= 131_072
    few = sampling._runs(Dataset("x", ("x",), (footer,), None, None), 2_000_000, np.random.default_rng(0))
    assert max(skip + take for runs in few for skip, take in runs.runs) > 900_000  # where these alone are too few


def test_rows_without_an_image_are_marked(tmp_path: Path) -> None:
    table = pa.table({"image": pa.array([bytes(784), None, bytes(784)], pa.binary(784))})
    pq.write_table(table, tmp_path / "a.parquet")
    sample = _sample(open_dataset(str(tmp_path / "a.parquet")), 10)
    assert sample.good[0].tolist() == [True, False, True]


def test_numbers_come_with_their_rows(folder: Path) -> None:
    dataset = open_dataset(str(folder))
    assert dataset.has_numbers("id")
    assert not dataset.has_numbers("image")
    assert not dataset.has_numbers("none")
    column = find_image_column(dataset.schema, None, dataset.first_rows)
    for count in (100, 8000):
        sample = sample_rows(dataset, [column], count, seed=0, numbers=["id"])
        np.testing.assert_array_equal(sample.numbers["id"], sample.row)  # numbered within each file


def test_numbers_that_a_file_lacks_are_none(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes((folder / "part-0.parquet").read_bytes())
    pq.write_table(_numbered(0, 2).drop_columns(["id"]), tmp_path / "b.parquet")
    assert not open_dataset(str(tmp_path)).has_numbers("id")


def test_no_rows_at_all(tmp_path: Path) -> None:
    pq.write_table(_numbered(0, 0), tmp_path / "a.parquet")
    sample = _sample(open_dataset(str(tmp_path / "a.parquet")), 10)
    assert len(sample) == 0
    assert sample.pixels[0].shape == (0, 784)


def test_what_is_not_parquet_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"nonsense")
    with pytest.raises(ParquetError, match=r"a\.parquet is not readable"):
        open_dataset(str(tmp_path / "a.parquet"))
    with pytest.raises(MissingFileError):
        open_dataset(str(tmp_path / "none.parquet"))


def test_a_file_that_lacks_the_column_is_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes((folder / "part-0.parquet").read_bytes())
    pq.write_table(pa.table({"id": [1]}), tmp_path / "b.parquet")
    with pytest.raises(ColumnError, match=r"a\.parquet, but .*b\.parquet has no such column"):
        _sample(open_dataset(str(tmp_path)), 10_000)


def test_files_may_have_any_flavour_of_the_type(tmp_path: Path) -> None:
    for name, type_ in (("a", pa.binary()), ("b", pa.large_binary()), ("c", pa.binary_view())):
        table = _numbered(1000 * ord(name), 100)
        image = pa.array(table["image"].to_pylist(), type_)
        pq.write_table(table.set_column(1, "image", image), tmp_path / f"{name}.parquet")
    dataset = open_dataset(str(tmp_path))
    sample = _sample(dataset, 1000)
    assert _numbers(sample).tolist() == [1000 * start + row for start in b"abc" for row in range(100)]
    column = find_image_column(dataset.schema, None, dataset.first_rows)
    found = rows_at(dataset, [column], np.array([2, 1]), np.array([7, 5]))
    assert _numbers(found).tolist() == [99_007, 98_005]


def test_a_file_whose_column_has_another_type_is_named(folder: Path, tmp_path: Path) -> None:
    """Its bytes would pass for pixels of the first file's kind."""
    (tmp_path / "a.parquet").write_bytes((folder / "part-0.parquet").read_bytes())
    lists = pa.array([[0.5] * 784] * 3, pa.list_(pa.float32()))
    pq.write_table(pa.table({"id": [1, 2, 3], "image": lists}), tmp_path / "b.parquet")
    dataset = open_dataset(str(tmp_path))
    with pytest.raises(ColumnError, match=r"b\.parquet has it of type list<.*float>"):
        _sample(dataset, 10_000)
    column = find_image_column(dataset.schema, None, dataset.first_rows)
    with pytest.raises(ColumnError, match=r"b\.parquet has it of type list<.*float>"):
        rows_at(dataset, [column], np.array([1]), np.array([0]))
