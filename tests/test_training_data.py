"""Clean digits from Parquet: found, checked, cut into pieces, read without the bad rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from denoise_batch.errors import ColumnError, DataChanged, FlagError, MissingFileError, ParquetError
from denoise_batch.storage.listing import stat_input
from denoise_batch.training.data import (
    ParquetImages,
    Piece,
    cut,
    held_out_count,
    load_rows,
    open_parquet,
    read_rows,
    rows_of,
    split,
)
from denoise_batch.training.recipes import TrainSettings
from denoise_batch.training.request import _differences

pytestmark = pytest.mark.usefixtures("footers_read_here", "ink_as_it_is")


def digits(count: int, seed: int = 0) -> np.ndarray[Any, Any]:
    """(count, 784) uint8: light blobs on dark, the row's number in pixels 400 and 401."""
    pixels = np.zeros((count, 784), np.uint8)
    pixels[:, 300:500] = np.random.default_rng(seed).integers(0, 256, (count, 200))
    pixels[:, 400], pixels[:, 401] = np.divmod(np.arange(count), 256)
    return pixels


def numbers(clean: np.ndarray[Any, Any]) -> list[int]:
    """The rows' numbers that `digits` wrote."""
    flat = clean.reshape(-1, 784).astype(int)
    return (flat[:, 400] * 256 + flat[:, 401]).tolist()


def binary(pixels: np.ndarray[Any, Any], bad: tuple[int, ...] = ()) -> pa.Array:
    return pa.array([None if row in bad else image.tobytes() for row, image in enumerate(pixels)], pa.binary(784))


