"""What a network's 8-bit integers stand for: scales of channels, cut-offs of values, integers of weights."""

from __future__ import annotations

import pytest
import torch

from denoise_batch.bundle import SHIPPED_FOLDER, read_bundle
from denoise_batch.digits.drawn_digits import draw_digits
from denoise_batch.models import build, int8, rounding
from denoise_batch.models.bounds_unet import BoundsUNet
from denoise_batch.models.channel_scales import Chain, Reader, balance_channels, factors
from denoise_batch.models.int8 import INT8, pairs_fit, plane_steps, rounded_planes, sums_exactly, weight_steps
from denoise_batch.models.rounding import choose_cutoffs, choose_integers, nearest_integers
from denoise_batch.noise import NoiseRecipe
from denoise_batch.precision import Precision
from denoise_batch.training.recipes import RECIPES

HAS_INT8 = INT8 and Precision.AUTO.int8(torch.device("cpu"))
needs_int8 = pytest.mark.skipif(not HAS_INT8, reason="this processor multiplies no 8-bit integers")


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
        before = network.outputs(noisy[:20])
        network.scale_channels(2.0 ** torch.randint(-6, 7, (8,)), 2.0 ** torch.randint(-6, 7, (16,)))
        after = network.outputs(noisy[:20])
    assert all(map(torch.equal, after, before))


@pytest.mark.slow
@needs_int8
def test_channels_of_very_unlike_scale_are_balanced(noisy: torch.Tensor, network: BoundsUNet) -> None:
    noisy = noisy[:100]
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


def test_balancing_moves_nothing_twice_and_leaves_gradients_alone(noisy: torch.Tensor, network: BoundsUNet) -> None:
    with torch.no_grad():
        network.down.weight[7] = network.down.weight[8] = 0.0
        network.down.bias[7] = -1e3
        network.down.bias[8] = 0.0  # two channels of which there is next to nothing to round
    network.requires_grad_(True)
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    balance_channels(network, noisy)
    before = {name: value.clone() for name, value in network.named_parameters()}
    balance_channels(network, noisy)
    for name, parameter in network.named_parameters():
        assert torch.equal(parameter, before[name]), name
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, torch.ones_like(parameter))


def test_a_channel_is_scaled_for_the_weights_that_read_it_as_well() -> None:
    largest = torch.ones(6, 4)
    largest[:, 2] = 8.0  # which all others' weights would be rounded as coarsely as
    reader = Reader(largest, taps=9, read=torch.ones(4), sensitive=torch.ones(6))
    indifferent = Chain(torch.zeros(3, 4, 104), [reader])
    chosen = factors(indifferent)
    assert chosen[2] >= 4.0 * chosen[[0, 1, 3]].max()
    assert indifferent.cost(chosen.log2().long()) < 0.3 * indifferent.cost(torch.zeros(4, dtype=torch.long))
    costly = torch.zeros(3, 4, 104)
    costly[:, 2] = 1e3 * torch.arange(104).flip(0)  # the earlier the channel ends, the more is cut off
    costly[:, [0, 1, 3]] = 1e3 * torch.arange(104)[None, None]
    assert torch.equal(factors(Chain(costly, [])), factors(Chain(costly, [reader])))  # where these cost next to nothing


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_pixels_that_are_no_numbers_are_an_error_or_pass(network: BoundsUNet, noisy: torch.Tensor) -> None:
    broken = noisy[:40].clone()
    broken[3, 0, 5, 5] = float("nan")
    with pytest.raises(RuntimeError):
        network.prepare_int8(broken)
    network.to_int8()
    assert not network.computes_in_integers


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


def test_outputs_that_go_together_make_good_for_each_other() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn((40, 40), generator=generator) @ torch.randn((40, 900), generator=generator)
    towards = torch.randn((3, 12), generator=generator) + 0.1 * torch.randn((900, 12), generator=generator)[:3]
    gram, together = inputs @ inputs.T / 900, towards.T @ towards
    weight = 20.0 * torch.randn((12, 40), generator=generator)

    def wrong(integers: torch.Tensor) -> float:
        return float((towards @ (weight - integers) @ inputs).square().mean())

    alone, chosen = nearest_integers(weight, gram), nearest_integers(weight, gram, together)
    assert torch.equal(chosen, chosen.round())
    assert wrong(chosen) < 0.6 * wrong(alone)
    assert float(nearest_integers(1000.0 * weight, gram, together).abs().max()) == 127.0
    # Outputs that have nothing to do with each other stand alone.
    torch.testing.assert_close(nearest_integers(weight, gram, torch.eye(12)), alone)


