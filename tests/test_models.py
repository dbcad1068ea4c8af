"""The networks: their sizes and shapes, how they start, and the seed's against Keras."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch import nn

from denoise_batch.bundle import SHIPPED_FOLDER, read_bundle
from denoise_batch.digits.drawn_digits import draw_digits
from denoise_batch.errors import ModelError
from denoise_batch.models import ARCHITECTURES, build
from denoise_batch.models.fused_layers import FUSED, FUSED_BFLOAT16, ConvRelu, LinearRelu, ResidualConv, ResidualLinear
from denoise_batch.models.int8 import INT8
from denoise_batch.models.noise_signs import range_ends
from denoise_batch.models.seed import SeedAutoencoder
from denoise_batch.models.two_scales import _means
from denoise_batch.noise import NoiseRecipe
from denoise_batch.precision import Precision
from denoise_batch.training.recipes import RECIPES

if TYPE_CHECKING:
    from denoise_batch.models.network import DenoisingNetwork

HAS_INT8 = INT8 and Precision.AUTO.int8(torch.device("cpu"))
DTYPES = [
    torch.float32,
    pytest.param(torch.bfloat16, marks=pytest.mark.skipif(not FUSED_BFLOAT16, reason="this processor has no bfloat16")),
    pytest.param(
        torch.int8, marks=pytest.mark.skipif(not HAS_INT8, reason="this processor multiplies no 8-bit integers")
    ),
]


def lowered(name: str, dtype: torch.dtype) -> DenoisingNetwork:
    """A network with fresh weights that computes in this type, where it is made for it."""
    torch.manual_seed(0)
    network: DenoisingNetwork = build(name).eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if dtype == torch.bfloat16:
        network.to_bfloat16()
    elif dtype == torch.int8:
        network.prepare_int8(torch.randn((50, 1, 28, 28), generator=torch.Generator().manual_seed(1)))
        network.to_int8()
        assert network.computes_in_integers == (name == "bounds-unet")
    return network


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_shapes_and_range(name: str) -> None:
    network = build(name)
    noisy = torch.randn((3, 1, 28, 28), generator=torch.Generator().manual_seed(0))
    clean = network(noisy)
    assert clean.shape == (3, 1, 28, 28)
    assert clean.dtype == torch.float32
    assert clean.min() >= 0
    assert clean.max() <= 1
    assert torch.allclose(clean, torch.sigmoid(network.logits(noisy)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_an_image_does_not_depend_on_its_neighbours(name: str, dtype: torch.dtype) -> None:
    network = lowered(name, dtype)
    noisy = torch.randn((5, 1, 28, 28), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        alone = network(noisy[2:3])
        assert torch.allclose(network(noisy)[2:3], alone, atol=1e-6 if dtype == torch.float32 else 1e-2)
        noisy[1], noisy[3] = torch.nan, torch.inf
        assert torch.allclose(network(noisy)[2:3], alone, atol=1e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_a_number_does_not_become_a_digit(dtype: torch.dtype) -> None:
    """Where ReLUs and integers lose it, `infer` could not tell."""
    network = lowered("bounds-unet", dtype)
    noisy = torch.rand((5, 1, 28, 28))
    noisy[1, 0, 5, 6], noisy[2, 0, 5, 6], noisy[4, 0, 5, 6] = math.nan, math.inf, -1e30
    with torch.inference_mode():
        found = network(noisy).isnan().flatten(1).all(dim=1)
    assert found.tolist() == [False, True, True, False, True]


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_parameters_json_rebuilds_the_network(name: str) -> None:
    network = build(name)
    again = build(name, network.parameters_json)
    shapes = {key: value.shape for key, value in network.state_dict().items()}
    assert {key: value.shape for key, value in again.state_dict().items()} == shapes


@pytest.mark.parametrize(("name", "count"), [("seed", 4_385), ("bounds-unet", 1_890_451)])
def test_parameter_count(name: str, count: int) -> None:
    network = build(name)
    assert network.parameter_count() == count
    buffers = {name for name, _ in network.named_buffers()}
    assert count == sum(value.numel() for name, value in network.state_dict().items() if name not in buffers)


@pytest.mark.parametrize("name", ["seed", "seed-transposed"])
def test_the_code_has_128_numbers(name: str) -> None:
    code = build(name).code(torch.zeros((2, 1, 28, 28)))  # type: ignore[operator]
    assert code.shape == (2, 8, 4, 4)


def test_seed_layers_have_the_sizes_of_the_seed() -> None:
    sizes = [module.weight.numel() + module.bias.numel() for module in SeedAutoencoder().children()]
    assert sizes == [160, 1160, 584, 584, 584, 1168, 145]  # what Keras' summary() lists
    x = torch.zeros((1, 1, 28, 28))
    assert SeedAutoencoder().encode3(torch.zeros((1, 8, 7, 7))).shape[-1] == 7  # pooled to 4 = ceil(7 / 2)
    assert SeedAutoencoder().code(x).shape[-1] == 4


@pytest.mark.parametrize("name", ["seed", "seed-transposed"])
def test_seed_starts_as_keras_does(name: str) -> None:
    """Glorot-uniform: weights fill [-l, l], l = sqrt(6 / (fan in + fan out)); biases are zero."""
    torch.manual_seed(0)
    for layer in build(name).modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            assert layer.bias is not None
            assert not layer.bias.any()
            limit = math.sqrt(6 / (9 * (layer.in_channels + layer.out_channels)))
            weight = layer.weight.detach()
            assert 0.9 * limit < weight.abs().max() <= limit
            assert float(weight.std()) == pytest.approx(limit / 3**0.5, rel=0.15)


def test_the_noise_tells_its_half_range() -> None:
    noisy = torch.zeros((3, 1, 28, 28))
    noisy[0, 0, 3, 4] = -0.7
    noisy[1] = 0.2
    assert range_ends(noisy)[:, :2].tolist() == [pytest.approx([0.7, 1.0]), [0.0, 0.0], [0.0, 0.0]]


def test_images_within_the_range_get_the_same_ends_alone_as_beside_others() -> None:
    """Alone they take a shorter way."""
    within = torch.rand(5, 1, 28, 28).mul_(1.4).sub_(0.2).clamp_(0.0, 1.0)
    beside = torch.cat([within, torch.randn(3, 1, 28, 28)])
    assert torch.equal(range_ends(within), range_ends(beside)[:5])
    assert (range_ends(within)[:, 2:4] > 0).all()
    within[2, 0, 3, 3] = torch.nan
    assert range_ends(within)[2].isnan().any()
    assert range_ends(within[:0]).shape == (0, 8)


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_what_networks_say_beside_the_image(name: str) -> None:
    network = build(name).eval()
    noisy = torch.randn((3, 1, 28, 28), generator=torch.Generator().manual_seed(0))
    if network.code_size:
        code = network.code(noisy)
        assert code.flatten(1).shape == (3, network.code_size)
        assert torch.equal(network.decode(code), network.logits(noisy))
    if network.has_quality:
        outputs = network.outputs(noisy)
        assert torch.equal(outputs.logits, network.logits(noisy))
        assert torch.equal(outputs.clean, network(noisy))
        assert (outputs.quality.shape, outputs.quality.dtype) == ((3, 2), torch.float32)


def test_heads_are_trained_apart() -> None:
    """No gradient of their losses reaches the rest of the network, or the other head."""
    for head, value in (("quality", "quality"), ("gate", "trust")):
        network = build("bounds-unet")
        getattr(network.outputs(torch.rand((4, 1, 28, 28))), value).sum().backward()
        reached = {name for name, value in network.named_parameters() if value.grad is not None}
        assert reached == {f"{head}.{name}" for name, _ in getattr(network, head).named_parameters()}


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (ConvRelu(16, 32, 3, padding=1), (2, 16, 14, 14)),
        (ConvRelu(16, 32, 2, stride=2), (2, 16, 14, 14)),
        (ResidualConv(48), (2, 48, 7, 7)),
        (LinearRelu(40, 24), (3, 40)),
        (ResidualLinear(40, 40), (3, 40)),
    ],
)
def test_fused_layers_equal_one_after_the_other(layer: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    if x.ndim == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    layer = layer.to(dtype)
    apart = layer(x).detach()
    with torch.inference_mode(), torch.profiler.profile() as profile:
        fused = layer(x)
    names = {event.key for event in profile.key_averages()}
    alone = isinstance(layer, LinearRelu | ResidualLinear) and dtype == torch.float32
    assert any("pointwise" in name for name in names) == (FUSED and not alone), names
    assert fused.dtype == dtype
    assert apart.min() == 0.0
    # The sum is rounded once instead of twice.
    torch.testing.assert_close(
        fused, apart, rtol=0.02 if dtype == torch.bfloat16 else 1e-5, atol=1e-2 if dtype == torch.bfloat16 else 1e-5
    )


def test_bounds_unet_trains_what_it_computes() -> None:
    """Pixels moved as integers, with and without gradients, and planes as what they are said to be."""
    network = build("bounds-unet").to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    noisy = torch.randn((4, 1, 28, 28), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        inferred = network.logits(noisy).clone()
    torch.testing.assert_close(inferred, network.logits(noisy).detach())
    half_range = range_ends(noisy)[:, :1, None, None]
    _, planes = network._planes(noisy, range_ends(noisy))
    for first, plane in ((0, noisy), (4, (noisy - half_range).clamp_min(0)), (8, (noisy + half_range).clamp_max(1))):
        torch.testing.assert_close(planes[:, first : first + 4], nn.functional.pixel_unshuffle(plane, 2))
    torch.testing.assert_close(planes[:, 12:, 3, 5], range_ends(noisy)[:, :4])


@pytest.mark.skipif(not FUSED_BFLOAT16, reason="this processor has no bfloat16")
@pytest.mark.parametrize("name", ["bounds-unet", "seed"])
def test_bfloat16_changes_little_and_only_where_a_network_is_made_for_it(name: str) -> None:
    torch.manual_seed(0)
    network = build(name).eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    noisy = torch.randn((4, 1, 28, 28))
    with torch.inference_mode():
        exact = network(noisy)
        network.to_bfloat16()
        rounded = network(noisy)
        assert rounded.dtype == torch.float32
        kinds = {value.dtype for value in network.parameters()}
        if name == "seed":
            assert kinds == {torch.float32}
            assert torch.equal(rounded, exact)
            return
        assert kinds == {torch.float32, torch.bfloat16}
        assert 0.0 < float((rounded - exact).abs().max()) < 0.02
        assert network.outputs(noisy).quality.dtype == torch.float32


@pytest.mark.skipif(not HAS_INT8, reason="this processor multiplies no 8-bit integers")
def test_the_quality_head_is_told_the_same_in_integers() -> None:
    """What it reads of the last features, and their means, as float32 makes them of the same integers."""
    network = read_bundle(SHIPPED_FOLDER).load().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    network.to_int8()
    noisy = torch.rand((200, 1, 28, 28), generator=torch.Generator().manual_seed(3)) * 1.6 - 0.3
    with torch.inference_mode():
        passed = network._pass(noisy)
        fine, step = passed.fine, passed.fine_step
        as_float = fine.float() * step
        read, expected = passed.read_fine(fine), network.quality.feature(as_float)
        torch.testing.assert_close(_means(fine, step), as_float.mean(dim=(2, 3)), rtol=1e-4, atol=1e-5)
    assert fine.dtype == torch.uint8
    assert (read - expected).abs().max() < 1e-3 * expected.abs().max()


@pytest.mark.skipif(not HAS_INT8, reason="this processor has no 8-bit products")
def test_integers_change_little_and_only_what_was_measured() -> None:
    """The shipped network, on digits of all kinds of noise."""
    network = read_bundle(SHIPPED_FOLDER).load().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    clean = torch.from_numpy(draw_digits(64, seed=3)[0]).float() / 255
    recipe = NoiseRecipe.from_json(RECIPES["default"].noise_json())
    noisy = recipe.apply(clean, torch.Generator().manual_seed(0))[0][:, None]
    with torch.inference_mode():
        exact = network.outputs(noisy)
        network.to_int8()
        rounded = network.outputs(noisy)
        error = float((rounded.clean - exact.clean).square().mean().sqrt())
        assert 0.0 < error < 0.03
        off = (rounded.quality - exact.quality).abs()
        assert float(off[:, 0].median()) < 0.3  # where an image is just kept or just not, several decibels
        assert float(off[:, 0].mean()) < 0.7
        assert float(off[:, 1].mean()) < 0.02
        assert torch.equal(network(noisy), rounded.clean)
        network.largest *= 0.7  # values beyond what was measured are cut off; they do not come round to 0
        network.to_int8()
        assert float((network(noisy) - exact.clean).square().mean().sqrt()) < 0.1
    fresh = build("bounds-unet")
    fresh.to_int8()  # nothing was measured
    assert not fresh.computes_in_integers


@pytest.mark.parametrize("quality", [False, True])
def test_networks_can_be_exported(quality: bool) -> None:
    """As plain operations alone, which every runtime knows, for any number of images, noisy or clean."""
    network = read_bundle(SHIPPED_FOLDER).load()

    class Exported(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return self.network.outputs(images)[1:3] if quality else (self.network(images),)

    noisy = torch.randn((3, 1, 28, 28), generator=torch.Generator().manual_seed(0))
    noisy[1:] = torch.from_numpy(draw_digits(2, seed=3)[0])[:, None].float() / 255
    count = torch.export.Dim("count", min=1, max=1024)
    with torch.no_grad():
        program = torch.export.export(Exported(), (noisy[:2],), dynamic_shapes={"images": {0: count}})
        operations = {str(node.target) for node in program.graph.nodes}
        assert "aten.conv2d.default" in operations
        unknown = ("mkldnn", "aten.view.dtype", "autocast")
        assert not {name for name in operations if any(part in name for part in unknown)}
        for one, expected in zip(program.module()(noisy), Exported()(noisy), strict=True):
            torch.testing.assert_close(one, expected, rtol=1e-4, atol=1e-4)


def test_both_ends_tell_kinds_of_noise_apart() -> None:
    clean = torch.zeros((400, 28, 28))
    clean[:, 8:20, 12:16] = 1.0
    ends = {}
    for name, fields in {"uniform": {}, "gaussian": {"gaussian": 1.0}, "clipped": {"clipped": 1.0}}.items():
        recipe = NoiseRecipe((0.0, 0.0), (1.0, 1.0), **fields)
        ends[name] = range_ends(recipe.apply(clean, torch.Generator().manual_seed(2))[0][:, None])
    half_range, known, zero, one, below, _, _, _ = ends["clipped"].T
    assert not torch.stack([half_range, known, below]).any()
    assert zero.min() > 0.4
    assert one.min() > 0.01
    tail = {name: ends[name][:, 0] / ends[name][:, 4] for name in ("uniform", "gaussian")}  # r̂ over the mean below 0
    assert tail["uniform"].max() < tail["gaussian"].min()


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("nothing", None),
        ("bounds-unet", {"version": 2}),
        ("bounds-unet", {"breadth": 3}),
        ("bounds-unet", {"width": 0}),
        ("bounds-unet", {"blocks_in": -1}),
        ("seed", {"width": 1}),
    ],
)
def test_unknown_networks_and_parameters_are_refused(name: str, parameters: dict[str, int] | None) -> None:
    with pytest.raises(ModelError):
        build(name, parameters)


@pytest.mark.filterwarnings("ignore")
def test_seed_equals_keras() -> None:
    """The same weights in Keras' layers, as the seed writes them, give the same output."""
    os.environ.setdefault("KERAS_BACKEND", "torch")
    keras = pytest.importorskip("keras")
    layers = keras.layers

    image = layers.Input(shape=(28, 28, 1))
    x = layers.Conv2D(16, (3, 3), activation="relu", padding="same")(image)
    x = layers.MaxPooling2D((2, 2), padding="same")(x)
    x = layers.Conv2D(8, (3, 3), activation="relu", padding="same")(x)
    x = layers.MaxPooling2D((2, 2), padding="same")(x)
    x = layers.Conv2D(8, (3, 3), activation="relu", padding="same")(x)
    encoded = layers.MaxPooling2D((2, 2), padding="same")(x)
    x = layers.Conv2D(8, (3, 3), activation="relu", padding="same")(encoded)
    x = layers.UpSampling2D((2, 2))(x)
    x = layers.Conv2D(8, (3, 3), activation="relu", padding="same")(x)
    x = layers.UpSampling2D((2, 2))(x)
    x = layers.Conv2D(16, (3, 3), activation="relu")(x)
    x = layers.UpSampling2D((2, 2))(x)
    decoded = layers.Conv2D(1, (3, 3), activation="sigmoid", padding="same")(x)
    model = keras.models.Model(image, [decoded, encoded])
    assert model.count_params() == 4_385

    torch.manual_seed(1)
    ours = SeedAutoencoder().eval()
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.3)  # biases too: zeros would not show a mistake
    convolutions = [layer for layer in model.layers if isinstance(layer, layers.Conv2D)]
    for layer, module in zip(convolutions, ours.children(), strict=True):
        layer.set_weights([module.weight.detach().permute(2, 3, 1, 0).numpy(), module.bias.detach().numpy()])

    noisy = np.random.default_rng(2).normal(0.3, 0.7, (8, 28, 28)).astype(np.float32)
    theirs, their_code = model.predict(noisy[..., None], verbose=0)
    with torch.no_grad():
        output, code = ours(torch.from_numpy(noisy)[:, None]), ours.code(torch.from_numpy(noisy)[:, None])
    np.testing.assert_allclose(output[:, 0].numpy(), theirs[..., 0], atol=1e-5)
    np.testing.assert_allclose(code.numpy(), np.moveaxis(their_code, -1, 1), atol=1e-4)
