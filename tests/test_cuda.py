"""On a GPU: graphs give what the model gives without them, whatever comes in, and memory that runs out is survived.

    pytest -m gpu tests/test_cuda.py

Skipped where there is none; test_cuda_pass.py shows there what needs no GPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from test_cuda_pass import of_type, three_quarters

from denoise_batch.bundle import SHIPPED_FOLDER, read_bundle
from denoise_batch.denoiser import Denoiser, forward_pass
from denoise_batch.digits import draw_digits
from denoise_batch.errors import DenoiseBatchError
from denoise_batch.evaluation.metrics import mse, psnr_from_mse
from denoise_batch.extra_columns import NO_EXTRAS, Denoised, ExtraColumns
from denoise_batch.forward import in_float32
from denoise_batch.images import Polarity, decode, output_column
from denoise_batch.inference.denoise_unit import Assignment, OnBadRow, UnitOptions, denoise_unit
from denoise_batch.inference.ledger import Receipt
from denoise_batch.inference.plan import Unit, make_plan
from denoise_batch.models.cuda_pass import FINITE, CudaPass
from denoise_batch.models.input_gate import WHOLE_FROM
from denoise_batch.models.noise_signs import range_ends
from denoise_batch.noise import NoiseRecipe
from denoise_batch.precision import Precision
from denoise_batch.storage.listing import list_inputs

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import WriteImages
    from numpy.typing import NDArray

pytestmark = pytest.mark.gpu

QUALITY, CODE = ExtraColumns(quality=True), ExtraColumns(code=True)
POLARITIES = (Polarity.LIGHT_ON_DARK, Polarity.DARK_ON_LIGHT)
SEED_FOLDER, FEW_FOLDER = SHIPPED_FOLDER.parent / "seed", SHIPPED_FOLDER.parent / "few-levels"


def denoiser(
    folder: Path = SHIPPED_FOLDER, precision: Precision = Precision.FLOAT32, *, fit: bool = False, **settings: Any
) -> Denoiser:
    """The network's own pass, unless it is to `fit`."""
    return Denoiser(read_bundle(folder), device="cuda", precision=precision, fit=fit, **settings)


@pytest.fixture(scope="module")
def noisy() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """5,000 drawn digits with the seed's noise, and clean: (n, 784) float32."""
    clean = torch.from_numpy(draw_digits(5000, seed=3)[0]).float() / 255
    made = NoiseRecipe().apply(clean, torch.Generator().manual_seed(0))[0]
    return made.reshape(-1, 784).numpy(), clean.reshape(-1, 784).numpy()


def shown(noisy: NDArray[np.float32], polarity: Polarity, dtype: str) -> NDArray[Any]:
    """As a column has them."""
    pixels = noisy if polarity is Polarity.LIGHT_ON_DARK else 1 - noisy
    return np.rint(pixels.clip(0, 1) * 255).astype(np.uint8) if dtype == "uint8" else pixels


def eager(model: Denoiser, pixels: NDArray[Any], polarity: Polarity, dtype: str, extras: ExtraColumns) -> Denoised:
    """The same model on the same device, without a graph; pixels are turned on the CPU."""

    def forward(noisy: NDArray[np.float32]) -> Denoised:
        with torch.inference_mode():
            made = forward_pass(model.model, extras, torch.from_numpy(noisy.copy()).view(-1, 1, 28, 28).cuda())
            return Denoised(**{name: value.cpu().numpy() for name, value in made.items()})

    return in_float32(forward)(pixels, polarity, dtype)


def assert_same(made: Denoised, expected: Denoised) -> None:
    """Up to the last bits, which depend on the size of the batch."""
    assert made.pixels.dtype == expected.pixels.dtype
    assert made.pixels.shape == expected.pixels.shape
    off = np.abs(made.pixels.astype(np.float32) - expected.pixels.astype(np.float32))
    if made.pixels.dtype == np.uint8:
        assert off.max() <= 1
        assert (off > 0).mean() < 1e-3
    else:
        assert off.max(initial=0.0) < 1e-3
    for name, most in (("psnr", 0.02), ("noise_level", 1e-3), ("code", 1e-3)):
        one, other = getattr(made, name), getattr(expected, name)
        assert (one is None) == (other is None), name
        if one is not None:
            assert one.shape == other.shape
            assert np.abs(one - other).max(initial=0.0) < most, name


