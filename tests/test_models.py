"""The networks: their sizes and shapes, how they start, and the seed's against Keras."""

from __future__ import annotations

import math
import os

import numpy as np
import pytest
import torch
from torch import nn

from denoise_batch.errors import ModelError
from denoise_batch.models import ARCHITECTURES, build
from denoise_batch.models.bounds_unet import noise_half_range, range_ends
from denoise_batch.models.seed import SeedAutoencoder
from denoise_batch.noise import NoiseRecipe


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


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_an_image_does_not_depend_on_its_neighbours(name: str) -> None:
    network = build(name).eval()
    noisy = torch.randn((5, 1, 28, 28), generator=torch.Generator().manual_seed(0))
    assert torch.allclose(network(noisy)[2:3], network(noisy[2:3]), atol=1e-6)


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_parameters_json_rebuilds_the_network(name: str) -> None:
    network = build(name)
    again = build(name, network.parameters_json)
    shapes = {key: value.shape for key, value in network.state_dict().items()}
    assert {key: value.shape for key, value in again.state_dict().items()} == shapes


@pytest.mark.parametrize(("name", "count"), [("seed", 4_385), ("bounds-unet", 1_840_562)])
def test_parameter_count(name: str, count: int) -> None:
    network = build(name)
    assert network.parameter_count() == count == sum(value.numel() for value in network.state_dict().values())


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
    assert noise_half_range(noisy).flatten().tolist() == pytest.approx([0.7, 0.0, 0.0])


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_what_networks_say_beside_the_image(name: str) -> None:
    network = build(name).eval()
    noisy = torch.randn((3, 1, 28, 28), generator=torch.Generator().manual_seed(0))
    if network.code_size:
        code = network.code(noisy)
        assert code.flatten(1).shape == (3, network.code_size)
        assert torch.equal(network.decode(code), network.logits(noisy))
    if network.has_quality:
        logits, quality = network.logits_and_quality(noisy)
        assert torch.equal(logits, network.logits(noisy))
        assert (quality.shape, quality.dtype) == ((3, 2), torch.float32)


def test_the_quality_head_changes_no_pixel() -> None:
    """No gradient of its loss reaches the rest of the network."""
    network = build("bounds-unet")
    _, quality = network.logits_and_quality(torch.rand((4, 1, 28, 28)))
    quality.sum().backward()
    reached = {name.partition(".")[0] for name, value in network.named_parameters() if value.grad is not None}
    assert reached == {"quality"}


def test_version_1_goes_on_in_version_2() -> None:
    torch.manual_seed(0)
    first, second = build("bounds-unet", {"version": 1}), build("bounds-unet")
    assert not first.has_quality
    assert second.load_state_dict(first.state_dict(), strict=False).unexpected_keys == []
    noisy = torch.randn((3, 1, 28, 28))
    assert torch.equal(first.logits(noisy), second.logits(noisy))


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
    [("nothing", None), ("bounds-unet", {"version": 3}), ("bounds-unet", {"breadth": 3}), ("seed", {"width": 1})],
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