def write(folder: Path, count: int = 1000, groups: int = 90, bad: tuple[int, ...] = (), files: int = 2) -> Path:
    table = pa.table({"image": binary(digits(count), bad)})
    step = -(-count // files)
    for file in range(files):
        pq.write_table(table.slice(file * step, step), folder / f"{file}.parquet", row_group_size=groups)
    return folder


def opened(data: Path, **fields: Any) -> Any:
    return open_parquet(TrainSettings(output=Path("m"), data=data, **fields))


def test_rows_come_in_file_order_without_the_bad_ones(tmp_path: Path) -> None:
    images = opened(write(tmp_path, bad=(3, 700)))
    assert images.rows == 1000
    clean, noisy = load_rows(images, images.pieces)
    assert (clean.shape, clean.dtype, noisy) == ((998, 28, 28), np.uint8, None)
    assert numbers(clean) == [row for row in range(1000) if row not in (3, 700)]


def test_only_the_rows_asked_for_are_read(tmp_path: Path) -> None:
    images = opened(write(tmp_path))
    clean, _ = load_rows(images, cut(images.pieces, 85, 605))
    assert numbers(clean) == list(range(85, 605))
    assert max(len(chunk) for chunk, _ in read_rows(images, images.pieces, chunk=17)) == 17


@given(st.lists(st.integers(1, 20), min_size=1, max_size=10), st.integers(0, 220), st.integers(0, 220))
def test_cut_is_a_slice_of_the_rows(groups: list[int], start: int, stop: int) -> None:
    pieces = [Piece(0, group, 0, rows) for group, rows in enumerate(groups)]
    line = [(piece.row_group, row) for piece in pieces for row in range(piece.start, piece.stop)]
    found = cut(pieces, start, stop)
    assert [(piece.row_group, row) for piece in found for row in range(piece.start, piece.stop)] == line[start:stop]
    again = cut(found, 2, 5)
    assert [(piece.row_group, row) for piece in again for row in range(piece.start, piece.stop)] == line[start:stop][
        2:5
    ]
    assert rows_of(found) == max(0, min(stop, len(line)) - start)


def test_paired_columns_stay_paired(tmp_path: Path) -> None:
    clean = digits(300)
    noisy = clean.astype(np.float32) / 255 + 0.25
    lists = pa.array(list(noisy), pa.list_(pa.float32()))
    lists = pa.array(
        [None if row == 5 else image for row, image in enumerate(lists.to_pylist())], pa.list_(pa.float32())
    )
    pq.write_table(pa.table({"clean": binary(clean, (9,)), "noisy": lists}), tmp_path / "a.parquet")
    images = opened(tmp_path / "a.parquet", column="clean", noisy_column="noisy")
    assert images.bytes_per_row == 784 * 5
    got_clean, got_noisy = load_rows(images, images.pieces)
    assert got_noisy is not None
    assert numbers(got_clean) == [row for row in range(300) if row not in (5, 9)]
    np.testing.assert_allclose(got_noisy, got_clean / 255 + 0.25, atol=1e-6)  # beyond 1, and not clipped


def test_a_column_is_no_pair_with_itself(tmp_path: Path) -> None:
    with pytest.raises(FlagError, match="--noisy-column image is the column of clean images as well"):
        opened(write(tmp_path), column="image", noisy_column="image")
    with pytest.raises(FlagError, match="--noisy-column image leaves no column of clean images"):
        opened(write(tmp_path), noisy_column="image")


def test_the_clean_column_is_found_beside_the_noisy_one(tmp_path: Path) -> None:
    columns = dict.fromkeys(["image", "clean"], binary(digits(40)))
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    for given_, expected in (
        ({}, ("clean", None)),
        ({"noisy_column": "image"}, ("clean", "image")),
        ({"noisy_column": "clean"}, ("image", "clean")),
        ({"column": "image"}, ("image", None)),
    ):
        images = opened(tmp_path, **given_)
        assert (images.clean.name, images.noisy and images.noisy.name) == expected
    pq.write_table(pa.table({"scan": binary(digits(40)), "truth": binary(digits(40)), "clean": [True] * 40}),
                   tmp_path / "a.parquet")  # fmt: skip
    assert opened(tmp_path, noisy_column="scan").clean.name == "truth"
    with pytest.raises(ColumnError, match="more than one column fits"):
        opened(tmp_path)


def test_columns_without_usable_images_are_refused_and_named(tmp_path: Path) -> None:
    clean = digits(40)
    table = pa.table({"clean": binary(clean), "image": binary(clean, tuple(range(40)))})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ParquetError, match="none of 40 sampled rows holds an image in 'image' that can be used"):
        opened(tmp_path, column="clean", noisy_column="image")
    halves = {"clean": binary(clean, tuple(range(20))), "image": binary(clean, tuple(range(20, 40)))}
    pq.write_table(pa.table(halves), tmp_path / "a.parquet")
    with pytest.raises(ParquetError, match="none of 40 sampled rows holds images in both 'clean' and 'image'"):
        opened(tmp_path, column="clean", noisy_column="image")


def test_images_that_all_show_nothing_are_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": binary(np.zeros((50, 784), np.uint8))}), tmp_path / "a.parquet")
    with pytest.raises(ParquetError, match="each of 50 sampled images of column 'image' is of a single grey"):
        opened(tmp_path)


def test_the_file_whose_pairs_are_in_another_order_is_named(tmp_path: Path) -> None:
    clean = digits(1200)
    for file in range(4):
        part = binary(clean[300 * file : 300 * file + 300])
        pq.write_table(pa.table({"clean": part, "image": part}), tmp_path / f"{file}.parquet")
    assert opened(tmp_path, column="clean").rows == 1200
    shuffled = pa.table({"clean": part, "image": part[::-1]})
    pq.write_table(shuffled, tmp_path / "3.parquet")
    with pytest.raises(ColumnError, match=r"/3\.parquet: the images of column 'image' are no more like") as caught:
        opened(tmp_path, column="clean", noisy_column="image")
    assert "256 looked at" in caught.value.message


def test_dark_ink_on_light_paper_is_turned(tmp_path: Path) -> None:
    pq.write_table(pa.table({"scan": binary(255 - digits(100))}), tmp_path / "a.parquet")
    images = opened(tmp_path)
    assert images.polarity == "dark-on-light"
    assert numbers(load_rows(images, images.pieces)[0]) == list(range(100))


