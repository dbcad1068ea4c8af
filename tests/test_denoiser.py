"""A model made ready to run: its precision, and what becomes of a GPU whose memory runs out."""

from __future__ import annotations

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from denoise_batch import models
from denoise_batch.bundle import SHIPPED_FOLDER, read_bundle
from denoise_batch.bundle.saving import BundleCard, save_bundle
from denoise_batch.denoiser import Denoiser, lower_precision
from denoise_batch.errors import DenoiseBatchError, FlagError, ResourceExhausted
from denoise_batch.extra_columns import ExtraColumns
from denoise_batch.images import Polarity
from denoise_batch.images.layouts import output_column
from denoise_batch.inference.denoise_unit import Assignment, OnBadRow, UnitOptions, denoise_unit
from denoise_batch.inference.ledger import Failure, Receipt
from denoise_batch.models import fused_layers
from denoise_batch.models.fused_layers import FUSED_BFLOAT16
from denoise_batch.models.int8 import INT8, sums_exactly
from denoise_batch.models.network import DenoisingNetwork
from denoise_batch.precision import Precision

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Pixels, WriteImages

pytestmark = pytest.mark.usefixtures("footers_read_here")


def test_a_model_is_made_ready_without_what_compilers_need() -> None:
    """They take a worker's core longer to import than all else that the model needs."""
    code = (
        "import sys, numpy as np; from denoise_batch.bundle import SHIPPED_FOLDER, read_bundle\n"
        "from denoise_batch.denoiser import Denoiser\n"
        "Denoiser(read_bundle(SHIPPED_FOLDER), device='cpu')(np.zeros((3, 784), np.float32))\n"
        "print(sorted({'sympy', 'torch._dynamo', 'torch._inductor', 'scipy'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout == "[]\n"


FULL = torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the manual")


class Small(DenoisingNetwork):
    """Halves its images, and has no memory for more than `room` of them."""

    def __init__(self, room: int, error: RuntimeError = FULL) -> None:
        super().__init__()
        self.room, self.error = room, error
        self.seen: list[int] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen.append(len(images))
        if len(images) > self.room:
            raise self.error
        return images / 2


def small_denoiser(model_folder: Path, room: int, batch: int) -> tuple[Denoiser, Small]:
    denoiser = Denoiser(read_bundle(model_folder), device="cpu", threads=1, batch=batch)
    denoiser.model = small = Small(room)
    return denoiser, small


@pytest.mark.parametrize("polarity", [Polarity.LIGHT_ON_DARK, Polarity.DARK_ON_LIGHT])
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
@pytest.mark.parametrize("count", [0, 7, 30])
def test_a_column_in_several_passes(model_folder: Path, polarity: Polarity, dtype: str, count: int) -> None:
    denoiser, small = small_denoiser(model_folder, 8, 8)
    pixels = np.random.default_rng(0).integers(0, 256, (count, 784), np.uint8)
    made = denoiser.denoise(pixels, polarity, dtype).pixels
    ink = pixels / 255 if polarity is Polarity.LIGHT_ON_DARK else 1 - pixels / 255
    shown = ink / 2 if polarity is Polarity.LIGHT_ON_DARK else 1 - ink / 2
    assert made.dtype == np.dtype(dtype)
    assert made.shape == (count, 784)
    np.testing.assert_allclose(
        made, shown * 255 if dtype == "uint8" else shown, atol=0.51 if dtype == "uint8" else 1e-6
    )
    assert sum(small.seen) == max(1, count)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_a_pixel_that_is_not_a_number_is_refused(model_folder: Path, dtype: str) -> None:
    denoiser, _ = small_denoiser(model_folder, 8, 8)
    pixels = np.zeros((20, 784), np.float32)
    pixels[13, 5] = np.nan
    with pytest.raises(DenoiseBatchError, match="not a number"):
        denoiser.denoise(pixels, Polarity.LIGHT_ON_DARK, dtype)


def test_the_batch_is_halved_until_it_fits_and_stays_so(model_folder: Path) -> None:
    denoiser, small = small_denoiser(model_folder, 20, 128)
    noisy = np.random.default_rng(0).random((150, 784), np.float32)
    assert np.array_equal(denoiser(noisy), noisy / 2)
    assert small.seen == [128, 64, 32, *[16] * 9, 6]
    assert denoiser.batch == 16
    assert "; batch 16; " in denoiser.fingerprint
    small.seen.clear()
    assert np.array_equal(denoiser(noisy[:40]), noisy[:40] / 2)
    assert small.seen == [16, 16, 8]


@pytest.mark.parametrize(
    "said",
    [
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
        "Triton Error [CUDA]: out of memory",
    ],
)
def test_what_libraries_call_a_full_gpu_halves_the_batch_too(model_folder: Path, said: str) -> None:
    denoiser, _ = small_denoiser(model_folder, 20, 64)
    denoiser.model = Small(20, RuntimeError(said))
    noisy = np.ones((64, 784), np.float32)
    assert np.array_equal(denoiser(noisy), noisy / 2)
    assert denoiser.batch == 16
    denoiser.model = Small(0, RuntimeError("CUDA error: an illegal memory access was encountered"))
    with pytest.raises(RuntimeError, match="illegal"):
        denoiser(noisy)
    assert denoiser.batch == 16


def test_a_batch_that_ran_out_half_way_loses_and_doubles_no_image(model_folder: Path) -> None:
    denoiser, small = small_denoiser(model_folder, 64, 64)
    noisy = np.random.default_rng(1).random((300, 784), np.float32)

    class Shrinking(Small):
        """Others take the memory meanwhile."""

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            self.room = 64 if len(self.seen) < 2 else 10
            return super().forward(images)

    denoiser.model = small = Shrinking(64)
    assert np.array_equal(denoiser(noisy), noisy / 2)
    assert small.seen[:7] == [64, 64, 64, 32, 16, 8, 8]


def test_no_memory_for_one_image_is_an_error_that_says_so(model_folder: Path) -> None:
    denoiser, small = small_denoiser(model_folder, 0, 8)
    with pytest.raises(ResourceExhausted, match="GPU's memory") as error:
        denoiser(np.zeros((3, 784), np.float32))
    assert "\n" not in error.value.message
    assert error.value.hint
    assert small.seen == [3, 1]


def test_the_receipt_names_the_batch_that_was_used_in_the_end(
    tmp_path: Path, model_folder: Path, digits: tuple[Pixels, Pixels], write_images: WriteImages
) -> None:
    path = write_images(tmp_path / "in.parquet", digits[0])
    receipt = _unit(tmp_path, path, small_denoiser(model_folder, 20, 256)[0])
    assert isinstance(receipt, Receipt)
    assert "; batch 16; " in receipt.fingerprint
    table = pq.read_table(tmp_path / receipt.file)
    assert table.num_rows == pq.read_metadata(path).num_rows
    # And where not even one fits, the job stops with that error rather than trying every unit three times.
    failure = _unit(tmp_path, path, small_denoiser(model_folder, 0, 256)[0], "other.parquet")
    assert isinstance(failure, Failure)
    assert (failure.final, failure.kind) == (True, "ResourceExhausted")
    assert "GPU's memory" in failure.reason


def _unit(folder: Path, path: Path, denoiser: Denoiser, name: str = "unit.parquet") -> Receipt | Failure:
    from denoise_batch.inference.plan import make_plan
    from denoise_batch.storage.listing import list_inputs

    plan = make_plan(list_inputs([str(path)]).files, None, Polarity.LIGHT_ON_DARK, "denoised")
    options = UnitOptions(
        str(folder), plan.column, output_column(plan.column, "denoised"), plan.polarity, OnBadRow.NULL, "none"
    )
    assignment = Assignment(plan.unit(0), plan.files[0], 1, name)
    return denoise_unit(assignment, options, denoiser.denoise, lambda: denoiser.fingerprint)


@pytest.mark.skipif(not INT8, reason="this PyTorch has no such products")
def test_precision_is_asked_of_the_device_and_said_in_the_fingerprint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    network = models.build("bounds-unet", {"width": 8, "deep": 16, "bottleneck": 16})
    noisy = np.random.default_rng(0).random((40, 784), np.float32)
    network.prepare_int8(torch.from_numpy(noisy).view(-1, 1, 28, 28))
    save_bundle(tmp_path / "model", network, BundleCard("bounds-unet", network.parameters_json))
    bundle = read_bundle(tmp_path / "model")
    exact = Denoiser(bundle, device="cpu", threads=1, precision=Precision.FLOAT32)(noisy)
    for units in ({}, {"avx2"}, {"avx512_bf16"}, {"avx2", "avx512_bf16"}, {"avx2", "amx_int8", "amx_bf16"}):
        if not FUSED_BFLOAT16 and any(name.endswith("bf16") for name in units):
            continue  # nothing here computes in it
        capabilities = dict.fromkeys(units, True)
        monkeypatch.setattr(
            torch.cpu, "get_capabilities", lambda capabilities=capabilities: capabilities, raising=False
        )
        for precision in Precision:
            denoiser = Denoiser(bundle, device="cpu", threads=1, precision=precision)
            made, how = denoiser(noisy), denoiser.fingerprint.split("; ")[1].split(", ")
            int8 = precision is Precision.AUTO and "avx2" in units
            bfloat16 = precision is not Precision.FLOAT32 and any(name.endswith("bf16") for name in units)
            assert how == [*["bfloat16"] * bfloat16, "float32", *["int8"] * int8]
            largest = np.abs(made - exact).max()
            assert 0.0 < largest < 0.03 if int8 or bfloat16 else largest == 0.0


@pytest.mark.parametrize(
    "shape", [(5, 28, 28, 3), (5, 28, 28, 1), (5, 14, 56), (2, 1568), (4, 392), (784,), (28, 28), (0,), (0, 5), ()]
)
def test_arrays_of_other_shapes_are_refused(model_folder: Path, shape: tuple[int, ...]) -> None:
    denoiser, small = small_denoiser(model_folder, 8, 8)
    for call in (denoiser, lambda noisy: denoiser.denoise(noisy, Polarity.LIGHT_ON_DARK, "float32")):
        with pytest.raises(ValueError, match=r"images are \(n, 784\) floats or uint8, not \("):
            call(np.zeros(shape, np.float32))
    assert small.seen == []
    for rest in ((784,), (28, 28), (1, 28, 28)):
        for count in (0, 3):
            assert denoiser(np.zeros((count, *rest), np.float32)).shape == (count, 784)


@pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")  # NumPy's, of matrices
def test_what_is_no_plain_array_is_refused(model_folder: Path) -> None:
    denoiser, small = small_denoiser(model_folder, 8, 8)
    noisy = np.zeros((3, 784), np.float32)
    others = (noisy.tolist(), torch.from_numpy(noisy), np.asmatrix(noisy), pa.array([1.0]), np.float32(0), None)
    for other in others:
        with pytest.raises(ValueError, match=f"images are a NumPy array, .* not {type(other).__name__}$"):
            denoiser(other)  # type: ignore[arg-type]
    for mask in (False, True):  # one that masks nothing may in the next batch
        with pytest.raises(ValueError, match="a masked array: fill in"):
            denoiser(np.ma.masked_array(noisy, mask=mask))
    assert small.seen == []


def test_hints_allow_what_is_taken() -> None:
    for method in (Denoiser.__call__, Denoiser.run):
        taken = get_args(get_type_hints(method)["noisy"])
        assert {get_args(get_args(one)[1])[0] for one in taken} == {np.uint8, np.floating[Any]}
    assert get_args(get_args(get_type_hints(Denoiser.__call__)["return"])[1]) == (np.float32,)


@pytest.mark.parametrize("name", ["bounds-unet", "seed"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_image_that_is_not_finite_comes_back_as_nan_and_changes_no_other(name: str, value: float) -> None:
    denoiser = Denoiser(read_bundle(SHIPPED_FOLDER.with_name(name)), device="cpu", threads=1)
    noisy = np.random.default_rng(0).uniform(-0.5, 1.5, (5, 784)).astype(np.float32)
    expected = denoiser(noisy)
    noisy[3, 5] = value
    said = denoiser.run(noisy, ExtraColumns(quality=name == "bounds-unet", code=name == "seed"))
    made = said.pixels
    for array in (made, *(one for one in (said.psnr, said.noise_level, said.code) if one is not None)):
        assert np.isnan(array[3]).all()
        assert np.isfinite(np.delete(array, 3, axis=0)).all()
    assert np.array_equal(np.delete(made, 3, axis=0), np.delete(expected, 3, axis=0))
    assert np.isnan(denoiser(noisy[3:4])).all()
    with pytest.raises(ValueError, match=r"values up to 382\.\d+: floats are 0"):  # the others are looked at still
        denoiser(noisy * np.float32(255))


def test_numbers_that_are_no_pixels_are_refused(model_folder: Path) -> None:
    denoiser, _ = small_denoiser(model_folder, 8, 8)
    pixels = np.random.default_rng(0).integers(0, 256, (5, 784), np.uint8)
    made = denoiser(pixels)
    for type_ in (np.int16, np.int64, np.bool_):
        with pytest.raises(ValueError, match="floats or uint8, not"):
            denoiser(pixels.astype(type_))
    with pytest.raises(ValueError, match=r"values up to 255: floats are 0\.\.1"):
        denoiser(pixels.astype(np.float32))
    for float_ in (np.float64, ">f4"):
        assert np.array_equal(denoiser(pixels.astype(float_) / 255), denoiser(pixels.astype(np.float32) / 255))
    np.testing.assert_allclose(made, pixels / 255 / 2, atol=1e-6)
    with pytest.raises(ValueError, match="a batch of 0"):
        small_denoiser(model_folder, 8, 0)


@pytest.mark.parametrize("name", ["bounds-unet", "seed"])
@pytest.mark.parametrize("precision", [Precision.AUTO, Precision.FLOAT32])
def test_what_a_caller_has_set_for_its_own_arithmetic_changes_nothing(name: str, precision: Precision) -> None:
    noisy = np.random.default_rng(0).uniform(-0.5, 1.5, (4, 784)).astype(np.float32)
    bundle = read_bundle(SHIPPED_FOLDER.parent / name)
    expected = Denoiser(bundle, device="cpu", precision=precision)(noisy)
    try:
        torch.set_default_dtype(torch.float64)
        sums_exactly.cache_clear()
        assert np.array_equal(Denoiser(bundle, device="cpu", precision=precision)(noisy), expected)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert np.array_equal(Denoiser(bundle, device="cpu", precision=precision)(noisy), expected)


@pytest.mark.parametrize("precision", list(Precision))
def test_a_default_device_changes_nothing(precision: Precision) -> None:
    """Nor does it stay in what a first pass keeps for all others: that is made in a process of its own."""
    code = (
        "import sys, numpy as np, torch; from denoise_batch.bundle import SHIPPED_FOLDER, read_bundle\n"
        "from denoise_batch.denoiser import Denoiser; from denoise_batch.extra_columns import ExtraColumns\n"
        "line = np.zeros((3, 28, 28), np.float32); line[:, 5:23, 11:16] = (0.1, 0.6, 1.0, 0.6, 0.1)\n"
        "def made():\n"
        "    denoiser = Denoiser(read_bundle(SHIPPED_FOLDER), device='cpu', threads=1, precision=sys.argv[1])\n"
        "    return denoiser.run(line, ExtraColumns(quality=True))\n"
        "torch.set_default_device('meta'); first = made()\n"
        "with torch.device('meta'): second = made()\n"
        "torch.set_default_device(None); expected = made()\n"
        "for one in (first, second):\n"
        "    assert np.array_equal(one.pixels, expected.pixels) and np.array_equal(one.psnr, expected.psnr)"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code, precision.value], check=True, timeout=60)


@pytest.mark.parametrize("name", ["bounds-unet", "seed"])
def test_a_callers_random_numbers_go_on_as_if_there_were_no_model(name: str) -> None:
    sums_exactly.cache_clear()
    before = torch.get_rng_state()
    Denoiser(read_bundle(SHIPPED_FOLDER.with_name(name)), device="cpu")(np.zeros((2, 784), np.float32))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_gpu_that_cannot_be_used_is_no_bug_of_ours(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that is too old for this PyTorch, or that another process has for itself."""

    def fails(*_: Any) -> None:
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nCUDA kernel errors")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", fails)
    with pytest.raises(FlagError, match="the GPU cannot be used: CUDA error: no kernel image") as caught:
        Denoiser(read_bundle(model_folder))
    assert "--device cpu" in caught.value.hint


@pytest.mark.parametrize("precision", list(Precision))
def test_convolutions_in_float32_keep_its_bits_on_every_gpu(
    monkeypatch: pytest.MonkeyPatch, precision: Precision
) -> None:
    """The seed's network has no other precision: TensorFloat-32 would round its products to 10 bits."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    lower_precision(read_bundle(SHIPPED_FOLDER.parent / "seed").load(), precision, torch.device("cuda"))
    assert not torch.backends.cudnn.allow_tf32


def test_one_denoiser_at_a_time_is_on_the_gpu(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA records one graph at a time in a process."""
    inside: list[int] = []
    most: list[int] = []

    def compute(_: Denoiser, *__: Any) -> Any:
        def answer(pixels: Any) -> dict[str, Any]:
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.05)
            inside.pop()
            return {"pixels": pixels.astype(np.float32), "finite": np.ones(len(pixels), np.bool_)}

        return answer

    monkeypatch.setattr(Denoiser, "_pass", compute)
    both = [Denoiser(read_bundle(model_folder), device="cpu", threads=1) for _ in range(2)]
    for denoiser in both:
        denoiser.device = torch.device("cuda", 0)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda denoiser: denoiser(np.zeros((3, 784), np.uint8)), both * 2))
    assert most == [1, 1, 1, 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_cudnn_fuses_in_every_precision_of_a_gpu(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """PyTorch's own `cudnn.is_acceptable` knows no bfloat16, the one that a GPU's pass is in."""
    monkeypatch.setattr(fused_layers, "FUSED_CUDNN", True)
    monkeypatch.setattr(torch._C, "_has_cudnn", True)
    assert torch.backends.cudnn.is_available()
    image = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0), dtype=dtype)
    layer = SimpleNamespace(weight=SimpleNamespace(dtype=dtype))
    with torch.inference_mode():
        assert fused_layers._by_cudnn(image, layer)
    assert not fused_layers._by_cudnn(image, layer)  # what a gradient is to go back through


@pytest.mark.parametrize("device", ["cuda:0", "gpu", "CPU", ""])
def test_another_device_is_not_taken_for_a_cpu(device: str) -> None:
    with pytest.raises(ValueError, match=f"device '{device}': one of auto, cpu, cuda"):
        Denoiser(read_bundle(SHIPPED_FOLDER), device=device)


def test_a_precision_may_be_named() -> None:
    named = Denoiser(read_bundle(SHIPPED_FOLDER), device="cpu", precision="float32")  # type: ignore[arg-type]
    assert not named.model.computes_in_integers
    with pytest.raises(ValueError, match="int4"):
        Denoiser(read_bundle(SHIPPED_FOLDER), device="cpu", precision="int4")  # type: ignore[arg-type]


def test_what_a_model_does_not_say_is_refused_by_name() -> None:
    noisy = np.zeros((2, 784), np.float32)
    with pytest.raises(FlagError, match="--code: the model"):
        Denoiser(read_bundle(SHIPPED_FOLDER), device="cpu").run(noisy, ExtraColumns(code=True))
    with pytest.raises(FlagError, match="--quality: the model"):
        Denoiser(read_bundle(SHIPPED_FOLDER.with_name("seed")), device="cpu").run(
            noisy, ExtraColumns(code=True, quality=True)
        )
