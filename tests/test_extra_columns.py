"""What a model says of its images, as columns: values, nulls, every layout, and which models are refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from denoise_batch import models
from denoise_batch.bundle import CODE_SIZES, read_bundle
from denoise_batch.bundle.saving import BundleCard, save_bundle
from denoise_batch.denoiser import Denoiser
from denoise_batch.errors import ColumnError, DenoiseBatchError, FlagError, ResumeError
from denoise_batch.extra_columns import NO_EXTRAS, Denoised, ExtraColumns, poor_lines
from denoise_batch.images import Layout, Polarity, encode, output_column
from denoise_batch.inference import assembly
from denoise_batch.inference.denoise_unit import OnBadRow
from denoise_batch.inference.infer import InferSettings
from denoise_batch.inference.request import look_at
from denoise_batch.inference.run_folder import open_run

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import DenoiseFile

pytestmark = pytest.mark.usefixtures("footers_read_here")

QUALITY, CODE = ExtraColumns(quality=True), ExtraColumns(code=True)
ROWS, BAD = 9, (2, 5, 8)
LAYOUTS = [(Layout.BINARY, "uint8"), (Layout.ENCODED, "uint8"), (Layout.LIST, "float16"), (Layout.LIST, "uint8")]
LAYOUTS += [(Layout.TENSOR, "float32"), (Layout.LIST, "float64")]


@pytest.fixture(scope="module")
def quality_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with the network that says how good its images are, untrained."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("quality") / "model"
    network = models.build("bounds-unet", {"width": 8, "deep": 8, "bottleneck": 16})
    save_bundle(folder, network, BundleCard("bounds-unet", network.parameters_json))
    return folder


def _images(layout: Layout = Layout.BINARY, dtype: str = "uint8") -> pa.Array:
    """Row i is all i tenths of full ink; rows 2, 5 and 8 are null."""
    column = output_column(None, "image", layout, dtype)
    steps = np.arange(ROWS)[:, None].repeat(784, 1) / 10
    pixels = (steps * 255).round().astype(np.uint8) if dtype == "uint8" else steps.astype(dtype)
    bad = np.isin(np.arange(ROWS), BAD).astype(np.uint8)
    return pa.table([encode(pixels, bad, column)], schema=pa.schema([column.field]))


def _forward(noisy: Any) -> Denoised:
    """Stands in for a model: what it says follows from each image's mean."""
    mean = noisy.mean(axis=1).astype(np.float32)
    return Denoised(noisy, mean * 40, mean / 2, np.stack([mean, -mean, mean + 1], axis=1))


@pytest.mark.parametrize("on_bad_row", [OnBadRow.NULL, OnBadRow.QUARANTINE])
@pytest.mark.parametrize(("layout", "dtype"), LAYOUTS)
def test_columns_beside_images_of_every_layout(
    tmp_path: Path, denoise_file: DenoiseFile, layout: Layout, dtype: str, on_bad_row: OnBadRow
) -> None:
    pq.write_table(_images(layout, dtype), tmp_path / "in.parquet")
    both = ExtraColumns(quality=True, code=True)
    done = denoise_file(tmp_path / "in.parquet", tmp_path, _forward, chunk_rows=4, extras=both, on_bad_row=on_bad_row)
    out = pq.read_table(done.files[0])
    names = ["denoised_psnr", "denoised_noise_level", "denoised_code"]
    assert out.schema.names == ["image", "denoised", *names]
    assert [out.schema.field(name).type for name in names] == [pa.float32(), pa.float32(), pa.list_(pa.float32())]
    kept = [row for row in range(ROWS) if on_bad_row is OnBadRow.NULL or row not in BAD]
    for row, psnr, level, code in zip(kept, *(out[name].to_pylist() for name in names), strict=True):
        if row in BAD:
            assert (psnr, level, code) == (None, None, None)
        else:
            assert (psnr, level) == pytest.approx((row * 4, row / 20), abs=0.1)
            assert code == pytest.approx([row / 10, -row / 10, row / 10 + 1], abs=0.003)
    assert sum(receipt.poor for receipt in done.receipts) == len({0, 1, 2} - set(BAD))  # below 10 dB


def test_nothing_is_added_that_is_not_asked_for(tmp_path: Path, denoise_file: DenoiseFile) -> None:
    pq.write_table(_images(), tmp_path / "in.parquet")
    done = denoise_file(tmp_path / "in.parquet", tmp_path, _forward)
    assert pq.read_schema(done.files[0]).names == ["image", "denoised"]
    assert not any(receipt.poor for receipt in done.receipts)
    assert (NO_EXTRAS.to_json(), QUALITY.to_json(), CODE.to_json()) == ({}, {"quality": True}, {"code": True})
    assert ExtraColumns.from_json({"quality": True, "column": None}) == QUALITY


def test_images_of_which_next_to_nothing_is_expected_are_named() -> None:
    assert poor_lines(None, 100) == poor_lines(0, 100) == []
    (line,) = poor_lines(1234, 60_000)
    assert line.startswith("note: 1,234 of 60,000 rows have an expected PSNR below 10 dB")
    assert "--worst" in line


def test_a_number_that_is_not_finite_fails() -> None:
    broken = Denoised(np.zeros((2, 784), np.float32), np.array([1, np.nan], np.float32), np.zeros(2, np.float32))
    with pytest.raises(DenoiseBatchError, match="not finite"):
        QUALITY.arrays(broken, np.zeros(2))