def test_what_is_odd_about_the_data_is_said(tmp_path: Path) -> None:
    clean = digits(40)
    clean[3] = 255 - clean[3]
    pq.write_table(pa.table({"image": binary(clean, (7, 9))}), tmp_path / "a.parquet")
    (tmp_path / "b.csv").write_text("hello")
    assert opened(tmp_path).notes == (
        "note: 1 file left out because of its name: 'b.csv'",
        "note: 2 of 40 sampled rows hold no usable image in 'image': such are left out",
        "note: 1 of 38 sampled rows of column 'image' looks dark-on-light, but is taken for light-on-dark; "
        "--polarity each tells images apart",
        "note: 3 images are held out for validation, too few to choose the best epoch by",
    )
    (tmp_path / "b.csv").unlink()
    assert [note[:7] for note in opened(tmp_path, polarity="each").notes] == ["note: 2", "note: 3"]


def test_rows_are_sampled_from_all_over_the_data(tmp_path: Path) -> None:
    images = digits(1200)
    images[1190:] = 255 - images[1190:]
    pq.write_table(pa.table({"image": binary(images)}), tmp_path / "a.parquet", row_group_size=10)
    (note,) = opened(tmp_path).notes
    assert note.startswith("note: 10 of 160 sampled rows")


def test_a_pair_with_ink_at_opposite_ends(tmp_path: Path) -> None:
    clean = digits(40)
    pq.write_table(pa.table({"clean": binary(clean), "scan": binary(255 - clean)}), tmp_path / "a.parquet")
    with pytest.raises(ColumnError, match="'clean' is light-on-dark, but column 'scan' is dark-on-light") as caught:
        opened(tmp_path, column="clean", noisy_column="scan")
    assert "--polarity each" in caught.value.hint
    images = opened(tmp_path, column="clean", noisy_column="scan", polarity="each")
    got_clean, got_noisy = load_rows(images, images.pieces)
    assert got_noisy is not None
    assert np.array_equal(got_clean, got_noisy)
    assert numbers(got_clean) == list(range(40))


def test_clean_floats_are_clipped_to_targets(tmp_path: Path) -> None:
    pixels = digits(50).astype(np.float32) / 250  # up to 1.02
    column = pa.array(list(pixels), pa.list_(pa.float32()))
    pq.write_table(pa.table({"image": column}), tmp_path / "a.parquet")
    images = opened(tmp_path)
    clean, _ = load_rows(images, images.pieces)
    assert clean.dtype == np.float32
    assert clean.max() == 1.0


def test_identity_tells_data_apart(tmp_path: Path) -> None:
    folder = write(tmp_path)
    before = opened(folder).identity()
    assert opened(folder).identity() == before
    pq.write_table(pa.table({"image": binary(digits(20, seed=1))}), folder / "1.parquet")
    assert opened(folder).identity() != before


def test_missing_and_damaged_data(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError):
        opened(tmp_path / "nothing")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 this is not Parquet PAR1")
    with pytest.raises(ParquetError, match=r"a\.parquet"):
        opened(tmp_path)


def test_too_few_rows(tmp_path: Path) -> None:
    with pytest.raises(ParquetError, match=r"holds 1 row$"):
        opened(write(tmp_path, count=1, files=1))


def test_files_of_different_schemas(tmp_path: Path) -> None:
    write(tmp_path, files=1)
    pq.write_table(pa.table({"picture": binary(digits(5))}), tmp_path / "b.parquet")
    with pytest.raises(ColumnError, match=r"b\.parquet has no such column"):
        opened(tmp_path)


