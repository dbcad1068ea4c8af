"""One unit, without Ray: every column back unchanged, bad rows, changed and damaged input, full disks."""

from __future__ import annotations

import decimal
import errno
import json
import resource
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from denoise_batch.digits import draw_digits
from denoise_batch.forward import in_float32
from denoise_batch.images import BadReason, Polarity, decode, encode, from_model_output, to_model_input
from denoise_batch.images.layouts import Layout, output_column
from denoise_batch.inference import denoise_unit as module
from denoise_batch.inference.denoise_unit import Assignment, OnBadRow, UnitOptions, denoise_unit
from denoise_batch.inference.ledger import Failure, Receipt
from denoise_batch.inference.plan import Plan, make_plan
from denoise_batch.parquet import output_file
from denoise_batch.storage.listing import list_inputs

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("footers_read_here")


def halve(pixels: Any) -> Any:
    """Stands in for a model: darker by half, so that the result is known."""
    return np.clip(pixels, 0, 1) * np.float32(0.5)


def images(rows: int, layout: Layout = Layout.BINARY, dtype: str = "uint8", bad: Any = None) -> pa.Array:
    pixels = np.zeros((rows, 28, 28), np.uint8)
    pixels[:, 8:20, 10:18] = np.random.default_rng(rows).integers(100, 256, (rows, 12, 8))
    return encode(pixels.reshape(rows, 784), bad, output_column(None, "image", layout, dtype))


def run(
    path: Path, forward: Any = halve, plan: Plan | None = None, **changes: Any
) -> tuple[Receipt | Failure, Path, Plan]:
    plan = plan or make_plan(list_inputs([str(path)]).files, None, Polarity.AUTO, "denoised")
    staging = path.parent / "staging"
    staging.mkdir(exist_ok=True)
    options = UnitOptions(
        str(staging), plan.column, output_column(plan.column, "denoised"), plan.polarity, OnBadRow.NULL, "zstd"
    )
    name = f"unit-{len(list(staging.iterdir()))}.parquet"
    assert len(plan) == 1
    unit = plan.unit(0)
    result = denoise_unit(
        Assignment(unit, plan.files[0], 1, name), replace(options, **changes), in_float32(forward), "test"
    )
    return result, staging / name, plan


def awkward_table(rows: int) -> pa.Table:
    """One column of every kind that has been lost or changed by some Parquet pipeline."""
    n = range(rows)
    columns = {
        "nullable_int": pa.array([None if i % 3 == 0 else i for i in n], pa.int32()),
        "unsigned": pa.array([2**63 + i for i in n], pa.uint64()),
        "money": pa.array([decimal.Decimal(i).scaleb(-2) for i in n], pa.decimal128(20, 2)),
        "word": pa.array([f"w{i % 7}" for i in n]).dictionary_encode(),
        "nested": pa.array([{"a": [i, None], "b": {"c": str(i)}} if i % 5 else None for i in n]),
        "map": pa.array([[("k", i)] for i in n], pa.map_(pa.string(), pa.int64())),
        "zoned": pa.array([i * 10**9 + 1 for i in n], pa.timestamp("ns", "Europe/Rome")),
        "half": pa.array(np.arange(rows, dtype=np.float16)),
        "nan": pa.array([float("nan") if i % 2 else -0.0 for i in n]),
        "bytes": pa.array([bytes([i % 256]) * (i % 4) for i in n], pa.large_binary()),
        "time": pa.array([i % 86400 for i in n], pa.time32("s")),
        "image": images(rows),
        "empty": pa.nulls(rows),
    }
    table = pa.table(columns)
    field = table.schema.field("unsigned").with_metadata({"unit": "cents"})
    fields = [field if name == "unsigned" else table.schema.field(name) for name in table.schema.names]
    return table.cast(pa.schema(fields, metadata={"pandas": "{}", "who": "me"}))


def test_every_other_column_comes_back_unchanged(tmp_path: Path) -> None:
    table = awkward_table(2000)
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=300)
    source = pq.read_table(tmp_path / "a.parquet")
    receipt, target, _ = run(tmp_path / "a.parquet")
    assert isinstance(receipt, Receipt), receipt
    out = pq.read_table(target)
    assert out.schema.names == [*table.schema.names, "denoised"]
    assert out.drop_columns("denoised").schema.equals(source.schema, check_metadata=True)
    for name in table.schema.names:
        same = out[name].combine_chunks()
        if name == "nan":  # NaN ≠ NaN: compare the bits
            assert same.view(pa.int64()).equals(source[name].combine_chunks().view(pa.int64()))
        else:
            assert out[name].equals(source[name]), name