def assert_recorded(model: Denoiser) -> None:
    assert model._passes
    for run in model._passes.values():
        assert run._graphs
        assert not run.eager


@pytest.mark.parametrize("taken", ["uint8", "float32"])
@pytest.mark.parametrize("given", ["uint8", "float32"])
@pytest.mark.parametrize("polarity", POLARITIES)
def test_pixels_are_turned_to_the_same_bits_as_on_a_cpu(taken: str, given: str, polarity: Polarity) -> None:
    run = CudaPass(
        three_quarters,
        torch.device("cuda"),
        256,
        taken=getattr(torch, taken),
        given=getattr(torch, given),
        dark_on_light=polarity is Polarity.DARK_ON_LIGHT,
    )
    for rows in (0, 1, 100, 256, 257, 3000):
        pixels = of_type(taken, rows)
        made = run(pixels)
        expected = in_float32(lambda noisy: noisy * np.float32(0.75))(pixels, polarity, given)
        assert np.array_equal(made["pixels"], expected.pixels)
        assert made[FINITE].all()
    assert sorted(run._graphs) == [64, 128, 256]


@pytest.mark.parametrize("taken", ["uint8", "float32"])
@pytest.mark.parametrize("given", ["uint8", "float32"])
@pytest.mark.parametrize("polarity", POLARITIES)
@pytest.mark.parametrize(
    ("folder", "extras"),
    [(SHIPPED_FOLDER, NO_EXTRAS), (SHIPPED_FOLDER, QUALITY), (SEED_FOLDER, NO_EXTRAS), (SEED_FOLDER, CODE)],
    ids=["shipped", "shipped, quality", "seed", "seed, code"],
)
def test_graphs_give_what_the_model_gives(
    noisy: tuple[Any, Any], folder: Path, extras: ExtraColumns, taken: str, given: str, polarity: Polarity
) -> None:
    model = denoiser(folder, batch=2048)
    pixels = shown(noisy[0], polarity, taken).copy()
    pixels.setflags(write=False)
    expected = eager(model, pixels, polarity, given, extras)
    for _ in range(2):
        assert_same(model.denoise(pixels, polarity, given, extras), expected)
    assert_recorded(model)


def test_any_number_of_rows_in_any_order_of_sizes(noisy: tuple[Any, Any]) -> None:
    model = denoiser(batch=1000)
    expected = eager(model, noisy[0], Polarity.LIGHT_ON_DARK, "float32", QUALITY)
    for rows in (1, 4097, 0, 63, 1000, 1001, 250, 2000, 5000, 7):
        made = model.run(noisy[0][:rows], QUALITY)
        assert expected.psnr is not None
        assert expected.noise_level is not None
        assert_same(made, Denoised(expected.pixels[:rows], expected.psnr[:rows], expected.noise_level[:rows]))
    # Forms take turns.
    for dtype in ("uint8", "float32", "uint8"):
        pixels = shown(noisy[0], Polarity.DARK_ON_LIGHT, dtype)
        expected = eager(model, pixels, Polarity.DARK_ON_LIGHT, "uint8", NO_EXTRAS)
        assert_same(model.denoise(pixels, Polarity.DARK_ON_LIGHT, "uint8"), expected)
    assert_recorded(model)


def test_the_batch_is_halved_when_memory_runs_out(noisy: tuple[Any, Any]) -> None:
    model = denoiser(batch=65_536)
    pixels = np.resize(shown(noisy[0], Polarity.LIGHT_ON_DARK, "uint8"), (65_536, 784))
    expected = eager(model, pixels[:5000], Polarity.LIGHT_ON_DARK, "uint8", QUALITY)
    torch.cuda.empty_cache()
    room = torch.cuda.memory_reserved() + (1 << 30)
    torch.cuda.set_per_process_memory_fraction(room / torch.cuda.get_device_properties(0).total_memory)
    try:
        made = model.denoise(pixels, Polarity.LIGHT_ON_DARK, "uint8", QUALITY)
        batch = model.batch
        assert 64 <= batch <= 32_768
        assert_same(model.denoise(pixels[:5000], Polarity.LIGHT_ON_DARK, "uint8", QUALITY), expected)
        batch, before = model.batch, batch
        assert 64 <= batch <= before  # a graph of another size may need memory that is no longer there
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert made.psnr is not None
    assert made.noise_level is not None
    assert_same(Denoised(made.pixels[:5000], made.psnr[:5000], made.noise_level[:5000]), expected)
    assert np.abs(made.pixels[60_000:].astype(int) - made.pixels[:5536].astype(int)).max() <= 1  # they repeat
    assert f"; batch {batch}; " in model.fingerprint