def test_spark_finds_the_columns() -> None:
    import json

    from denoise_batch.inference.output_schema import output_schema

    key = b"org.apache.spark.sql.parquet.row.metadata"
    schema = pa.schema([("a", pa.int32())], metadata={key: b'{"type":"struct","fields":[]}'})
    wider = output_schema(schema, *ExtraColumns(quality=True, code=True).fields("denoised"))
    fields = json.loads(wider.metadata[key])["fields"]
    assert [field["name"] for field in fields] == ["denoised_psnr", "denoised_noise_level", "denoised_code"]
    assert fields[2]["type"]["elementType"] == "float"


# --- the model --------------------------------------------------------------------------------------------------------


def test_what_is_said_comes_with_the_same_pixels(quality_model: Path, model_folder: Path) -> None:
    noisy = np.random.default_rng(0).normal(0.3, 0.5, (600, 784)).astype(np.float32)
    for folder, extras in ((quality_model, QUALITY), (model_folder, CODE)):
        denoiser = Denoiser(read_bundle(folder), device="cpu", threads=1)
        denoised = denoiser.run(noisy, extras)
        assert np.array_equal(denoised.pixels, denoiser(noisy))
        for name in extras.fields("x"):
            values = getattr(denoised, name.name.removeprefix("x_"))
            assert values.dtype == np.float32
            assert len(values) == 600
        assert denoiser.run(noisy[:0], extras).pixels.shape == (0, 784)
    assert denoised.code is not None
    with torch.inference_mode():
        code = denoiser.model.code(torch.from_numpy(noisy).view(-1, 1, 28, 28))
    np.testing.assert_allclose(denoised.code, code.flatten(1).numpy(), atol=1e-5)


def test_one_forward_pass_gives_all(quality_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    denoiser = Denoiser(read_bundle(quality_model), device="cpu", threads=1, batch=50)
    passes: list[int] = []
    whole = denoiser.model._pass
    monkeypatch.setattr(denoiser.model, "_pass", lambda noisy: passes.append(len(noisy)) or whole(noisy))
    denoised = denoiser.run(np.zeros((120, 784), np.float32), QUALITY)
    assert passes == [50, 50, 20]
    assert denoised.noise_level is not None
    assert denoised.noise_level.min() >= 0


def test_models_that_cannot_tell_are_refused(quality_model: Path, model_folder: Path) -> None:
    quality, seed = read_bundle(quality_model), read_bundle(model_folder)
    assert (quality.has_quality, quality.code_size, seed.has_quality, seed.code_size) == (True, 0, False, 128)
    QUALITY.check(quality)
    CODE.check(seed)
    with pytest.raises(FlagError, match=r"--quality.*'seed'") as error:
        QUALITY.check(seed)
    assert str(model_folder) in error.value.message
    with pytest.raises(FlagError, match=r"--code.*'bounds-unet'"):
        CODE.check(quality)


def test_code_sizes_are_those_of_the_networks() -> None:
    found = {name: models.build(name).code_size for name in models.ARCHITECTURES}
    assert {name: size for name, size in found.items() if size} == CODE_SIZES


# --- the run ----------------------------------------------------------------------------------------------------------


def _settings(tmp_path: Path, model: Path, **changes: Any) -> InferSettings:
    if not (tmp_path / "in.parquet").exists():
        pq.write_table(_images(), tmp_path / "in.parquet")
    source, polarity = str(tmp_path / "in.parquet"), Polarity.LIGHT_ON_DARK
    return InferSettings((source,), str(tmp_path / "out"), model=model, polarity=polarity, **changes)


def test_a_run_with_the_columns_is_another_run_than_one_without(tmp_path: Path, quality_model: Path) -> None:
    def start(extras: ExtraColumns) -> bool:
        request = look_at(_settings(tmp_path, quality_model, extras=extras))
        with open_run(request.out, request.listing.files, request.identity, request.plan, overwrite=False) as run:
            return run.resumed

    assert (start(QUALITY), start(QUALITY)) == (False, True)
    with pytest.raises(ResumeError, match=r"quality \(yes then, not given now\)"):
        start(NO_EXTRAS)


def test_the_request_is_refused_before_anything_is_read(tmp_path: Path, model_folder: Path) -> None:
    with pytest.raises(FlagError, match="--quality"):
        look_at(_settings(tmp_path, model_folder, extras=QUALITY))


def test_a_column_that_is_there_already_is_named(tmp_path: Path, quality_model: Path) -> None:
    table = _images().append_column("denoised_psnr", pa.array([1.0] * ROWS))
    pq.write_table(table, tmp_path / "in.parquet")
    with pytest.raises(ColumnError, match="'denoised_psnr' already"):
        look_at(_settings(tmp_path, quality_model, extras=QUALITY)).plan()
    settings = _settings(tmp_path, quality_model, extras=QUALITY, output_column="clean")
    assert look_at(settings).plan().rows == ROWS


def test_an_output_without_rows_has_the_columns(tmp_path: Path, quality_model: Path) -> None:
    pq.write_table(_images().slice(0, 0), tmp_path / "in.parquet")
    request = look_at(_settings(tmp_path, quality_model, extras=QUALITY))
    with open_run(request.out, request.listing.files, request.identity, request.plan, overwrite=False) as run:
        built = assembly.build_folder(run, request.output_column(run.plan), "zstd", {})
        assert pq.read_schema(built / "part-00000.parquet").names[1:] == [
            "denoised",
            "denoised_psnr",
            "denoised_noise_level",
        ]
