"""Parquet files with images for tests, whole, encrypted, lying and swollen ones; and units made of them without Ray."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.parquet.encryption as pe

from denoise_batch.forward import in_float32
from denoise_batch.images import Polarity, encode
from denoise_batch.images.layouts import Layout, output_column
from denoise_batch.inference.denoise_unit import Assignment, OnBadRow, UnitOptions, denoise_unit
from denoise_batch.inference.plan import Plan, make_plan
from denoise_batch.parquet import pages
from denoise_batch.storage.listing import list_inputs

if TYPE_CHECKING:
    from pathlib import Path

    from denoise_batch.inference.ledger import Failure, Receipt

LAYOUTS = [(Layout.BINARY, "uint8"), (Layout.LIST, "uint8"), (Layout.LIST, "float32"), (Layout.ENCODED, "uint8")]
ROWS = 60


def images(rows: int, layout: Layout = Layout.BINARY, dtype: str = "uint8") -> pa.Array:
    pixels = np.zeros((rows, 28, 28), np.uint8)
    pixels[:, 8:20, 10:18] = np.random.default_rng(rows).integers(100, 256, (rows, 12, 8))
    bad = np.arange(rows) == 5
    return encode(pixels.reshape(rows, 784), bad, output_column(None, "image", layout, dtype))


def table(rows: int = ROWS, layout: Layout = Layout.BINARY, dtype: str = "uint8") -> pa.Table:
    """Our column between others: numbers, words with nulls, lists."""
    return pa.table(
        {
            "id": pa.array(range(rows)),
            "word": pa.array([None if i % 7 == 0 else f"w{i % 5}" for i in range(rows)]),
            "tags": pa.array([[f"t{j}" for j in range(i % 3)] for i in range(rows)]),
            "yes": pa.array([i % 3 == 0 for i in range(rows)]),
            "image": images(rows, layout, dtype),
        }
    )


def parquet(content: pa.Table, **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(content, sink, **{"write_page_checksum": True, **options})
    whole: bytes = sink.getvalue().to_pybytes()
    return whole


def planned(*inputs: Path, polarity: Polarity = Polarity.LIGHT_ON_DARK) -> Plan:
    files = list_inputs([str(path) for path in inputs]).files
    return make_plan(files, None, polarity, "denoised")


def run_units(path: Path, made: Plan | None = None) -> list[tuple[Receipt | Failure, Path]]:
    """Plans one file and makes each of its units, with a model that changes nothing."""
    made = made or planned(path)
    staging = path.parent / "staging"
    staging.mkdir(exist_ok=True)
    output = output_column(made.column, "denoised")
    options = UnitOptions(str(staging), made.column, output, made.polarity, OnBadRow.NULL, "zstd")
    answers = []
    for index in range(len(made)):
        unit, name = made.unit(index), f"unit-{index}.a{len(list(staging.iterdir()))}.parquet"
        answer = denoise_unit(
            Assignment(unit, made.files[unit.file], 1, name), options, in_float32(lambda pixels: pixels)
        )
        answers.append((answer, staging / name))
    return answers


class _Keys(pe.KmsClient):  # type: ignore[misc]
    def wrap_key(self, key: bytes, _name: str) -> bytes:
        return base64.b64encode(key)

    def unwrap_key(self, key: bytes, _name: str) -> bytes:
        return base64.b64decode(key)


def encrypted(path: Path, *, plaintext_footer: bool) -> None:
    content = table()
    settings = pe.EncryptionConfiguration(
        footer_key="f", column_keys={"c": ["id"]}, plaintext_footer=plaintext_footer, double_wrapping=False
    )
    factory = pe.CryptoFactory(lambda _: _Keys())
    properties = factory.file_encryption_properties(pe.KmsConnectionConfig(), settings)
    with pq.ParquetWriter(path, content.schema, encryption_properties=properties) as writer:
        writer.write_table(content)


def varint(number: int) -> bytes:
    coded, out = number << 1, b""
    while coded > 127:
        out, coded = out + bytes([coded & 127 | 128]), coded >> 7
    return out + bytes([coded])


def lying(content: pa.Table, claim: int, which: slice) -> bytes:
    """A file whose footer has other numbers of rows and values, the `which` of them: file, columns…, row group."""
    whole = bytearray(parquet(content, write_statistics=False, store_schema=False))
    end = len(whole) - 8
    start = end - int.from_bytes(whole[end : end + 4], "little")
    true, false = varint(content.num_rows), varint(claim)
    assert len(true) == len(false)
    places = [at + 1 for at in range(start, end) if whole.startswith(b"\x16" + true, at)]  # 64-bit fields
    assert len(places) == content.num_columns + 2
    for at in places[which]:
        whole[at : at + len(true)] = false
    return bytes(whole)


def page_headers(whole: bytes) -> list[range]:
    """Where the page headers of a file are."""
    metadata = pq.read_metadata(pa.BufferReader(whole))
    found = []
    for group in range(metadata.num_row_groups):
        for column in range(metadata.num_columns):
            chunk = metadata.row_group(group).column(column)
            at = min(at for at in (chunk.dictionary_page_offset, chunk.data_page_offset) if at)
            end = at + chunk.total_compressed_size
            while at < end:
                page = pages._page(pa.BufferReader(whole), at)
                found.append(range(at, at + page.length))
                at += page.length + page.compressed
    return found


def claiming(uncompressed: int) -> bytes:
    """A file of one column and one page, whose header claims to be larger than it is."""
    whole = parquet(table().select(["image"]), compression="zstd", use_dictionary=False, write_statistics=False)
    header = page_headers(whole)[0]
    true = pages._page(pa.BufferReader(whole), header.start).uncompressed
    return whole.replace(b"\x15" + varint(true), b"\x15" + varint(uncompressed), 1)