def test_a_pixel_that_is_not_a_number_is_an_error_though_the_column_is_uint8(noisy: tuple[Any, Any]) -> None:
    model, broken = denoiser(batch=1024), noisy[0].copy()
    broken[4999, 300] = np.nan
    with pytest.raises(DenoiseBatchError, match="a pixel that is not a number"):
        model.denoise(broken, Polarity.LIGHT_ON_DARK, "uint8")
    assert model.denoise(noisy[0], Polarity.LIGHT_ON_DARK, "uint8").pixels.shape == (5000, 784)


def test_bfloat16_costs_no_quality(noisy: tuple[Any, Any]) -> None:
    exact, quick = denoiser(), denoiser(precision=Precision.AUTO)
    if "bfloat16" not in quick.fingerprint:
        pytest.skip("this GPU has no units for bfloat16")
    levels = [psnr_from_mse(mse(noisy[1], model(noisy[0])).mean()) for model in (exact, quick)]
    assert abs(levels[0] - levels[1]) < 0.02
    assert_recorded(quick)


def test_the_pass_of_our_own_kernels_gives_what_the_layers_give(noisy: tuple[Any, Any]) -> None:
    exact, quick = denoiser().model, denoiser(precision=Precision.BFLOAT16).model
    if quick._on_gpu is None:
        pytest.skip("no Triton, or no bfloat16, here")
    images = torch.from_numpy(noisy[0][:1000]).view(-1, 1, 28, 28).cuda()
    images[1, 0, 3, 5] = np.nan
    images[2, 0, 27, 27] = np.inf
    images[3] = 0.0
    with torch.inference_mode():
        (_, ours, quality, _), (_, theirs, expected, _) = (model.outputs(images) for model in (quick, exact))
        assert ours[1].isnan().all()
        assert ours[2].isnan().all()
        ours, theirs = (clean[3:].reshape(-1, 784) for clean in (ours, theirs))
        assert float((ours - theirs).square().mean()) < 10**-4.8
        assert float((quality - expected)[3:, 0].abs().mean()) < 0.1
        assert float((quality - expected)[3:, 1].abs().mean()) < 0.01
        assert torch.equal(quick(images[3:]).reshape(-1, 784), ours)