def nearest(network: BoundsUNet) -> None:
    """Each weight rounded alone, towards 0 where a pair would be too large otherwise."""
    for layer in network.rounded_layers():
        weight = layer.weight * plane_steps() if layer is network.inlet else layer.weight
        weight = weight[:, : layer.integers.shape[1]]
        wanted = weight / weight_steps(weight).view(-1, *[1] * (weight.ndim - 1))
        layer.integers.copy_(wanted.round())
        above = layer.integers.int().abs() > wanted.abs()
        for first, second in ((0, 1), (1, 0)):
            pair = layer.integers[:, first::2].int() + layer.integers[:, second::2].int()
            too_large = (pair.abs() > int8.LARGEST_PAIR) & above[:, first::2]
            layer.integers[:, first::2] -= (layer.integers[:, first::2].sign() * too_large).to(torch.int8)
        assert pairs_fit(layer.integers)


@needs_int8
def test_integers_of_the_model_that_ships_are_better_than_the_nearest(network: BoundsUNet, noisy: torch.Tensor) -> None:
    chosen = error(network, noisy)
    nearest(network)
    assert chosen < 0.8 * error(network, noisy)


def test_no_pair_of_weights_is_too_large_for_16_bits(network: BoundsUNet, noisy: torch.Tensor) -> None:
    """What processors without units for 8-bit products would cut off, and nobody would notice."""
    assert all(pairs_fit(layer.integers) for layer in network.rounded_layers())
    with torch.no_grad():
        network.join.weight[:, 6:8] = network.join.weight.abs().max()  # both want to be as large as can be
        network.up.weight[3, 10:12] = -5.0
    choose_integers(network, noisy[:100])
    assert all(pairs_fit(layer.integers) for layer in network.rounded_layers())
    assert int(network.join.integers[:, 6:8].sum(dim=1).max()) > int8.LARGEST_PAIR - 16
    assert int(network.up.integers[3, 10:12].sum()) == -int8.LARGEST_PAIR
    fitting = torch.tensor([[127, 1, -64, -64, 127]], dtype=torch.int8)
    assert pairs_fit(fitting)
    for index, value in ((1, 2), (3, -65)):
        too_large = fitting.clone()
        too_large[0, index] = value
        assert not pairs_fit(too_large)


def test_pairs_are_chosen_together() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn((20, 900), generator=generator)
    weight = 90.0 * torch.randn((50, 20), generator=generator)
    pairs = torch.arange(20) ^ 1
    pairs[18:] = 20  # these two stand alone
    for together in (None, torch.eye(50)):
        chosen = nearest_integers(weight, inputs @ inputs.T / 900, together, pairs)
        assert pairs_fit(chosen[:, :18])
        assert not pairs_fit(chosen[:, 18:])
        assert not pairs_fit(nearest_integers(weight, inputs @ inputs.T / 900, together))


