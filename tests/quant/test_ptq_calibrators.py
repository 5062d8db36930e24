"""Ranges of activations and scales of weights, against cases computed by hand and their own objectives."""

from __future__ import annotations

import pytest
import torch

from flatcompress.errors import UserError
from flatcompress.quant.ptq import CALIBRATORS, WEIGHT_SCALES
from flatcompress.quant.ptq.calibrators import Levels, squared_error
from flatcompress.quant.ptq.histogram import Histogram
from flatcompress.quant.ptq.weight_scales import rounded

UNSIGNED, SIGNED, OFFSET = Levels(0, 255), Levels(128, 127), Levels(0, 255, offset=True)


def histogram(*batches: torch.Tensor) -> Histogram:
    found = Histogram("x")
    for batch in batches:
        found.see(batch)
    return found.finish()


def skewed(seed: int, size: int = 20_000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator).exp() * torch.randn(size, generator=generator)


def test_every_value_is_counted_at_the_point_nearest_to_it():
    found = histogram(torch.tensor([0.0, 0.0, 4.096]), torch.tensor([1.0, 2.0004]))
    assert float(found.counts.sum()) == 5
    assert float(found.counts[0]) == 2 and float(found.points[0]) == 0.0
    assert float(found.counts[1000]) == 1 and float(found.counts[2000]) == 1 and float(found.counts[-1]) == 1


def test_zero_lies_on_a_point_of_a_range_on_both_sides():
    found = histogram(torch.tensor([-1.0, 3.0, 0.0]))
    assert float(found.counts[found.points == 0]) == 1


def test_not_a_number_is_refused_by_the_quantizers_name():
    with pytest.raises(UserError, match="'x'"):
        histogram(torch.tensor([1.0, float("nan")]))


def test_steps_of_the_three_grids_by_hand():
    assert UNSIGNED.step(0.0, 2.55) == pytest.approx(0.01)
    assert SIGNED.step(-1.28, 1.0) == pytest.approx(0.01)
    assert OFFSET.step(-0.55, 2.0) == pytest.approx(0.01)


def test_min_max_clips_nothing_and_keeps_zero():
    assert CALIBRATORS["min-max"].make(histogram(torch.tensor([1.0, 3.0])), UNSIGNED) == (0.0, 3.0)


def test_percentile_leaves_out_the_outermost_ten_thousandth():
    values = torch.cat([torch.linspace(0, 1, 99_995), torch.full((5,), 100.0)])
    low, high = CALIBRATORS["percentile"].make(histogram(values), UNSIGNED)
    assert low == 0.0 and high == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("levels", [UNSIGNED, SIGNED, OFFSET, Levels(8, 7), Levels(0, 15, offset=True)])
@pytest.mark.parametrize("seed", range(3))
def test_mse_is_never_worse_than_min_max_on_its_own_objective(levels, seed):
    found = histogram(skewed(seed).abs() if levels == UNSIGNED else skewed(seed))
    errors = [squared_error(found, levels, *CALIBRATORS[name].make(found, levels)) for name in ("mse", "min-max")]
    assert errors[0] <= errors[1]


def test_mse_gives_up_one_outlier_for_the_rest():
    values = torch.cat([torch.rand(100_000), torch.tensor([50.0])])
    _low, high = CALIBRATORS["mse"].make(histogram(values), Levels(0, 15))
    assert high < 10


def test_entropy_cuts_a_long_tail_and_keeps_a_uniform_range():
    generator = torch.Generator().manual_seed(0)
    tailed = torch.cat([torch.rand(100_000, generator=generator), torch.tensor([40.0])])
    assert CALIBRATORS["entropy"].make(histogram(tailed), UNSIGNED)[1] < 20
    flat = torch.rand(200_000, generator=generator)
    assert CALIBRATORS["entropy"].make(histogram(flat), UNSIGNED)[1] > 0.9


@pytest.mark.parametrize("name", list(CALIBRATORS))
@pytest.mark.parametrize("values", [torch.zeros(10), torch.ones(10), -torch.ones(10), torch.tensor([5.0])])
def test_every_calibrator_takes_a_constant_tensor(name, values):
    low, high = CALIBRATORS[name].make(histogram(values), SIGNED)
    assert low <= 0 <= high


def test_many_levels_lose_nothing():
    found = histogram(skewed(0))
    wide = Levels(2**20, 2**20 - 1)
    assert squared_error(found, wide, *CALIBRATORS["mse"].make(found, wide)) < 1e-8
    rows = skewed(1).view(10, -1)
    for entry in (WEIGHT_SCALES["mse"], WEIGHT_SCALES["min-max"]):
        scale = entry.make(rows, 2**20, 2**20 - 1)
        assert float((rounded(rows, scale, 2**20, 2**20 - 1) - rows).abs().max()) < 1e-4


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_mse_weight_scale_is_never_worse_than_min_max_in_any_row(bits):
    rows, qn, qp = skewed(2).view(40, -1), 2 ** (bits - 1), 2 ** (bits - 1) - 1
    errors = [
        (rounded(rows, WEIGHT_SCALES[name].make(rows, qn, qp), qn, qp) - rows).square().sum(1)
        for name in ("mse", "min-max")
    ]
    assert bool((errors[0] <= errors[1]).all())


def test_weight_scales_by_hand():
    rows = torch.tensor([[0.7, -0.1, 0.2], [3.5, 0.0, 0.0]])
    assert WEIGHT_SCALES["min-max"].make(rows, 8, 7).tolist() == pytest.approx([0.1, 0.5])
    # four integers of a grid exactly: the scale is found again
    on_grid = torch.tensor([[0.3, -0.6, 0.9, 2.1]])
    scale = WEIGHT_SCALES["mse"].make(on_grid, 8, 7)
    assert torch.allclose(rounded(on_grid, scale, 8, 7), on_grid, atol=1e-6)


def test_a_row_of_zeros_has_no_scale_and_no_error():
    scale = WEIGHT_SCALES["mse"].make(torch.zeros(2, 5), 8, 7)
    assert scale.tolist() == [0.0, 0.0]
    assert float(rounded(torch.zeros(2, 5), scale, 8, 7).abs().sum()) == 0
