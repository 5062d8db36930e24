from __future__ import annotations

import math
import warnings

import pytest
import torch

from flatcompress.errors import RunError, UserError
from flatcompress.quant.quantizers.lsq import StepQuantizer, grid, initial_scale
from flatcompress.quant.quantizers.variants import ClipQuantizer, OffsetQuantizer, three_sigma


def made(bits: int, signed: bool, scale: float | torch.Tensor, dtype: torch.dtype = torch.float32) -> StepQuantizer:
    start = torch.as_tensor(scale, dtype=dtype)
    quantizer = StepQuantizer(bits, signed, tuple(start.shape)).to(dtype)
    quantizer.set_scale(start)
    return quantizer


def plain_lsq(v: torch.Tensor, s: torch.Tensor, bits: int, signed: bool) -> torch.Tensor:
    """The paper's formula with straight-through rounding, left to autograd."""
    qn, qp = grid(bits, signed)
    z = torch.clamp(v / s, -qn, qp)
    return (z + (z.round() - z).detach()) * s


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_hand_computed_case_of_the_paper(dtype: torch.dtype) -> None:
    v = torch.tensor([-1.3, -0.3, 0.35, 2.0], dtype=dtype, requires_grad=True)
    quantizer = made(3, True, 0.5, dtype)
    out = quantizer.quantize(v)
    assert out.tolist() == [-1.5, -0.5, 0.5, 1.5]
    out.sum().backward()
    assert v.grad.tolist() == [1, 1, 1, 0]
    # N = 4 elements share the scale and Qp = 3: 2.5 / sqrt(12)
    assert float(quantizer.scale.grad) == pytest.approx(0.721688, abs=1e-6)
    assert quantizer.integers(v).tolist() == [-3, -1, 1, 3]


def test_scale_derivative_of_every_element() -> None:
    for value, expected in [(-1.3, -0.4), (-0.3, -0.4), (0.35, 0.3), (2.0, 3.0), (-9.0, -4.0)]:
        quantizer = made(3, True, 0.5, torch.float64)
        quantizer.quantize(torch.tensor([value], dtype=torch.float64)).sum().backward()
        assert float(quantizer.scale.grad) * math.sqrt(3) == pytest.approx(expected, abs=1e-9)


