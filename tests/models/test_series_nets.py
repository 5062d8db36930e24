"""SAMformer's network by hand, and what its normalisation of windows promises."""

from __future__ import annotations

import pytest
import torch

from flatcompress import data
from flatcompress.errors import UserError
from flatcompress.models.series_nets import samformer
from flatcompress.recipe import load_recipe


def test_samformers_forecast_by_hand():
    torch.manual_seed(0)
    net, x = samformer(2 * 3, (2, 5), dim=4), torch.randn(1, 2, 5)
    with torch.no_grad():
        net.gain.copy_(torch.tensor([[2.0], [0.5]]))
        net.shift.copy_(torch.tensor([[0.1], [-0.3]]))
    mean, spread = x[0].mean(1), (x[0].var(1, unbiased=False) + 1e-5).sqrt()
    rows = [(x[0, c] - mean[c]) / spread[c] * net.gain[c] + net.shift[c] for c in range(2)]
    queries, keys, values = ([layer(r) for r in rows] for layer in (net.queries, net.keys, net.values))
    for c in range(2):
        weights = torch.stack([queries[c] @ keys[k] / 2 for k in range(2)]).exp()
        mixed = rows[c] + sum(weights[k] / weights.sum() * values[k] for k in range(2))
        ahead = (net.forecast(mixed) - net.shift[c]) / net.gain[c] * spread[c] + mean[c]
        torch.testing.assert_close(net(x)[0, 3 * c : 3 * c + 3], ahead)


def test_a_level_and_a_scale_of_a_channel_are_given_back():
    net, x = samformer(3 * 4, (3, 16)).double(), torch.randn(2, 3, 16, dtype=torch.float64)
    level, scale = torch.tensor([5.0, -1.0, 0.0]).view(3, 1), torch.tensor([2.0, 1.0, 30.0]).view(3, 1)
    moved = net(x * scale + level).view(2, 3, 4)
    torch.testing.assert_close(moved, net(x).view(2, 3, 4) * scale + level, rtol=1e-3, atol=1e-3)


def test_the_recipe_fits_its_data_and_what_is_no_series_is_refused():
    recipe = load_recipe("configs/task-forecast.yaml", [])
    found = data.load(recipe.data.name, train_count=12, val_count=12, test_count=12)
    assert samformer(96, found.input_shape).forecast.out_features == 24
    with pytest.raises(UserError, match="series"):
        samformer(4, (1, 8, 8))
    with pytest.raises(UserError, match="no such"):
        samformer(7, (3, 8))
