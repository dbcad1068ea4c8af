"""The GPU's pass without a GPU: which part goes where, and how pixels are turned, with streams that do nothing.

What only a GPU can show is in test_cuda.py.
"""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from denoise_batch import denoiser
from denoise_batch.bundle import SHIPPED_FOLDER, read_bundle
from denoise_batch.denoiser import Denoiser
from denoise_batch.digits.drawn_digits import draw_digits
from denoise_batch.errors import DenoiseBatchError, ResourceExhausted
from denoise_batch.extra_columns import NO_EXTRAS, ExtraColumns
from denoise_batch.forward import in_float32
from denoise_batch.images import Polarity
from denoise_batch.models import cuda_pass
from denoise_batch.models.cuda_pass import FINITE, CudaPass
from denoise_batch.models.network import DenoisingNetwork
from denoise_batch.noise import NoiseRecipe
from denoise_batch.precision import Precision

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

CPU = torch.device("cpu")


class Stream:
    """Stands in for a stream and for an event: all that is queued is done at once."""

    def wait_event(self, _: Stream) -> None: ...

    def record(self) -> None: ...

    def synchronize(self) -> None: ...


@pytest.fixture(autouse=True)
def _without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_pass, "_stream", Stream)
    monkeypatch.setattr(cuda_pass, "_event", lambda **_: Stream())
    monkeypatch.setattr(cuda_pass, "_pinned", torch.empty_like)
    for name in ("stream", "device"):
        monkeypatch.setattr(torch.cuda, name, lambda _: contextlib.nullcontext())
    for name in ("synchronize", "graph_pool_handle", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)

    def recorded(self: CudaPass, size: int) -> Any:
        return SimpleNamespace(replay=lambda: self._fill(size))

    monkeypatch.setattr(CudaPass, "_graph", recorded)


def three_quarters(images: torch.Tensor) -> dict[str, torch.Tensor]:
    pixels = images.reshape(len(images), 784) * 0.75
    return {"pixels": pixels, "psnr": pixels.mean(dim=1), "code": pixels[:, :5]}


def of_type(dtype: str, rows: int) -> NDArray[Any]:
    pixels = np.random.default_rng(rows).integers(0, 256, (rows, 784), np.uint8)
    return pixels if dtype == "uint8" else (pixels / np.float32(170) - np.float32(0.2)).astype(np.float32)


@pytest.mark.parametrize("taken", ["uint8", "float32"])
@pytest.mark.parametrize("given", ["uint8", "float32"])
@pytest.mark.parametrize("polarity", [Polarity.LIGHT_ON_DARK, Polarity.DARK_ON_LIGHT])
@pytest.mark.parametrize("rows", [0, 1, 128, 700])
def test_pixels_are_turned_as_a_cpu_turns_them(taken: str, given: str, polarity: Polarity, rows: int) -> None:
    run = CudaPass(
        three_quarters,
        CPU,
        256,
        taken=getattr(torch, taken),
        given=getattr(torch, given),
        dark_on_light=polarity is Polarity.DARK_ON_LIGHT,
    )
    pixels = of_type(taken, rows)
    pixels.setflags(write=False)
    expected = in_float32(lambda noisy: noisy * np.float32(0.75))(pixels, polarity, given).pixels
    for _ in range(2):  # what is left in the buffers is nobody's
        made = run(pixels)
        assert set(made) == {"pixels", "psnr", "code", FINITE}
        assert made["pixels"].dtype == expected.dtype
        assert np.array_equal(made["pixels"], expected)
        assert (made["psnr"].shape, made["code"].shape) == ((rows,), (rows, 5))
        assert made[FINITE].all()


def test_the_images_that_are_not_numbers_are_told_though_they_come_back_as_uint8() -> None:
    def broken(images: torch.Tensor) -> dict[str, torch.Tensor]:
        pixels = images.reshape(len(images), 784)
        return {"pixels": torch.where(pixels == 7.0, torch.nan, pixels)}

    run = CudaPass(broken, CPU, 64, taken=torch.float32, given=torch.uint8, dark_on_light=False)
    pixels = np.zeros((150, 784), np.float32)
    pixels[[3, 149], 5] = 7.0
    assert np.flatnonzero(~run(pixels)[FINITE]).tolist() == [3, 149]


def test_rows_left_over_take_the_smallest_graph_that_holds_them() -> None:
    run = CudaPass(three_quarters, CPU, 4096, taken=torch.uint8, given=torch.uint8, dark_on_light=False)
    assert [run._size(rows) for rows in (4096, 2049, 2048, 100, 64, 1)] == [4096, 4096, 2048, 128, 64, 64]
    odd = CudaPass(three_quarters, CPU, 25, taken=torch.uint8, given=torch.uint8, dark_on_light=False)
    assert [odd._size(rows) for rows in (25, 1)] == [25, 25]


