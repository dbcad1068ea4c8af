"""Damage within files that have our column, bit by bit: found or harmless, and never more than a unit's failure."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bad_files import LAYOUTS, ROWS, claiming, images, lying, page_headers, parquet, planned, run_units, table, varint

from denoise_batch import cli
from denoise_batch.errors import DenoiseBatchError, ParquetError
from denoise_batch.images.layouts import Layout
from denoise_batch.inference.ledger import Failure, Receipt
from denoise_batch.inference.plan import Unit
from denoise_batch.inference.unit_rows import read_unit
from denoise_batch.parquet import pages
from denoise_batch.parquet.input_file import open_parquet
from denoise_batch.parquet.thrift import TooShortError

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.slow
@pytest.mark.parametrize("claim", [1800, 2000])
def test_a_footer_that_lies_about_its_rows(tmp_path: Path, claim: int) -> None:
    content, path = table(1911).drop_columns("tags"), tmp_path / "a.parquet"
    for which, said in (
        (slice(0, 1), rf"its footer says {claim} rows, its row groups hold 1911"),
        (slice(-1, None), rf"its footer says 1911 rows, its row groups hold {claim}"),
        (slice(1, -1), rf"1911 rows of a row group, but {claim} values of its column 'id'"),
        (slice(4, 5), rf"1911 rows of a row group, but {claim} values of its column 'image'"),
    ):
        path.write_bytes(lying(content, claim, which))
        with pytest.raises(ParquetError, match=said):
            planned(path)
    # Told alike everywhere, the lie shows in the pages alone.
    path.write_bytes(lying(content, claim, slice(None)))
    with pytest.raises(ParquetError, match=rf"'id': its pages hold 1,911 values, the footer claims {claim:,}"):
        planned(path)
    (tmp_path / "0.parquet").write_bytes(parquet(content))
    made = planned(tmp_path / "0.parquet", path)
    first, (second, _) = run_units(path, made)
    assert isinstance(first[0], Receipt)
    assert isinstance(second, Failure)
    assert (second.unit, second.final) == (1, False)
    assert f"its pages hold 1,911 values, the footer claims {claim:,}" in second.reason


def read_damaged(path: Path, content: bytes, *, checked: bool = True) -> pa.Table | Exception:
    """As a worker reads a file."""
    path.write_bytes(content)
    try:
        with open_parquet(str(path)) as file:
            unit = Unit(0, 0, 0, file.num_row_groups - 1, 0, ROWS, 0)
            batches = read_unit(file, unit, 17, str(path) if checked else "")
            return pa.Table.from_batches(list(batches), file.schema_arrow)
    except Exception as error:
        return error


@pytest.mark.slow
@pytest.mark.parametrize("checksums", [True, False])
@pytest.mark.parametrize(("compression", "version"), [("none", "1.0"), ("snappy", "2.0"), ("zstd", "1.0")])
@pytest.mark.parametrize(("layout", "dtype"), LAYOUTS)
def test_a_flipped_bit_in_pages_or_their_headers_is_found_or_harmless(
    tmp_path: Path, layout: Layout, dtype: str, compression: str, version: str, checksums: bool
) -> None:
    options = {"compression": compression, "data_page_version": version, "write_page_checksum": checksums}
    whole = parquet(table(ROWS, layout, dtype), row_group_size=30, data_page_size=4096, **options)
    expected = pq.read_table(pa.BufferReader(whole))
    headers = [byte for header in page_headers(whole) for byte in header]
    last = max(headers)
    rng = np.random.default_rng(1)
    found = 0
    for at in [*rng.choice(headers, 100).tolist(), *rng.integers(4, last, 50).tolist()]:
        damaged = bytearray(whole)
        damaged[at] ^= 1 << int(rng.integers(8))
        result = read_damaged(tmp_path / "a.parquet", damaged)
        found += isinstance(result, Exception)
        if isinstance(result, pa.Table):
            assert result.num_rows == ROWS
            # Without checksums other values may come, but never more or fewer rows, and nothing that crashes.
            assert not checksums or result.equals(expected), f"bit of byte {at}"
    assert found > (30 if checksums else 5)


@pytest.mark.slow
@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_what_checksums_do_not_cover_is_compared_with_the_footer_or_the_levels(tmp_path: Path, version: str) -> None:
    """They do not cover page headers: pyarrow alone reads such files to their end and gives other pixels."""
    content = table(ROWS, Layout.LIST, "float32").select(["image"])
    whole = parquet(content, data_page_size=4096, data_page_version=version)
    expected = pq.read_table(pa.BufferReader(whole))
    unseen = 0
    for header in page_headers(whole):
        for bit in range(8 * header.start, 8 * (header.start + 30)):
            damaged = bytearray(whole)
            damaged[bit // 8] ^= 1 << bit % 8
            alone = read_damaged(tmp_path / "a.parquet", damaged, checked=False)
            if isinstance(alone, pa.Table) and not alone.equals(expected):
                unseen += 1
                assert isinstance(read_damaged(tmp_path / "a.parquet", damaged), DenoiseBatchError)
    assert unseen > 0


def test_a_damaged_page_is_one_line_of_its_unit(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    whole = bytearray(parquet(table(200), row_group_size=100, compression="none"))
    whole[-len(whole) // 4] ^= 1
    path.write_bytes(whole)
    ((answer, _),) = run_units(path)
    assert isinstance(answer, Failure)
    assert not answer.final
    assert "checksum" in answer.reason
    assert "\n" not in answer.reason


def test_a_page_too_large_is_refused_before_it_is_decompressed(tmp_path: Path) -> None:
    small, bomb = tmp_path / "a.parquet", tmp_path / "b.parquet"
    small.write_bytes(parquet(table().select(["image"])))
    bomb.write_bytes(claiming((1 << 31) - 1))
    made = planned(small, bomb)
    before = pa.default_memory_pool().max_memory()
    first, (second, _) = run_units(bomb, made)
    assert isinstance(first[0], Receipt)
    assert isinstance(second, Failure)
    assert second.reason.startswith("row group 0, column 'image': a page claims 2,147,483,647 bytes, the footer ")
    assert pa.default_memory_pool().max_memory() < before + (200 << 20)


def test_a_page_too_large_for_the_machine_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(parquet(table()))
    made = planned(path)
    monkeypatch.setattr(pages, "PAGE_BYTES", 20_000)
    ((answer, _),) = run_units(path, made)
    assert isinstance(answer, Failure)
    assert re.match(r"row group 0, column 'image': a page of \S+ bytes is more than a worker may hold", answer.reason)


def test_levels_whose_last_run_has_no_padding_are_whole() -> None:
    """Polars wrote them so, and pyarrow reads them: one group of eight levels of two bits, of which four are there."""
    assert pages._levels_end(b"\x03\xe4", 4, 2) == 2
    assert pages._levels_end(b"\x03\xe4\x00", 4, 2) == 3
    with pytest.raises(TooShortError):
        pages._levels_end(b"\x03\xe4", 5, 2)


def test_levels_longer_than_their_page_are_not_read() -> None:
    class Source:
        def read_at(self, nbytes: int, offset: int) -> bytes:
            raise AssertionError(f"{nbytes} bytes at {offset} are asked for")

    page = pages._Page(3, 100, 100, 10, 10, 1 << 30, 0, 20)
    with pytest.raises(DenoiseBatchError, match="damaged"):
        pages._check_levels(Source(), 0, page, None)


def test_a_page_of_too_many_values_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(parquet(table()))
    made = planned(path)
    monkeypatch.setattr(pages, "PAGE_VALUES", 50)
    ((answer, _),) = run_units(path, made)
    assert isinstance(answer, Failure)
    assert "column 'id': a page of 60 values is more than a worker may hold (50)" in answer.reason


@pytest.mark.slow
def test_long_texts_that_come_late_make_the_batches_small(tmp_path: Path) -> None:
    """Their dictionary weighs little in the file, and the first rows say nothing of them."""
    texts = pa.array(["short"] * 200 + ["x" * 400_000] * 200)
    path = tmp_path / "a.parquet"
    path.write_bytes(parquet(pa.table({"image": images(400), "text": texts}), row_group_size=200))
    made = planned(path)
    with open_parquet(str(path)) as file:
        batches = list(read_unit(file, made.unit(0), 4096, str(path)))
    assert sum(batch.num_rows for batch in batches) == 400
    assert max(batch.num_rows for batch in batches) < 60


def test_inspect_says_the_same_of_a_bad_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = bytearray(parquet(table(ROWS, Layout.LIST, "float32"), row_group_size=30))
    (tmp_path / "a.parquet").write_bytes(whole)
    header = page_headers(whole)[-1]
    true = pages._page(pa.BufferReader(whole), header.start).values
    coded = whole.index(varint(true), header.start, header.stop)
    whole[coded] ^= 2
    (tmp_path / "b.parquet").write_bytes(whole)
    assert cli.run(["inspect", str(tmp_path), "--verify"]) == 1
    shown = capsys.readouterr()
    assert "b.parquet: after 0 rows: row group 1, column 'image.list.element': its pages hold" in shown.out + shown.err