def test_metadata_beside_arrows_schema_are_kept(tmp_path: Path) -> None:
    """As Polars' `write_parquet(metadata=…)` leaves them; pandas' note among them tells of the new column."""
    paths = [tmp_path / f"{name}.parquet" for name in ("first", "second")]
    pandas = json.dumps({"index_columns": [], "columns": [], "column_indexes": []})
    table = pa.table({"image": images(20)}).replace_schema_metadata({"who": "me", "both": "schema"})
    for path in paths:
        with pq.ParquetWriter(path, table.schema) as writer:
            writer.write_table(table)
            writer.add_key_value_metadata({"note": path.stem, "both": "footer", "pandas": pandas})
    receipt, target, plan = run(paths[0])
    assert isinstance(receipt, Receipt), receipt
    assert plan.schema.metadata[b"note"] == b"first"
    found = pq.read_schema(target).metadata
    assert [entry["name"] for entry in json.loads(found.pop(b"pandas"))["columns"]] == ["denoised"]
    assert found == {b"who": b"me", b"both": b"schema", b"note": b"first"}
    assert pq.read_metadata(target).metadata[b"note"] == b"first"
    both = make_plan(list_inputs([str(path) for path in paths]).files, None, Polarity.AUTO, "denoised")
    assert len(both.files) == 2


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [(Layout.BINARY, "uint8"), (Layout.LIST, "uint8"), (Layout.LIST, "float32"), (Layout.TENSOR, "float32")],
)
def test_the_new_column_is_the_models_answer_in_the_inputs_layout(tmp_path: Path, layout: Layout, dtype: str) -> None:
    pq.write_table(pa.table({"image": images(500, layout, dtype)}), tmp_path / "a.parquet")
    receipt, target, plan = run(tmp_path / "a.parquet")
    assert isinstance(receipt, Receipt), receipt
    assert (receipt.rows_in, receipt.rows_out, receipt.bad, receipt.fingerprint) == (500, 500, {}, "test")
    assert (receipt.bytes, receipt.digest) == (target.stat().st_size, output_file.file_digest(target))
    out = pq.read_table(target)
    assert out.schema.field("denoised").type == out.schema.field("image").type
    noisy = decode(out["image"], plan.column).pixels.astype(np.float32)
    clean = decode(out["denoised"], output_column(plan.column, "denoised")).pixels.astype(np.float32)
    assert np.abs(clean - noisy * 0.5).max() <= (0.5 if dtype == "uint8" else 1e-6)


def test_dark_on_light_goes_in_and_comes_out_dark_on_light(tmp_path: Path) -> None:
    pixels = 255 - decode(images(100), output_column(None, "image", Layout.BINARY, "uint8")).pixels
    image = encode(pixels, None, output_column(None, "image", Layout.BINARY, "uint8"))
    pq.write_table(pa.table({"image": image}), tmp_path / "a.parquet")
    receipt, target, plan = run(tmp_path / "a.parquet")
    assert isinstance(receipt, Receipt), receipt
    out = decode(pq.read_table(target)["denoised"], output_column(plan.column, "denoised")).pixels
    assert np.abs((255.0 - out) - (255.0 - pixels) / 2).max() <= 1.0


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_pale_ink_is_shown_as_full_and_comes_out_as_pale(tmp_path: Path, dtype: str) -> None:
    """Of two pens in one set, a row that holds no image among them."""
    digits = draw_digits(400, seed=3)[0].reshape(-1, 784).astype(np.float32) / 255
    pens = np.where(np.arange(400) % 2 == 0, 1.0, 0.5)[:, None]
    noisy = pens * digits + np.random.default_rng(0).normal(0, 0.03, digits.shape)
    column = output_column(None, "image", Layout.LIST, dtype)
    bad = np.zeros(400, np.uint8)
    bad[7] = BadReason.NULL.code
    image = encode(from_model_output(noisy.astype(np.float32), Polarity.DARK_ON_LIGHT, dtype), bad, column)
    pq.write_table(pa.table({"image": image}), tmp_path / "a.parquet")
    shown: list[Any] = []

    def halve_what_is_shown(pixels: Any) -> Any:
        shown.append(pixels.copy())
        return halve(pixels)

    plan = make_plan(list_inputs([str(tmp_path)]).files, None, Polarity.AUTO, "denoised")
    assert plan.tone.ink is not None
    receipt, target, _ = run(tmp_path / "a.parquet", halve_what_is_shown, plan, tone=plan.tone)
    assert isinstance(receipt, Receipt), receipt
    darkest = np.quantile(np.concatenate(shown), 0.98, axis=1)
    assert np.median(darkest[0::2]) == pytest.approx(1.0, abs=0.06)
    assert np.median(darkest[1::2]) == pytest.approx(1.0, abs=0.06)
    out = pq.read_table(target)["denoised"]
    assert [i for i, value in enumerate(out.is_null().to_pylist()) if value] == [7]
    made = to_model_input(decode(out, output_column(plan.column, "denoised")).pixels, Polarity.DARK_ON_LIGHT)[bad == 0]
    given = noisy[bad == 0]
    assert np.abs(made - given.clip(0, 1) / 2 if dtype == "uint8" else made - given / 2).mean() < 0.01