def test_kernels_join_what_came_in_with_what_was_made_as_the_gate_does() -> None:
    """Of clean, faint and struck images, heavy noise, and one that is no number."""
    quick = denoiser(precision=Precision.BFLOAT16).model
    if quick._on_gpu is None:
        pytest.skip("no Triton, or no bfloat16, here")
    clean = torch.from_numpy(draw_digits(400, seed=4)[0]).float() / 255
    noisy = clean + torch.linspace(0.0, 0.4, 400)[:, None, None] * (2 * torch.rand(clean.shape) - 1)
    noisy[:50] = clean[:50]
    noisy[50, 14, 14], noisy[51, 2, 2] = torch.nan, 1.0
    noisy = noisy[:, None].cuda()
    with torch.inference_mode():
        made = torch.sigmoid(quick.logits(noisy).float())
        ends = range_ends(noisy)
        ours, trust = quick.gate(noisy, made.clone(), ends, quick._kernels)
        theirs, expected = quick.gate(noisy, made.clone(), ends)
    torch.testing.assert_close(trust, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(ours, theirs, rtol=0.0, atol=1e-3, equal_nan=True)
    whole = trust >= WHOLE_FROM
    assert whole[:50].float().mean() > 0.5
    assert torch.equal(ours[whole], noisy[whole].clamp(0.0, 1.0))
    assert (trust == 0.0).any()
    assert ours[50].isnan().all()


@pytest.mark.parametrize("folder", [SHIPPED_FOLDER, FEW_FOLDER, SEED_FOLDER], ids=lambda folder: folder.name)
def test_models_that_ship_give_what_they_give_on_a_cpu(noisy: tuple[Any, Any], folder: Path) -> None:
    on_cpu = Denoiser(read_bundle(folder), device="cpu", precision=Precision.FLOAT32, fit=False)
    pixels = shown(noisy[0][:1000], Polarity.LIGHT_ON_DARK, "uint8")
    made, expected = (
        model.denoise(pixels, Polarity.LIGHT_ON_DARK, "uint8").pixels.astype(int)
        for model in (denoiser(folder), on_cpu)
    )
    assert np.abs(made - expected).max() <= 2
    assert (made != expected).mean() < 0.01


def test_images_with_little_noise_are_fitted_as_on_a_cpu() -> None:
    """But for few that lie at a limit, since the network's images differ in their last bits."""
    clean = torch.from_numpy(draw_digits(3000, seed=2)[0]).float() / 255
    noisy = NoiseRecipe((0.3, 2.0), (0.0, 0.3), clipped=0.5).apply(clean, torch.Generator().manual_seed(0))[0]
    pixels = noisy.reshape(-1, 784).numpy()
    bundle, quality = read_bundle(SHIPPED_FOLDER), ExtraColumns(quality=True)
    on_gpu = denoiser(fit=True).run(pixels, quality)
    on_cpu = Denoiser(bundle, device="cpu", precision=Precision.FLOAT32).run(pixels, quality)
    alone = denoiser()(pixels)
    apart = np.abs(on_gpu.pixels - on_cpu.pixels).max(axis=1)
    assert (apart < 2 / 255).mean() > 0.98
    assert (on_gpu.pixels != alone).any(axis=1).mean() > 0.2
    assert on_gpu.psnr is not None
    assert on_cpu.psnr is not None
    assert np.abs(on_gpu.psnr - on_cpu.psnr)[apart < 2 / 255].max() < 0.5


@pytest.mark.usefixtures("footers_read_here")
def test_a_unit_on_a_gpu(tmp_path: Path, write_images: WriteImages) -> None:
    images = np.resize(draw_digits(2000, seed=1)[0], (20_000, 28, 28))
    bad = np.zeros(len(images), np.bool_)
    bad[[0, 12_345]] = True
    path = write_images(tmp_path / "in.parquet", images, bad=bad, row_group_size=6000)
    model = denoiser(precision=Precision.AUTO)
    plan = make_plan(list_inputs([str(path)]).files, None, Polarity.LIGHT_ON_DARK, "denoised")
    column = output_column(plan.column, "denoised")
    options = UnitOptions(str(tmp_path), plan.column, column, plan.polarity, OnBadRow.NULL, "zstd", QUALITY)
    whole = Unit(0, 0, 0, 3, 0, len(images), 0)

    def forward(pixels: Any, polarity: Polarity, dtype: str) -> Denoised:
        return model.denoise(pixels, polarity, dtype, QUALITY)

    receipt = denoise_unit(Assignment(whole, plan.files[0], 1, "out.parquet"), options, forward)
    assert isinstance(receipt, Receipt), receipt
    assert (receipt.rows_out, receipt.bad) == (len(images), {"null": 2})
    out = pq.read_table(tmp_path / "out.parquet")
    made = decode(out["denoised"], column)
    assert np.flatnonzero(made.bad).tolist() == [0, 12_345]
    assert out["denoised_psnr"].null_count == out["denoised_noise_level"].null_count == 2
    again = forward(images.reshape(-1, 784), Polarity.LIGHT_ON_DARK, "uint8").pixels
    # In bfloat16 the last bits are coarse, and they depend on the size of the batch.
    assert np.abs(made.pixels.astype(int) - again.astype(int))[made.bad == 0].mean() < 0.2
    assert_recorded(model)


def test_a_model_that_waits_for_the_device_runs_without_a_graph(noisy: tuple[Any, Any]) -> None:
    model = denoiser(batch=1024)
    expected = model(noisy[0])
    network = model.model

    class Waiting(type(network)):  # type: ignore[misc]
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            made: torch.Tensor = super().forward(images)
            return made if float(made.sum()) > -1.0 else -made

    network.__class__ = Waiting
    model._passes.clear()
    with pytest.warns(RuntimeWarning, match="cannot be recorded"):
        made = model(noisy[0])
    assert np.abs(made - expected).max() < 1e-3
    assert np.abs(model(noisy[0]) - expected).max() < 1e-3
    assert [run.eager for run in model._passes.values()] == [True]