@needs_int8
def test_sums_of_this_processor_are_exact_and_such_as_are_not_are_noticed(
    network: BoundsUNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sums_exactly()
    multiply = int8._Linear.__call__
    monkeypatch.setattr(int8._Linear, "__call__", lambda *given: multiply(*given).clamp(max=32 * 32767.0))
    sums_exactly.cache_clear()
    try:
        assert sums_exactly()  # nothing in it is as large
        monkeypatch.setattr(int8._Linear, "__call__", lambda *given: multiply(*given).clamp(max=32767.0))
        sums_exactly.cache_clear()
        network.to_int8()
        assert not network.computes_in_integers
    finally:
        monkeypatch.undo()
        sums_exactly.cache_clear()


@needs_int8
@torch.inference_mode()
def test_a_layer_gives_on_this_processor_what_its_integers_stand_for(network: BoundsUNet) -> None:
    """In float64 nothing is cut off."""
    layer = int8._Conv(network.fine_out, 0.01, None)
    values = torch.randint(256, (4, 32, 14, 14), generator=torch.Generator().manual_seed(2)).to(torch.uint8)
    values[0] = 255
    made = layer(values.contiguous(memory_format=torch.channels_last))
    weight = network.fine_out.integers.double() * weight_steps(network.fine_out.weight).view(-1, 1, 1, 1)
    exact = torch.nn.functional.conv2d(0.01 * values.double(), weight, network.fine_out.bias.double(), padding=1)
    torch.testing.assert_close(made.double(), exact, rtol=1e-5, atol=1e-4)


@pytest.mark.slow
def test_weights_are_as_they_were_when_integers_are_chosen(
    network: BoundsUNet, noisy: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {name: value.clone() for name, value in network.named_parameters()}
    choose_integers(network, noisy[:100])
    round_one, rounded = rounding._round, []

    def fail_at_the_third(layer: object, *given: object) -> None:
        rounded.append(layer)
        if len(rounded) == 3:
            raise RuntimeError("no memory")
        round_one(layer, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(rounding, "_round", fail_at_the_third)
    with pytest.raises(RuntimeError, match="no memory"):
        choose_integers(network, noisy[:100])
    for name, value in network.named_parameters():
        assert torch.equal(value, before[name])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


def test_planes_are_rounded_to_steps_of_their_own() -> None:
    planes = torch.full((1, 16, 1, 1), 0.014)
    pixels, finer, half_range, others = [0.02] * 4, [1 / 75] * 8, [0.02], [1 / 75] * 3
    assert rounded_planes(planes).flatten().tolist() == pytest.approx(pixels + finer + half_range + others)
    lowest = [-2.0] * 4 + [-2 / 3] * 8 + [-2.0] + [-2 / 3] * 3
    assert rounded_planes(planes - 9.0).flatten().tolist() == pytest.approx(lowest)


@needs_int8
def test_integers_of_other_weights_are_not_used(network: BoundsUNet) -> None:
    """They would make other pictures, which nobody would notice."""
    layers = network.rounded_layers()
    kept = {name: value.clone() for name, value in network.state_dict().items()}
    for layer in layers:
        network.load_state_dict(kept)
        layer.weight.data = layer.weight.roll(1, 0)
        network.to_int8()
        assert not network.computes_in_integers
    network.load_state_dict(kept)
    network.inlet.weight.data[:, 13:] *= 3.0  # as if the steps of these planes had been others
    network.to_int8()
    assert not network.computes_in_integers
    network.load_state_dict(kept)
    network.to_int8()
    assert network.computes_in_integers


def test_nothing_is_integer_before_all_of_it_is_chosen(network: BoundsUNet) -> None:
    fresh = build("bounds-unet")
    network.fine_out.integers.zero_()
    for made in (fresh, network):
        made.to_int8()
        assert not made.computes_in_integers


@pytest.mark.slow
def test_cutting_off_what_is_rare_where_the_image_comes_out_better(network: BoundsUNet, noisy: torch.Tensor) -> None:
    noisy = noisy[:100]
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
    if not HAS_INT8:
        return
    errors = []
    for largest in (chosen, torch.tensor(peaks)):
        network.largest.copy_(largest)
        choose_integers(network, noisy)
        errors.append(error(network, noisy))
    assert errors[0] < 0.9 * errors[1]


@pytest.mark.slow
@torch.inference_mode()
def test_large_values_that_say_nothing_make_no_others_coarse(network: BoundsUNet, noisy: torch.Tensor) -> None:
    """Those of empty images were fifteen times as large as all others' after a training of 45 minutes."""
    noisy = noisy[:50]
    network.outlet.weight[:, 0] = 0.0
    choose_cutoffs(network, noisy)
    usual = float(network.largest[-1])
    network.fine_out.bias[0] += 50.0 * usual
    choose_cutoffs(network, noisy)
    assert float(network.largest[-1]) < 2.0 * usual


@needs_int8
@torch.inference_mode()
def test_clipped_images_come_out_the_same_alone_as_beside_others(network: BoundsUNet, noisy: torch.Tensor) -> None:
    """Alone they take a shorter way to their bounds."""
    clipped = noisy[:50].clamp(0.0, 1.0)
    network.to_int8()
    alone, beside = network(clipped), network(torch.cat([clipped, noisy[50:100]]))[:50]
    torch.testing.assert_close(alone, beside, rtol=0.0, atol=1e-5)
    clipped[7, 0, 5, 5] = torch.nan
    assert network(clipped).isnan().flatten(1).any(dim=1).nonzero().flatten().tolist() == [7]