def _with_bad_rows(path: Path) -> list[tuple[int, str]]:
    values = images(300, Layout.LIST, "float32").to_pylist()
    values[7] = None
    values[100] = values[100][:50]
    values[200][3] = float("nan")
    values[299][5] = None
    table = pa.table({"id": list(range(300)), "image": pa.array(values, pa.list_(pa.float32()))})
    pq.write_table(table, path)
    return [(7, "null"), (100, "wrong_length"), (200, "not_finite"), (299, "null_pixels")]


def test_bad_rows_stay_with_a_null_and_are_listed(tmp_path: Path) -> None:
    expected = _with_bad_rows(tmp_path / "a.parquet")
    receipt, target, _ = run(tmp_path / "a.parquet")
    assert isinstance(receipt, Receipt), receipt
    assert (receipt.rows_out, sum(receipt.bad.values())) == (300, 4)
    listed = pq.read_table(target.parent / receipt.bad_file).to_pylist()
    assert [(row["row"], row["reason"]) for row in listed] == expected
    out = pq.read_table(target)
    assert [i for i, value in enumerate(out["denoised"].is_null().to_pylist()) if value] == [7, 100, 200, 299]
    assert out.drop_columns("denoised").slice(0, 200).equals(pq.read_table(tmp_path / "a.parquet").slice(0, 200))


def test_quarantined_rows_are_set_aside(tmp_path: Path) -> None:
    expected = _with_bad_rows(tmp_path / "a.parquet")
    receipt, target, _ = run(tmp_path / "a.parquet", on_bad_row=OnBadRow.QUARANTINE)
    assert isinstance(receipt, Receipt), receipt
    assert (receipt.rows_in, receipt.rows_out) == (300, 296)
    gone = {row for row, _ in expected}
    assert pq.read_table(target)["id"].to_pylist() == [i for i in range(300) if i not in gone]
    # They are kept whole, as they were, in a file that is an input like any other.
    aside = target.with_name(receipt.quarantine_file)
    assert (aside.stat().st_size, output_file.file_digest(aside)) == (
        receipt.quarantine_bytes,
        receipt.quarantine_digest,
    )
    expected_rows = pq.read_table(tmp_path / "a.parquet").take(sorted(gone))
    assert pq.read_schema(aside).equals(expected_rows.schema, check_metadata=True)
    assert repr(pq.read_table(aside).to_pylist()) == repr(expected_rows.to_pylist())  # NaN is not equal to itself