class Halving(DenoisingNetwork):
    """Halves its images, and has no memory for more than `room` of them."""

    room = 20

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if len(images) > self.room:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return images / 2


@pytest.fixture
def on_gpu(model_folder: Path) -> Denoiser:
    made = Denoiser(read_bundle(model_folder), device="cpu", threads=1, batch=128)
    made.model = Halving()
    made.device = SimpleNamespace(type="cuda")  # type: ignore[assignment]
    return made


def test_a_denoiser_halves_its_batch_and_makes_new_buffers(on_gpu: Denoiser, monkeypatch: pytest.MonkeyPatch) -> None:
    def on_cpu(compute: Any, _: Any, batch: int, **form: Any) -> CudaPass:
        return CudaPass(compute, CPU, batch, **form)

    monkeypatch.setattr(denoiser, "CudaPass", on_cpu)
    pixels = of_type("uint8", 150)
    on_gpu.prepare("uint8", Polarity.DARK_ON_LIGHT, "uint8")
    assert on_gpu.batch == 16
    made = on_gpu.denoise(pixels, Polarity.DARK_ON_LIGHT, "uint8")
    expected = in_float32(lambda noisy: noisy / 2)(pixels, Polarity.DARK_ON_LIGHT, "uint8")
    assert np.array_equal(made.pixels, expected.pixels)
    assert on_gpu.batch == 16
    assert np.array_equal(on_gpu(of_type("float32", 40)), of_type("float32", 40) / 2)
    assert [run.batch for run in on_gpu._passes.values()] == [16, 16]
    on_gpu._passes.clear()
    on_gpu.model.room = 0  # type: ignore[assignment]
    with pytest.raises(ResourceExhausted, match="GPU's memory"):
        on_gpu.denoise(pixels, Polarity.DARK_ON_LIGHT, "uint8")
    assert on_gpu.batch == 1


@pytest.mark.parametrize("extras", [NO_EXTRAS, ExtraColumns(quality=True)])
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_images_with_little_noise_are_fitted_on_a_gpu_as_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch, extras: ExtraColumns, dtype: str
) -> None:
    """Beside others, of which the graph says that they need not be looked at, in more passes than one."""
    images, cpu = denoiser._images, torch.device("cpu")
    monkeypatch.setattr(denoiser, "CudaPass", lambda compute, _, batch, **form: CudaPass(compute, CPU, batch, **form))
    monkeypatch.setattr(denoiser, "_images", lambda pixels, polarity, _: images(pixels, polarity, cpu))
    bundle = read_bundle(SHIPPED_FOLDER)
    on_cpu, on_gpu = (Denoiser(bundle, device="cpu", batch=64, precision=Precision.FLOAT32) for _ in range(2))
    on_gpu.device = SimpleNamespace(type="cuda")  # type: ignore[assignment]
    clean = torch.from_numpy(draw_digits(150, seed=2)[0]).float() / 255
    noisy = NoiseRecipe((0.8, 0.8), (0.0, 0.0)).apply(clean, torch.Generator().manual_seed(0))[0]
    noisy[1::3] += 0.5 * torch.randn(noisy[1::3].shape, generator=torch.Generator().manual_seed(0))
    pixels = 1.0 - noisy.reshape(-1, 784).numpy()
    if dtype == "uint8":
        pixels = np.rint(255 * pixels.clip(0, 1)).astype(np.uint8)
    expected, made = (model.denoise(pixels, Polarity.DARK_ON_LIGHT, dtype, extras) for model in (on_cpu, on_gpu))
    np.testing.assert_allclose(
        made.pixels.astype(float), expected.pixels.astype(float), atol=1.0 if dtype == "uint8" else 1e-3
    )
    alone = Denoiser(bundle, device="cpu", precision=Precision.FLOAT32, fit=False)
    changed = (made.pixels != alone.denoise(pixels, Polarity.DARK_ON_LIGHT, dtype).pixels).any(axis=1)
    assert changed[::3].mean() > 0.9
    if extras.quality:
        assert made.psnr is not None
        assert expected.psnr is not None
        np.testing.assert_allclose(made.psnr, expected.psnr, atol=0.05)
    else:
        assert made.psnr is None


def test_a_model_that_gives_no_number_is_an_error_on_a_gpu_too(
    on_gpu: Denoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(denoiser, "CudaPass", lambda compute, _, batch, **form: CudaPass(compute, CPU, batch, **form))
    on_gpu.batch = 16
    noisy = np.zeros((20, 784), np.float32)
    noisy[17] = np.nan
    with pytest.raises(DenoiseBatchError, match="a pixel that is not a number"):
        on_gpu.denoise(noisy, Polarity.LIGHT_ON_DARK, "uint8")