def test_files_of_different_flavours_of_a_type(tmp_path: Path) -> None:
    rows = digits(40)
    whole = [image.tobytes() for image in rows]
    lists = {"list": pa.list_(pa.uint8()), "large": pa.large_list(pa.uint8())}
    flavours = {"bytes": pa.binary(), "large": pa.large_binary(), "view": pa.binary_view()}
    for place, (name, type_) in enumerate(flavours.items()):
        image = pa.array(whole[place * 10 : place * 10 + 10], type_)
        clean = pa.array(rows[place * 10 : place * 10 + 10].tolist(), lists["large" if place else "list"])
        pq.write_table(pa.table({"clean": clean, "scan": image}), tmp_path / f"{place}-{name}.parquet")
    images = opened(tmp_path, noisy_column="scan")
    clean, noisy = load_rows(images, images.pieces)
    assert numbers(clean) == list(range(30))
    assert noisy is not None
    assert numbers(noisy) == list(range(30))


def test_a_missing_column(tmp_path: Path) -> None:
    with pytest.raises(ColumnError):
        opened(write(tmp_path), column="picture")


def test_no_good_row(tmp_path: Path) -> None:
    images = opened(write(tmp_path, count=40))
    pq.write_table(pa.table({"image": binary(digits(20), tuple(range(20)))}), tmp_path / "0.parquet", row_group_size=90)
    with pytest.raises(ParquetError, match="none of 20 rows"):
        load_rows(_unnoticed(images), images.pieces[:1])


def _unnoticed(images: ParquetImages) -> ParquetImages:
    """The same, as if its files had been written as they are now."""
    return replace(images, files=tuple((path, *stat_input(path)) for path, _, _ in images.files))


def test_a_file_that_goes_changes_or_shrinks(tmp_path: Path) -> None:
    images = opened(write(tmp_path))
    pq.write_table(pa.table({"image": binary(digits(30))}), tmp_path / "0.parquet")
    with pytest.raises(DataChanged, match=r"0\.parquet changed since the training was planned"):
        list(read_rows(images, images.pieces))
    with pytest.raises(ParquetError, match="30 rows could be read"):
        list(read_rows(_unnoticed(images), images.pieces))
    (tmp_path / "0.parquet").unlink()
    with pytest.raises(MissingFileError, match="is gone"):
        list(read_rows(images, images.pieces))


@given(st.lists(st.integers(1, 60), min_size=1, max_size=12), st.integers(2, 400), st.integers(1, 40))
def test_a_split_takes_each_row_once_and_validates_all_over(groups: list[int], images: int, held_out: int) -> None:
    pieces = [Piece(0, group, 0, rows) for group, rows in enumerate(groups)]
    images = min(images, rows_of(pieces))
    held_out = held_out_count(images, held_out)
    line = [(piece.row_group, row) for piece in pieces for row in range(piece.start, piece.stop)][:images]
    train, validation = (
        [(piece.row_group, row) for piece in part for row in range(piece.start, piece.stop)]
        for part in split(pieces, images, held_out)
    )
    assert len(validation) == min(held_out, images)
    assert sorted(train + validation) == line
    if held_out >= 16:  # each sixteenth has its share
        places = np.array([line.index(row) for row in validation])
        counts = np.bincount(places * 16 // images, minlength=16)
        assert counts.min() >= held_out // 16 - 1


@pytest.mark.parametrize(("images", "held_out", "expected"), [(60_000, 5000, 5000), (2400, 5000, 200), (2, 5000, 1)])
def test_how_many_are_held_out(images: int, held_out: int, expected: int) -> None:
    assert held_out_count(images, held_out) == expected


def test_what_differs_between_trainings_is_said_by_name() -> None:
    before = {"seed": 0, "data": {"files": [["/in/a.parquet", 1, 2], ["/in/b.parquet", 3, 4]]}}
    other = {"seed": 1, "data": {"files": [["/else/c.parquet", 1, 2]]}}
    assert list(_differences(before, other)) == [
        "seed was 0, now 1",
        "the data were a.parquet and 1 more, now c.parquet",
    ]
    changed = {"seed": 0, "data": {"files": [["/in/a.parquet", 1, 2], ["/in/b.parquet", 3, 5]]}}
    assert list(_differences(before, changed)) == ["/in/b.parquet has changed"]
