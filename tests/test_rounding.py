"""What a network's 8-bit integers stand for: scales of channels, cut-offs of values, integers of weights."""

from __future__ import annotations

import pytest
import torch

from denoise_batch.bundle import SHIPPED_FOLDER, read_bundle
from denoise_batch.digits.drawn_digits import draw_digits
from denoise_batch.models import build
from denoise_batch.models.bounds_unet import BoundsUNet
from denoise_batch.models.int8 import INT8, rounded_planes, weight_steps
from denoise_batch.models.rounding import balance_channels, choose_cutoffs, choose_integers, nearest_integers
from denoise_batch.noise import NoiseRecipe
from denoise_batch.precision import Precision
from denoise_batch.training.recipes import RECIPES

needs_int8 = pytest.mark.skipif(
    not (INT8 and Precision.AUTO.int8(torch.device("cpu"))), reason="this processor multiplies no 8-bit integers"
)


@pytest.fixture(scope="module")
def noisy() -> torch.Tensor:
    """(400, 1, 28, 28), digits with noise of all kinds."""
    clean = torch.from_numpy(draw_digits(400, seed=5)[0]).float() / 255
    noise = NoiseRecipe.from_json(RECIPES["default"].noise_json())
    return noise.apply(clean, torch.Generator().manual_seed(1))[0][:, None]


@pytest.fixture
def network() -> BoundsUNet:
    made = read_bundle(SHIPPED_FOLDER).load()
    assert isinstance(made, BoundsUNet)
    return made.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


@torch.inference_mode()
def error(network: BoundsUNet, noisy: torch.Tensor) -> float:
    """Mean squared difference of the pixels in integers from those in float32."""
    exact = network(noisy)
    network.to_int8()
    rounded = network(noisy)
    network._integers = None
    return float((rounded - exact).square().mean())


@pytest.mark.parametrize("blocks", [(1, 1), (0, 2), (2, 0)])
def test_scaled_channels_change_no_bit(noisy: torch.Tensor, blocks: tuple[int, int]) -> None:
    torch.manual_seed(0)
    network = BoundsUNet(8, 16, 24, *blocks).eval()
    for parameter in network.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    with torch.inference_mode():
        before = network.logits_and_quality(noisy[:20])
        network.scale_channels(2.0 ** torch.randint(-6, 7, (8,)), 2.0 ** torch.randint(-6, 7, (16,)))
        after = network.logits_and_quality(noisy[:20])
    assert torch.equal(after[0], before[0])
    assert torch.equal(after[1], before[1])


@needs_int8
def test_channels_of_very_unlike_scale_are_balanced(noisy: torch.Tensor, network: BoundsUNet) -> None:
    well = error(network, noisy)
    unlike = 2.0 ** torch.arange(-8.0, 8.0)
    network.scale_channels(unlike.repeat(2), unlike.flip(0).repeat(4))
    choose_cutoffs(network, noisy)
    choose_integers(network, noisy)
    badly = error(network, noisy)
    balance_channels(network, noisy)
    balance_channels(network, noisy)  # a call reaches six octaves
    choose_cutoffs(network, noisy)
    choose_integers(network, noisy)
    assert error(network, noisy) < 2.0 * well < 0.2 * badly


def test_balancing_is_over_at_once_in_a_balanced_network(noisy: torch.Tensor, network: BoundsUNet) -> None:
    balance_channels(network, noisy)
    before = {name: value.clone() for name, value in network.named_parameters()}
    balance_channels(network, noisy)
    moved = sum(not torch.equal(value, before[name]) for name, value in network.named_parameters())
    assert moved <= len(before) // 2
    assert all(parameter.grad is None for parameter in network.parameters())


def test_nearest_integers_err_less_together_than_one_by_one() -> None:
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn((300, 300), generator=generator) @ torch.randn((300, 2000), generator=generator)
    inputs = mixed + 20.0 * torch.randn((300, 2000), generator=generator) * (torch.arange(300) % 3 == 0)[:, None]
    gram = inputs @ inputs.T / 2000
    weight = 20.0 * torch.randn((12, 300), generator=generator)
    chosen = nearest_integers(weight, gram)
    assert torch.equal(chosen, chosen.round())

    def wrong(integers: torch.Tensor) -> float:
        return float(((weight - integers) @ inputs).square().mean())

    assert wrong(chosen) < 0.7 * wrong(weight.round())
    assert float(nearest_integers(1000.0 * weight, gram).abs().max()) == 127.0
    whole = weight.round().clamp(-127, 127)
    assert torch.equal(nearest_integers(whole, gram), whole)
    assert torch.equal(nearest_integers(weight, torch.zeros_like(gram)), weight.round())  # nothing was seen


@needs_int8
def test_integers_of_the_model_that_ships_are_better_than_the_nearest(network: BoundsUNet, noisy: torch.Tensor) -> None:
    chosen = error(network, noisy)
    for layer in network.rounded_layers():
        if layer is not network.inlet:  # whose integers are of planes in steps of their own
            weight = layer.weight.flatten(1)[:, : layer.integers[0].numel()]
            layer.integers.copy_((weight / weight_steps(weight)[:, None]).round().view_as(layer.integers))
    assert chosen < 0.8 * error(network, noisy)


def test_weights_are_as_they_were_when_integers_are_chosen(network: BoundsUNet, noisy: torch.Tensor) -> None:
    before = {name: value.clone() for name, value in network.named_parameters()}
    choose_integers(network, noisy[:100])
    with pytest.raises(RuntimeError):
        choose_integers(network, noisy[:100, :, :20])  # no digit: the weights stay whole all the same
    for name, value in network.named_parameters():
        assert torch.equal(value, before[name])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


def test_planes_are_rounded_to_steps_of_their_own() -> None:
    planes = torch.full((1, 16, 1, 1), 0.014)
    assert rounded_planes(planes).flatten().tolist() == pytest.approx([0.02] * 4 + [1 / 75] * 8 + [0.02] * 4)
    assert rounded_planes(planes - 9.0).flatten().tolist() == pytest.approx([-2.0] * 4 + [-2 / 3] * 8 + [-2.0] * 4)


def test_nothing_is_integer_before_it_is_chosen() -> None:
    network = build("bounds-unet")
    network.to_int8()
    assert not network.computes_in_integers


def test_cutting_off_what_is_rare_where_the_image_comes_out_better(network: BoundsUNet, noisy: torch.Tensor) -> None:
    peaks: list[float] = []
    hooks = [
        layer.register_forward_hook(lambda _, __, made: peaks.append(float(made.max())))
        for layer in network.measured_layers()
    ]
    with torch.inference_mode():
        network(noisy)
    for hook in hooks:
        hook.remove()
    choose_cutoffs(network, noisy)
    chosen = network.largest.clone()
    shares = chosen / torch.tensor(peaks)
    assert shares.max() <= 1.001
    assert 0.19 < shares.min() < 0.9
    choose_cutoffs(network, noisy)
    assert torch.equal(network.largest, chosen)  # whatever was chosen before
    if needs_int8.args[0]:
        return
    errors = []
    for largest in (chosen, torch.tensor(peaks)):
        network.largest.copy_(largest)
        choose_integers(network, noisy)
        errors.append(error(network, noisy))
    assert errors[0] < 0.9 * errors[1]
