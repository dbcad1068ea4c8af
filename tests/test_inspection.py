"""What a path is, told from its content; and what `verify` finds in damaged ones."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from denoise_batch.corrupt import CorruptSettings, corrupt
from denoise_batch.errors import MissingFileError, ModelError, ParquetError
from denoise_batch.images import Polarity
from denoise_batch.inference.manifest import vouching
from denoise_batch.inference.plan import make_plan
from denoise_batch.inspection import inspect
from denoise_batch.inspection.result import Kind
from denoise_batch.parquet.output_file import file_digest
from denoise_batch.parquet.pages import has_checksum
from denoise_batch.storage.listing import list_inputs

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.usefixtures("footers_read_here")
@pytest.mark.parametrize(
    ("kind", "layout", "dtype"),
    [
        ("binary", "binary", "uint8"),
        ("list of float32", "list", "float32"),
        ("tensor", "tensor", "uint8"),
        ("encoded", "encoded", "uint8"),
    ],
)
def test_a_file_of_images(tmp_path: Path, digits: Any, write_images: Any, kind: str, layout: str, dtype: str) -> None:
    path = write_images(tmp_path / "in.parquet", digits[0], kind, row_group_size=200, label=pa.array(digits[1]))
    found = inspect(str(path))
    assert found.kind is Kind.PARQUET
    assert not found.problems
    assert (found.facts["files"], found.facts["rows"]) == (1, 300)
    assert found.facts["row_groups"] == {"count": 2, "smallest": 100, "largest": 200}
    image: dict[str, Any] = {"name": "image", "layout": layout, "dtype": dtype, "polarity": "light-on-dark"}
    image["sampled"] = {"rows": 128, "bad": 0, "dark_on_light": 0}
    assert found.facts["image_column"] == image
    assert list(found.facts["columns"]) == ["image", "label"]
    assert found.facts["bytes"] == path.stat().st_size
    assert json.loads(json.dumps(found.to_json()))["kind"] == "parquet"


@pytest.mark.usefixtures("footers_read_here")
def test_lines_are_for_people(tmp_path: Path, digits: Any, write_images: Any) -> None:
    path = write_images(tmp_path / "in.parquet", digits[0])
    lines = inspect(str(path), verify=True).lines()
    assert lines[0] == f"{path}: Parquet"
    assert "  rows: 300" in lines
    assert "    layout: binary" in lines
    assert lines[-1] == "verified: no problems in the rows that are there (no manifest tells how many should be)"


@pytest.mark.usefixtures("footers_read_here")
def test_a_set_of_both_polarities_is_told_with_the_way_on(tmp_path: Path, digits: Any, write_images: Any) -> None:
    images = np.concatenate([255 - digits[0][:50], digits[0][50:64]])
    image = inspect(str(write_images(tmp_path / "in.parquet", images))).facts["image_column"]
    assert image["polarity"].startswith("mixed: 78% of the images looked at are dark-on-light")
    assert "--polarity each" in image["polarity"]
    assert image["sampled"] == {"rows": 64, "bad": 0, "dark_on_light": 50}


@pytest.mark.usefixtures("footers_read_here")
@pytest.mark.parametrize("checksums", [True, False])
@pytest.mark.parametrize("compression", ["zstd", "none"])
@pytest.mark.parametrize("dictionary", [True, False])
def test_page_checksums_are_seen(
    tmp_path: Path, digits: Any, checksums: bool, compression: str, dictionary: bool
) -> None:
    rows = [image.tobytes() for image in digits[0]]
    path = tmp_path / "in.parquet"
    table = pa.table({"image": pa.array(rows, pa.binary(784))})
    pq.write_table(table, path, write_page_checksum=checksums, compression=compression, use_dictionary=dictionary)
    facts = inspect(str(path)).facts
    assert facts["page_checksums"] is checksums
    assert facts["compression"] == ("uncompressed" if compression == "none" else compression)


@pytest.mark.usefixtures("footers_read_here")
@pytest.mark.parametrize("kind", ["binary", "list of uint8"])
def test_how_a_column_with_a_dot_in_its_name_was_written(
    tmp_path: Path, digits: Any, write_images: Any, kind: str
) -> None:
    source = write_images(tmp_path / "in.parquet", digits[0], kind, column="img.raw", img=pa.array(digits[1]))
    leaf = "img.raw" if kind == "binary" else "img.raw.list.element"
    codecs = {leaf: "zstd", "img": "snappy"}
    pq.write_table(pq.read_table(source), source, compression=codecs, write_page_checksum=True)
    facts = inspect(str(source)).facts
    assert facts["image_column"]["name"] == "img.raw"
    assert (facts["compression"], facts["page_checksums"]) == ("zstd", True)


@pytest.mark.usefixtures("footers_read_here")
def test_how_a_column_was_written_of_whose_name_another_makes_more(
    tmp_path: Path, digits: Any, write_images: Any
) -> None:
    source = write_images(tmp_path / "in.parquet", digits[0], column="img", **{"img.label": pa.array(digits[1])})
    pq.write_table(pq.read_table(source), source, compression={"img": "zstd", "img.label": "snappy"})
    assert inspect(str(source)).facts["compression"] == "zstd"


def test_a_page_header_that_is_none() -> None:
    for header in (b"", b"\xff" * 64, b"\x15\x80"):
        assert not has_checksum(pa.BufferReader(header), 0)


def test_a_folder_with_a_foreign_file_and_a_damaged_one(tmp_path: Path, digits: Any, write_images: Any) -> None:
    for name in ("a.parquet", "b.parquet"):
        write_images(tmp_path / name, digits[0])
    (tmp_path / "c.parquet").write_bytes(b"not Parquet")
    (tmp_path / "d.parquet").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("hello")
    write_images(tmp_path / "e.parquet", digits[0], column="other")
    found = inspect(str(tmp_path))
    assert (found.facts["files"], found.facts["rows"], found.facts["skipped_files"]) == (5, 900, 1)
    assert found.facts["skipped"] == [str(tmp_path / "notes.txt")]
    problems = "\n".join(found.problems)
    assert "c.parquet" in problems
    assert "d.parquet: it is empty (0 bytes)" in problems
    assert f"e.parquet: differs in the columns from {tmp_path}/a.parquet (column 'image' is missing)" in problems


@pytest.mark.usefixtures("footers_read_here")
def test_files_that_differ_in_arrows_types_alone(tmp_path: Path, digits: Any, write_images: Any) -> None:
    source = write_images(tmp_path / "a.parquet", digits[0], "variable binary")
    table = pq.read_table(source)
    pq.write_table(table.cast(pa.schema([pa.field("image", pa.large_binary())])), tmp_path / "b.parquet")
    found = inspect(str(tmp_path), verify=True)
    assert found.problems == ()
    assert found.facts["columns"] == {"image": "large_binary"}
    assert found.facts["image_column"]["sampled"]["rows"] == 128
    assert found.facts["bad_rows"] == {}


def test_a_type_that_pyarrow_does_not_know(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pl.DataFrame({"n": pl.Series([1], dtype=pl.Int128)}).write_parquet(path)
    with pytest.raises(ParquetError) as caught:
        inspect(str(path))
    assert caught.value.message.startswith(f"{path}: PyArrow cannot read its schema: ")
    assert "64 bits" in caught.value.message
    assert "as another type" in caught.value.hint
    with pytest.raises(ParquetError) as caught:
        make_plan(list_inputs([str(path)]).files, None, Polarity.AUTO, "denoised")
    assert "as another type" in caught.value.hint


@pytest.mark.usefixtures("footers_read_here")
def test_verify_counts_bad_rows(tmp_path: Path, digits: Any, write_images: Any) -> None:
    images = digits[0].astype(np.float32) / 255
    images[3, 0, 0] = np.nan
    bad = np.zeros(300, np.bool_)
    bad[[1, 2]] = True
    path = write_images(tmp_path / "in.parquet", images, "list of float32", bad=bad)
    told: list[tuple[int, int]] = []
    found = inspect(str(path), verify=True, progress=lambda done, total: told.append((done, total)))
    assert found.facts["bad_rows"] == {"null": 2, "not_finite": 1}
    assert not found.problems
    assert told[-1] == (300, 300)


def test_verify_finds_a_flipped_bit(tmp_path: Path, digits: Any, write_images: Any) -> None:
    source = write_images(tmp_path / "in.parquet", np.tile(digits[0], (8, 1, 1)))
    path = tmp_path / "noisy.parquet"
    corrupt(CorruptSettings((str(source),), path))
    content, chunk = bytearray(path.read_bytes()), pq.read_metadata(path).row_group(0).column(0)
    content[chunk.data_page_offset + chunk.total_compressed_size - 100] ^= 1  # far behind the rows that are sampled
    path.write_bytes(content)
    assert not inspect(str(path)).problems
    (problem,) = inspect(str(path), verify=True).problems
    assert "noisy.parquet" in problem


def test_images_of_which_no_sample_can_be_read_are_a_fault(tmp_path: Path, digits: Any, write_images: Any) -> None:
    """Once, though `verify` meets it again; what is beside them is told from as before."""
    for name in ("a", "b"):
        path = tmp_path / f"{name}.parquet"
        corrupt(CorruptSettings((str(write_images(tmp_path / "in", digits[0])),), path))
        content, chunk = bytearray(path.read_bytes()), pq.read_metadata(path).row_group(0).column(0)
        if name == "a":
            content[chunk.data_page_offset + chunk.total_compressed_size // 2] ^= 1
            path.write_bytes(content)
    for verify in (False, True):
        found = inspect(str(tmp_path / "a.parquet"), verify=verify)
        (problem,) = found.problems
        assert problem.startswith(str(tmp_path / "a.parquet"))
        assert "CRC checksum verification failed" in problem
        assert found.facts["image_column"]["polarity"] == "no images that could be read"
        (problem,) = inspect(str(tmp_path / "[ab].parquet"), verify=verify).problems
        assert problem.startswith(str(tmp_path / "a.parquet"))


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.usefixtures("footers_read_here")
def test_a_name_that_stands_twice_is_a_fault_and_hides_no_images(
    tmp_path: Path, digits: Any, write_images: Any, verify: bool
) -> None:
    path = write_images(tmp_path / "in.parquet", digits[0])
    table = pq.read_table(path)
    for _ in range(2):
        table = table.append_column("label", pa.array(range(300)))
    pq.write_table(table, path)
    found = inspect(str(path), verify=verify)
    assert found.facts["image_column"]["sampled"]["rows"] == 64
    assert found.facts["image_column"]["polarity"] == "light-on-dark"
    assert found.problems == (f"{path}: column names stand more than once: label",)


@pytest.mark.usefixtures("footers_read_here")
@pytest.mark.parametrize("start", ["a", "a="])
def test_a_name_that_leaves_no_room_for_a_manifest(tmp_path: Path, digits: Any, write_images: Any, start: str) -> None:
    file = write_images(tmp_path / f"{start.ljust(247, 'a')}.parquet", digits[0][:5])
    assert inspect(str(file), verify=True).problems == ()


def test_what_corrupt_noted(tmp_path: Path, digits: Any, write_images: Any) -> None:
    source = write_images(tmp_path / "in.parquet", digits[0])
    corrupt(CorruptSettings((str(source),), tmp_path / "noisy.parquet", seed=3))
    facts = inspect(str(tmp_path / "noisy.parquet")).facts
    assert facts["made_by"]["seed"] == 3
    assert facts["image_column"]["name"] == "image"


@pytest.mark.usefixtures("footers_read_here")
def test_parquet_without_images(tmp_path: Path) -> None:
    pq.write_table(pa.table({"x": [1, 2]}), tmp_path / "in.parquet")
    found = inspect(str(tmp_path / "in.parquet"), verify=True)
    assert found.facts["image_column"].startswith("none: no column holds 28×28 images")
    assert not found.problems


@pytest.mark.usefixtures("footers_read_here")
def test_parquet_without_rows(tmp_path: Path, digits: Any, write_images: Any) -> None:
    found = inspect(str(write_images(tmp_path / "in.parquet", digits[0][:0])), verify=True)
    assert found.facts["rows"] == 0
    assert found.facts["image_column"]["name"] == "image"


def test_a_model_folder(model_folder: Path) -> None:
    found = inspect(str(model_folder))
    assert found.kind is Kind.MODEL
    assert found.facts["architecture"] == "seed"
    assert len(found.facts["sha256"]) == 64
    assert found.lines()[0] == f"{model_folder}: a model folder"


def test_a_model_that_ships(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = inspect("bounds-unet")
    assert found.kind is Kind.MODEL
    assert found.facts["architecture"] == "bounds-unet"
    with pytest.raises(MissingFileError):
        inspect("./nothing-of-this-name")
    (tmp_path / "bounds-unet").mkdir()  # a folder here comes first, as everywhere else
    with pytest.raises(MissingFileError):
        inspect("bounds-unet")


def test_a_model_folder_that_was_tampered_with(tmp_path: Path, model_folder: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ModelError):
        inspect(str(folder))
    (folder / "model.json").unlink()
    with pytest.raises(ModelError, match=r"no model\.json"):
        inspect(str(folder))


def test_what_cannot_be_inspected(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="does not exist"):
        inspect(str(tmp_path / "absent"))
    with pytest.raises(MissingFileError, match="neither a model folder nor"):
        inspect(str(tmp_path))
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ParquetError, match="not Parquet"):
        inspect(str(tmp_path / "text"))


@pytest.mark.usefixtures("footers_read_here")
def test_file_uris_are_told_from_their_content(
    tmp_path: Path, digits: Any, write_images: Any, model_folder: Path
) -> None:
    assert inspect(f"file://{model_folder}").facts == inspect(str(model_folder)).facts
    write_images(tmp_path / "in.parquet", digits[0][:5])
    assert inspect(f"file://{tmp_path}/in.parquet").kind is Kind.PARQUET
    out = _quality_output(tmp_path / "an out", digits[0][:5], write_images)
    found = inspect(f"file://{tmp_path}/an%20out", verify=True)
    assert (found.kind, found.path, found.problems) == (Kind.OUTPUT, str(out), ())
    with pytest.raises(MissingFileError, match="absent does not exist"):
        inspect(f"file://{tmp_path}/absent")
    (tmp_path / ".later.denoise-batch").mkdir()
    with pytest.raises(MissingFileError, match="later is not finished"):
        inspect(f"file://{tmp_path}/later")


def test_an_unfinished_run(tmp_path: Path) -> None:
    (tmp_path / ".out.denoise-batch").mkdir()
    with pytest.raises(MissingFileError, match="is not finished") as raised:
        inspect(str(tmp_path / "out"))
    assert "same `denoise-batch infer` command" in raised.value.hint


def test_an_unfinished_training(tmp_path: Path) -> None:
    (tmp_path / ".model.training").mkdir()
    with pytest.raises(MissingFileError, match="model is not finished") as raised:
        inspect(str(tmp_path / "model"))
    assert "same `denoise-batch train` command" in raised.value.hint


def _quality_output(out: Path, images: np.ndarray, write_images: Any) -> Path:
    """A folder as `infer --quality` leaves it, with one data file."""
    (out / "_denoise_batch").mkdir(parents=True)
    said = {f"denoised_{name}": pa.array(np.arange(len(images)), pa.float32()) for name in ("psnr", "sigma", "range")}
    part = write_images(out / "part-0.parquet", images, **said)
    entry = {"path": part.name, "bytes": part.stat().st_size, "digest": file_digest(part), "rows": len(images)}
    content = {"rows_out": len(images), "files": [entry], "sidecar": [], "quality": True, "output_column": "denoised"}
    manifest = json.dumps(content).encode()
    (out / "_denoise_batch" / "manifest.json").write_bytes(manifest)
    (out / "_SUCCESS").write_bytes(vouching(manifest))
    return out


@pytest.mark.usefixtures("footers_read_here")
def test_what_is_wrong_with_an_output_is_said_whatever_is_left_of_it(
    tmp_path: Path, digits: Any, write_images: Any
) -> None:
    out = _quality_output(tmp_path / "out", digits[0][:5], write_images)
    for verify in (False, True):
        found = inspect(str(out), verify=verify)
        assert (found.facts["ranges"]["denoised_psnr"], found.problems) == ("0 to 4", ())
    (out / "_key=1").mkdir()
    (out / "_key=1" / "part-0.parquet").write_bytes(b"foreign")
    assert inspect(str(out), verify=True).problems == tuple(
        f"{path} is not part of the output" for path in (out / "_key=1", out / "_key=1" / "part-0.parquet")
    )
    shutil.rmtree(out / "_key=1")
    (out / "part-0.parquet").unlink()
    assert inspect(str(out), verify=True).problems == (f"{out / 'part-0.parquet'} is missing",)
    assert (inspect(str(out)).facts["ranges"], inspect(str(out)).problems) == ({}, ())


@pytest.mark.usefixtures("footers_read_here")
def test_a_folder_of_a_manifest_stands_for_its_output(tmp_path: Path, digits: Any, write_images: Any) -> None:
    out = _quality_output(tmp_path / "out", digits[0][:5], write_images)
    found = inspect(str(out / "_denoise_batch"), verify=True)
    assert (found.path, found.facts["rows_out"], found.problems) == (str(out), 5, ())
    single, beside = tmp_path / "a=1.parquet", tmp_path / "_a=1.parquet.manifest"
    shutil.move(out / "_denoise_batch", beside)
    shutil.move(out / "_SUCCESS", beside)
    shutil.move(out / "part-0.parquet", single)
    found = inspect(f"{beside}/", verify=True)
    assert (found.path, found.kind, found.problems) == (str(single), Kind.OUTPUT, ())
    single.unlink()
    with pytest.raises(MissingFileError, match=r"/a=1\.parquet"):
        inspect(str(beside))


@pytest.mark.usefixtures("footers_read_here")
def test_a_finished_output(tmp_path: Path, digits: Any, write_images: Any) -> None:
    out = tmp_path / "out.parquet"
    write_images(out, digits[0])
    described = tmp_path / "_out.parquet.manifest"
    described.mkdir()
    entry = {"path": "out.parquet", "bytes": 1, "digest": "0"}
    sound = {"format": 1, "rows_in": 300, "output_column": "denoised", "files": [entry] * 2, "sidecar": []}
    (described / "manifest.json").write_text(json.dumps(sound))
    found = inspect(str(out))
    assert found.kind is Kind.OUTPUT
    assert (found.facts["rows_in"], found.facts["files"]) == (300, 2)
    (problem,) = inspect(str(out), verify=True).problems
    assert "_SUCCESS is missing" in problem
    odd = [{"files": 5}, {"files": {"a": 1}}, {"files": [{}]}, {"files": [1]}, {"sidecar": None}]
    (described / "manifest.json").write_text(json.dumps(sound | {"quality": True, "output_column": 1}))
    assert inspect(str(out)).problems == ()
    texts = [json.dumps(content) for content in [None, [], {}, *(sound | other for other in odd)]]
    for damaged in ("{", "\xff", "[" * 100_000, *texts):
        (described / "manifest.json").write_text(damaged, encoding="latin-1")
        (problem,) = inspect(str(out)).problems
        assert problem.startswith("the manifest is damaged: ")
        (described / "_SUCCESS").write_bytes(vouching(damaged.encode("latin-1")))
        (problem,) = inspect(str(out), verify=True).problems
        assert " damaged: " in problem
    (described / "manifest.json").unlink()
    for verify in (False, True):
        found = inspect(str(out), verify=verify)
        assert found.kind is Kind.OUTPUT
        assert found.problems == (f"{described / 'manifest.json'} is missing",)