def test_without_bad_rows_nothing_is_set_aside(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": images(50)}), tmp_path / "a.parquet")
    receipt, target, _ = run(tmp_path / "a.parquet", on_bad_row=OnBadRow.QUARANTINE)
    assert isinstance(receipt, Receipt), receipt
    assert receipt.quarantine_file == ""
    assert [path.name for path in target.parent.iterdir()] == [target.name]


def test_progress_and_stages_are_told(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": images(9000)}), tmp_path / "a.parquet")
    plan = make_plan(list_inputs([str(tmp_path / "a.parquet")]).files, None, Polarity.AUTO, "denoised")
    options = UnitOptions(
        str(tmp_path), plan.column, output_column(plan.column, "denoised"), plan.polarity, OnBadRow.NULL, "zstd"
    )
    told: list[int] = []
    receipt = denoise_unit(
        Assignment(plan.unit(0), plan.files[0], 1, "out.parquet"),
        options,
        in_float32(halve),
        lambda: "at the end",
        told.append,
    )
    assert isinstance(receipt, Receipt), receipt
    assert len(told) > 2
    assert told == sorted(told)
    assert told[-1] == 9000
    assert receipt.fingerprint == "at the end"
    assert set(receipt.seconds) == {"read", "decode", "forward", "encode", "write", "verify", "total"}


def test_fail_on_a_bad_row_names_it_and_stops_the_job(tmp_path: Path) -> None:
    _with_bad_rows(tmp_path / "a.parquet")
    failure, _, _ = run(tmp_path / "a.parquet", on_bad_row=OnBadRow.FAIL)
    assert isinstance(failure, Failure)
    assert (failure.final, failure.kind) == (True, "JobFailed")
    assert "a.parquet: row 7 is bad: null" in failure.reason


def test_an_input_that_changed_stops_the_job(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": images(100)}), path)
    plan = make_plan(list_inputs([str(path)]).files, None, Polarity.AUTO, "denoised")
    pq.write_table(pa.table({"image": images(100)}), path, compression="none")
    failure, _, _ = run(path, plan=plan)
    assert isinstance(failure, Failure)
    assert (failure.final, failure.kind) == (True, "DataChanged")
    assert "a.parquet changed" in failure.reason


def test_no_single_flipped_bit_in_the_pages_goes_unseen(tmp_path: Path) -> None:
    """With page checksums in the input, every damage of a page is a failure, never a different image."""
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": images(50)}), path, compression="none", write_page_checksum=True)
    plan = make_plan(list_inputs([str(path)]).files, None, Polarity.AUTO, "denoised")
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    pages = 50 * 784
    status = path.stat()
    for position in rng.integers(60, pages, 40):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        _keep_time(path, status)
        failure, _, _ = run(path, plan=plan)
        assert isinstance(failure, Failure), position
        assert not failure.final
        assert "\n" not in failure.reason


def _keep_time(path: Path, status: Any) -> None:
    import os

    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "the disk quota is used up"),
        (errno.EROFS, "the file system is read-only"),
    ],
)
def test_a_disk_without_room_stops_the_job_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, words: str
) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": images(100)}), path)

    def full(_self: object, _data: object) -> int:
        raise OSError(code, "no")

    monkeypatch.setattr(output_file.DigestSink, "write", full)
    failure, staged, _ = run(path)
    assert isinstance(failure, Failure)
    assert (failure.final, failure.kind) == (True, "ResourceExhausted")
    assert failure.reason == f"{tmp_path / 'staging'}: {words}"
    assert not staged.exists()


def test_a_file_size_limit_stops_the_job_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": images(100)}), path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        failure, staged, _ = run(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert isinstance(failure, Failure)
    assert (failure.final, failure.kind) == (True, "ResourceExhausted")
    assert "larger than is allowed" in failure.reason
    assert "ulimit -f" in failure.hint
    assert not staged.exists()


def test_a_model_that_gives_nan_is_no_result(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": images(100)}), path)
    failure, _, _ = run(path, forward=lambda pixels: np.full_like(pixels, np.nan))
    assert isinstance(failure, Failure)
    assert "not a number" in failure.reason


def test_chunks_are_bounded_by_bytes_not_rows() -> None:
    assert module.chunk_rows(784) > 500
    assert module.chunk_rows(1 << 20) <= 16
    assert module.chunk_rows(1 << 40) == 1


def test_small_chunks_give_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"id": list(range(1000)), "image": images(1000)}), path, row_group_size=37)
    _, whole, plan = run(path)
    monkeypatch.setattr(module, "chunk_rows", lambda *_: 13)
    _, parts, _ = run(path, plan=plan)
    assert pq.read_table(whole).equals(pq.read_table(parts))


def test_an_error_in_the_reader_or_writer_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": images(100)}), path)

    def broken(*_: Any) -> Any:
        raise UnicodeDecodeError("utf-8", b"x", 0, 1, "made up")
        yield

    monkeypatch.setattr(module, "read_unit", broken)
    failure, _, _ = run(path)
    assert isinstance(failure, Failure)
    assert "UnicodeDecodeError" in failure.reason