def test_start_of_the_scale() -> None:
    v = torch.tensor([-1.3, -0.3, 0.35, 2.0])
    assert float(initial_scale(v.abs().mean(), 3, True)) == pytest.approx(1.140267, abs=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("per_channel", [True, False])
def test_gradients_equal_autograd_of_the_formula(bits: int, signed: bool, per_channel: bool) -> None:
    torch.manual_seed(bits)
    v = torch.randn(5, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    shape = (5, 1, 1, 1) if per_channel else ()
    start = torch.rand(shape, dtype=torch.float64) + 0.1
    quantizer, weight = made(bits, signed, start, torch.float64), torch.randn(5, 3, 2, 2, dtype=torch.float64)
    (quantizer.quantize(v) * weight).sum().backward()
    w, s = v.detach().clone().requires_grad_(), start.clone().requires_grad_()
    reference = plain_lsq(w, s, bits, signed)
    (reference * weight).sum().backward()
    torch.testing.assert_close(quantizer.quantize(v), reference)
    torch.testing.assert_close(v.grad, w.grad)
    n = v.numel() / start.numel()
    torch.testing.assert_close(quantizer.scale.grad, s.grad / math.sqrt(n * quantizer.qp))


def test_gradients_equal_finite_differences_of_the_surrogate() -> None:
    """With the rounding residual frozen the surrogate is smooth: r + v inside, the level outside, times s."""
    torch.manual_seed(0)
    v = torch.randn(40, dtype=torch.float64)
    s = 0.3
    quantizer = made(3, True, s, torch.float64)
    z = (v / s).clamp(-4, 3)
    inside, residual = (v / s > -4) & (v / s < 3), z.round() - z

    def surrogate(step: float) -> float:
        return float(torch.where(inside, v + residual * step, z * step).sum())

    quantizer.quantize(v).sum().backward()
    numeric = (surrogate(s + 1e-6) - surrogate(s - 1e-6)) / 2e-6
    assert float(quantizer.scale.grad) * math.sqrt(40 * 3) == pytest.approx(numeric, rel=1e-6)


def test_boundaries_follow_the_papers_strict_inequalities() -> None:
    v = torch.tensor([0.0, 7.0, 15.0, 16.0], requires_grad=True)
    quantizer = made(4, False, 1.0)
    quantizer.quantize(v).sum().backward()
    assert v.grad.tolist() == [0, 1, 0, 0]
    assert float(quantizer.scale.grad) == pytest.approx(30 / math.sqrt(4 * 15))


def test_idempotent_and_zero_is_exact() -> None:
    torch.manual_seed(0)
    v = torch.randn(100)
    v[:10] = 0
    quantizer = made(4, True, 0.21)
    once = quantizer.quantize(v)
    assert torch.equal(quantizer.quantize(once), once)
    assert (once[:10] == 0).all()


def test_activations_count_features_per_sample() -> None:
    quantizer = StepQuantizer(4, False, per_sample=True)
    assert quantizer.gradient_scale(torch.zeros(32, 8, 3, 3)) == pytest.approx(1 / math.sqrt(72 * 15))


def test_first_batch_sets_an_activation_scale() -> None:
    quantizer = StepQuantizer(4, False, per_sample=True)
    assert not quantizer.ready
    quantizer.quantize(torch.full((2, 3), 0.5))
    assert quantizer.ready and quantizer.scale.item() == pytest.approx(1 / math.sqrt(15))
    clone = StepQuantizer(4, False, per_sample=True)
    clone.load_state_dict(quantizer.state_dict())
    assert clone.ready and torch.equal(clone.scale, quantizer.scale)


def test_half_precision_is_quantized_in_single() -> None:
    v = torch.randn(64)
    quantizer = made(8, True, 0.03)
    assert quantizer.quantize(v.bfloat16()).dtype is torch.float32


def test_scale_that_turns_negative_warns_by_name_and_stays_positive() -> None:
    quantizer = made(4, True, 0.5)
    quantizer.name = "layer1.conv"
    with torch.no_grad():
        quantizer.scale.fill_(-0.1)
    with pytest.warns(UserWarning, match=r"layer1\.conv"):
        out = quantizer.quantize(torch.tensor([1.0]))
    assert torch.isfinite(out).all() and float(quantizer.step()) > 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        quantizer.quantize(torch.tensor([1.0]))


@pytest.mark.parametrize("start", [1e-36, 1e-42])
def test_scale_that_underflows_warns_and_never_gives_nan(start: float) -> None:
    quantizer = made(4, True, start)
    quantizer.name = "fc"
    with torch.no_grad():
        quantizer.scale.fill_(-1e-3)  # where one ordinary step takes so small a scale
    v = torch.tensor([0.0, start, -1.0], requires_grad=True)
    with pytest.warns(UserWarning, match="'fc'.*held"):
        out = quantizer.quantize(v)
    out.sum().backward()
    assert float(quantizer.step()) > 0
    assert all(torch.isfinite(t).all() for t in (out, v.grad, quantizer.scale.grad))


def test_scale_that_is_not_finite_stops_the_run() -> None:
    quantizer = made(4, True, 0.5)
    quantizer.name = "fc"
    with torch.no_grad():
        quantizer.scale.fill_(float("nan"))
    with pytest.raises(RunError, match="fc"):
        quantizer.quantize(torch.tensor([1.0]))


def test_dead_tensor_warns_and_does_not_divide_by_zero() -> None:
    quantizer = StepQuantizer(4, False, per_sample=True)
    quantizer.name = "quantizers.relu"
    with pytest.warns(UserWarning, match=r"quantizers\.relu"):
        out = quantizer.quantize(torch.zeros(2, 3))
    assert torch.equal(out, torch.zeros(2, 3)) and quantizer.ready


@pytest.mark.parametrize("bits", [1, 9, 0, -4, 4.0, True, "4", None])
def test_bits_outside_two_to_eight(bits: object) -> None:
    with pytest.raises(UserError, match=r"2\.\.8"):
        grid(bits, True)


# -- LSQ+ and PACT ---------------------------------------------------------------------------------------------------


def test_three_sigma_start_by_hand() -> None:
    assert float(three_sigma(torch.tensor([[-0.1, 0.3]]), 4)) == pytest.approx(0.0875)


def offset_quantizer(scale: float, beta: float) -> OffsetQuantizer:
    quantizer = OffsetQuantizer(4).double()
    quantizer.set_scale(torch.tensor(scale))
    with torch.no_grad():
        quantizer.beta.fill_(beta)
    return quantizer


def test_offset_quantizer_is_its_integer_grid() -> None:
    quantizer = offset_quantizer(0.1, -0.32)
    x = torch.linspace(-1, 2, 50, dtype=torch.float64)
    spec = quantizer.activation_spec()
    assert (spec.zero_point, spec.signed) == (3, False)
    real = spec.scale * (quantizer.integers(x) - spec.zero_point)
    torch.testing.assert_close(quantizer.quantize(x), real)
    assert quantizer.quantize(torch.zeros(1, dtype=torch.float64)).item() == 0


def test_offset_gradients_follow_the_paper() -> None:
    quantizer = offset_quantizer(0.1, -0.32)  # levels -0.3 .. 1.2
    x = torch.tensor([-0.9, 0.14, 3.0], dtype=torch.float64, requires_grad=True)
    quantizer.quantize(x).sum().backward()
    g = 1 / math.sqrt(1 * 15)
    assert x.grad.tolist() == [0, 1, 0]
    assert float(quantizer.beta.grad) == pytest.approx(2 * g)
    assert float(quantizer.scale.grad) == pytest.approx((-3 + (1 - 1.4) + 12) * g)


def test_clip_quantizer_by_hand() -> None:
    quantizer = ClipQuantizer(2, signed=False)
    quantizer.set_scale(torch.tensor(1 / 3))  # alpha = 1
    x = torch.tensor([0.2, 0.52, 2.0], requires_grad=True)
    out = quantizer.quantize(x)
    torch.testing.assert_close(out, torch.tensor([1 / 3, 2 / 3, 1.0]))
    out.sum().backward()
    assert float(quantizer.alpha_gradient()) == pytest.approx(1.0)  # one clipped element
    assert x.grad.tolist() == [1, 1, 0]
    assert float(quantizer.penalty(0.1)) == pytest.approx(0.1)


def test_offset_start_has_less_error_than_the_whole_range() -> None:
    torch.manual_seed(0)
    x = torch.nn.functional.gelu(3 * torch.randn(4, 2000))
    x[0, 0] = 60.0  # an outlier that a min-max range would spend its levels on
    chosen, whole = OffsetQuantizer(4), OffsetQuantizer(4)
    chosen.quantize(x)
    whole.set_range(float(x.min()), float(x.max()))
    errors = [float((q.quantize(x).detach() - x).square().mean()) for q in (chosen, whole)]
    assert errors[0] < 0.8 * errors[1]
    assert chosen.activation_spec().zero_point == round(-chosen.beta.item() / chosen.scale.item())


SHAPES = {"small": (2, 3, 5, 7), "large": (2, 16, 200, 200)}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("layouts", ["contiguous", "channels_last", "mixed"])
def test_layout_and_size_change_nothing_but_the_order_of_a_sum(
    shape: tuple[int, ...], per_channel: bool, layouts: str
) -> None:
    g = torch.Generator().manual_seed(0)
    values, gradient = torch.randn(shape, generator=g), torch.randn(shape, generator=g)
    scale = torch.full((shape[0], 1, 1, 1), 0.3) if per_channel else torch.tensor(0.3)
    reference = values.double().requires_grad_()
    exact = made(4, True, scale, torch.float64)
    expected = exact.quantize(reference)
    expected.backward(gradient.double())
    last = torch.channels_last
    v = values.to(memory_format=last) if layouts != "contiguous" else values.clone()
    up = gradient.to(memory_format=last) if layouts == "channels_last" else gradient
    v.requires_grad_()
    quantizer = made(4, True, scale)
    out = quantizer.quantize(v)
    out.backward(up)
    plain = values.clone().requires_grad_()
    other_quantizer = made(4, True, scale)
    other = other_quantizer.quantize(plain)
    other.backward(gradient)
    assert torch.equal(out, other) and torch.equal(v.grad, plain.grad)
    torch.testing.assert_close(quantizer.scale.grad, other_quantizer.scale.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(quantizer.scale.grad.double(), exact.scale.grad, rtol=1e-3, atol=1e-3)
    assert out.stride() == v.stride()
