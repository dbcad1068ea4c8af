"""Digits written to Parquet: every layout, streamed, and never half a file under the output's name."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from denoise_batch.digits import Source, Split, draw_digits, load_mnist, make_digits, write_digits
from denoise_batch.digits.mnist import FOLDER_VARIABLE
from denoise_batch.errors import FlagError, MissingFileError, OutputError, ResourceExhausted
from denoise_batch.images import decode, find_image_column
from denoise_batch.images.layouts import Layout

if TYPE_CHECKING:
    from collections.abc import Iterator

REAL = os.environ.get(FOLDER_VARIABLE)
needs_mnist = pytest.mark.skipif(not REAL, reason=f"{FOLDER_VARIABLE} is not set")


def _synthetic(out: Path, count: int = 50, **options: object) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels as they are read back from a file of drawn digits."""
    make_digits(out, Source.SYNTHETIC, count=count, **options)  # type: ignore[arg-type]
    return _read(out)


def _read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    table = pq.read_table(path, page_checksum_verification=True)
    column = find_image_column(table.schema, None, table)
    decoded = decode(table.column(column.name), column)
    assert not decoded.bad.any()
    return decoded.pixels.reshape(-1, 28, 28), table.column("label").to_numpy()


@pytest.mark.parametrize("layout", [None, *Layout])
def test_drawn_digits_come_back_from_every_layout(tmp_path: Path, layout: Layout | None) -> None:
    out = tmp_path / "digits.parquet"
    seen: list[tuple[int, int]] = []
    report = make_digits(
        out, Source.SYNTHETIC, count=50, seed=4, layout=layout, progress=lambda *step: seen.append(step)
    )
    images, labels = _read(out)
    np.testing.assert_array_equal(images, draw_digits(50, 4)[0])
    np.testing.assert_array_equal(labels, draw_digits(50, 4)[1])
    assert images.dtype == labels.dtype == np.uint8
    assert report.rows == 50
    assert report.bytes == out.stat().st_size
    assert json.loads(json.dumps(report.to_json()))["layout"] == (layout or "binary")
    assert seen == [(50, 50)]
    assert list(tmp_path.iterdir()) == [out]


def test_the_schema_is_what_every_reader_knows(tmp_path: Path) -> None:
    out = tmp_path / "new folder" / "digits.parquet"
    _synthetic(out, seed=9, split=Split.TEST)
    schema = pq.read_schema(out)
    assert schema.field("image").type == pa.binary(784)
    assert schema.field("label").type == pa.uint8()
    note = {"command": "digits", "source": "synthetic", "split": "test", "seed": 9}
    assert json.loads(schema.metadata[b"denoise_batch"]) == note


def test_training_and_test_digits_of_a_seed_differ(tmp_path: Path) -> None:
    train, _ = _synthetic(tmp_path / "train.parquet", count=300)
    test, _ = _synthetic(tmp_path / "test.parquet", count=300, split=Split.TEST)
    assert not {image.tobytes() for image in train} & {image.tobytes() for image in test}


def _blank(count: int, batch: int = 8192) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for first in range(0, count, batch):
        size = min(batch, count - first)
        yield np.zeros((size, 28, 28), np.uint8), np.zeros(size, np.uint8)


def test_row_groups_and_pages_are_made_for_the_main_job(tmp_path: Path) -> None:
    out = tmp_path / "digits.parquet"
    write_digits(out, _blank(140_000), 140_000, Layout.BINARY, {})
    metadata = pq.read_metadata(out)
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [65_536, 65_536, 8_928]
    image = metadata.row_group(0).column(0)
    assert image.compression == "ZSTD"
    assert not any("DICTIONARY" in encoding for encoding in image.encodings)


def test_a_changed_byte_is_noticed_by_the_page_checksums(tmp_path: Path) -> None:
    out = tmp_path / "digits.parquet"
    _synthetic(out, count=2000)
    image = pq.read_metadata(out).row_group(0).column(0)
    content = bytearray(out.read_bytes())
    content[image.data_page_offset + image.total_compressed_size // 2] ^= 4
    out.write_bytes(content)
    with pytest.raises(OSError, match=r"CRC|checksum"):
        _read(out)


def test_an_existing_output_is_kept_unless_told(tmp_path: Path) -> None:
    out = tmp_path / "digits.parquet"
    first, _ = _synthetic(out, seed=1)
    with pytest.raises(OutputError, match="exists"):
        _synthetic(out, seed=2)
    np.testing.assert_array_equal(_read(out)[0], first)
    second, _ = _synthetic(out, seed=2, overwrite=True)
    np.testing.assert_array_equal(second, draw_digits(50, 2)[0])
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize(
    ("failure", "shown"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt),
        (OSError(28, "No space left on device"), ResourceExhausted),
        (OSError(5, "Input/output error"), OutputError),
    ],
)
def test_a_failure_on_the_way_leaves_what_was_there(
    tmp_path: Path, existing: bool, failure: BaseException, shown: type[BaseException]
) -> None:
    out = tmp_path / "digits.parquet"
    if existing:
        out.write_bytes(b"before")

    def fails() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        yield from _blank(70_000)
        # A row group is on the disk by now, and nothing of it may be seen under the output's name.
        assert out.exists() == existing
        raise failure

    with pytest.raises(shown):
        write_digits(out, fails(), 80_000, Layout.BINARY, {}, overwrite=True)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == ([b"before"] if existing else [])


def test_a_name_of_another_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"o3\.csv: what is written is Parquet") as caught:
        _synthetic(tmp_path / "o3.csv")
    assert caught.value.hint == "name it o3.parquet"
    assert len(_synthetic(tmp_path / "v0.3")[0]) == 50


def test_an_output_that_cannot_be_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="folder"):
        _synthetic(tmp_path, overwrite=True)
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="file"):
        _synthetic(tmp_path / "file" / "digits.parquet")


@pytest.mark.parametrize(("count", "seed"), [(0, 0), (-5, 0), (5, -1), (5, 2**63)])
def test_impossible_numbers_are_refused(tmp_path: Path, count: int, seed: int) -> None:
    with pytest.raises(FlagError):
        _synthetic(tmp_path / "digits.parquet", count=count, seed=seed)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_mnist_for_drawn_digits_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FlagError, match="--mnist /nope, but --source synthetic"):
        _synthetic(tmp_path / "digits.parquet", mnist_folder=Path("/nope"))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_mnist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="train-images"):
        make_digits(tmp_path / "digits.parquet", mnist_folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


@needs_mnist
def test_mnist_is_written_in_its_order(tmp_path: Path) -> None:
    out = tmp_path / "digits.parquet"
    report = make_digits(out, split=Split.TEST, mnist_folder=Path(str(REAL)))
    images, labels = load_mnist(Path(str(REAL)), Split.TEST)
    np.testing.assert_array_equal(_read(out)[0], images)
    np.testing.assert_array_equal(_read(out)[1], labels)
    assert (report.rows, report.seed, report.mnist) == (10_000, None, REAL)
    make_digits(out, split=Split.TEST, count=10, mnist_folder=Path(str(REAL)), overwrite=True)
    np.testing.assert_array_equal(_read(out)[0], images[:10])


@needs_mnist
def test_more_digits_than_mnist_has_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FlagError, match="10,000") as caught:
        make_digits(tmp_path / "digits.parquet", split=Split.TEST, count=10_001, mnist_folder=Path(str(REAL)))
    assert "--source synthetic" in caught.value.hint
