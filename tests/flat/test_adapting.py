"""SAR by hand: which samples count, where the gradient is taken, when everything starts over."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from flatcompress import quant
from flatcompress.errors import UserError
from flatcompress.flat.adapting import Sar, entropy


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
    with torch.no_grad():
        model[3].weight.mul_(4)
        model[1].running_mean.normal_()
    return model.eval()


def test_one_step_equals_its_equations():
    """Entropy of reliable samples (eq. 2), its gradient at rho g / ||g|| (eq. 4), SGD's first step."""
    model, x, limit = net(), torch.randn(12, 4), 0.4 * math.log(3)
    hand = copy.deepcopy(model)
    sar = Sar(model, rho=0.1, lr=0.5, prior=0.0, chance=0.0, recovery=0.0)
    logits = sar(x)

    def normalised(weight, bias):
        h = hand[0](x)
        h = (h - h.mean(0)) / (h.var(0, unbiased=False) + hand[1].eps).sqrt()
        return hand[3](torch.relu(h * weight + bias))

    w, b = (p.detach().clone().requires_grad_() for p in (hand[1].weight, hand[1].bias))
    first = entropy(normalised(w, b))
    torch.testing.assert_close(logits, normalised(w, b).detach())
    kept = first < limit
    assert 0 < int(kept.sum()) < len(x)
    g = torch.autograd.grad(first[kept].mean(), (w, b))
    norm = torch.cat([t.flatten() for t in g]).norm()
    near = [(p + 0.1 * t / norm).detach().requires_grad_() for p, t in zip((w, b), g)]
    second = entropy(normalised(*near))
    still = kept & (second < limit)
    again = torch.autograd.grad(second[still].mean(), near)
    for got, start, step in zip((model[1].weight, model[1].bias), (w, b), again):
        torch.testing.assert_close(got, start.detach() - 0.5 * 12 / 64 * step)
    assert sar.average == pytest.approx(float(second[kept].detach().mean()))


def test_only_norm_layers_move_and_nothing_at_all_where_no_sample_is_reliable():
    model = net()
    before = copy.deepcopy(model.state_dict())
    sar = Sar(model, margin=0.0)
    sar(torch.randn(8, 4))
    assert sar.steps == 0 and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    sar = Sar(model, margin=1.0, recovery=0.0)
    sar(torch.randn(8, 4))
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {"1.weight", "1.bias"}
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items() if k not in moved)


def test_a_collapse_starts_over():
    model = net()
    before = copy.deepcopy(model.state_dict())
    sar = Sar(model, margin=1.0, recovery=10.0)
    sar(torch.randn(8, 4))
    assert sar.resets == 1 and sar.average is None
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_large_prior_and_no_reliable_sample_are_the_plain_model_and_closing_gives_it_back():
    model, x = net(), torch.randn(8, 4)
    plain = model(x).detach()
    sar = Sar(model, prior=1e9, margin=0.0)
    torch.testing.assert_close(sar(x), plain)
    sar.close()
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(model(x), plain)


def test_a_quantized_model_adapts():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 3))
    x = torch.randn(16, 1, 8, 8)
    quant.quantize(model, 4, 4, example_input=x[:2])
    quant.calibrate(model, [x])
    before = copy.deepcopy(model.state_dict())
    sar = Sar(model, margin=1.0, recovery=0.0, lr=0.1)
    sar(x)
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {"1.weight", "1.bias"}


def test_statistics_are_shared_by_the_numbers_of_samples_and_a_single_one_has_none():
    model = net()
    sar = Sar(copy.deepcopy(model), prior=3.0, memory=0.0, chance=0.0, margin=0.0)
    x, norm = torch.randn(7, 4), model[1]
    h = model[0](x).detach()
    mean, var = (h.mean(0) * 6 + norm.running_mean * 3) / 9, (h.var(0, unbiased=False) * 6 + norm.running_var * 3) / 9
    expected = model[3](torch.relu((h - mean) / (var + norm.eps).sqrt()))
    torch.testing.assert_close(sar(x), expected.detach())
    torch.testing.assert_close(sar(x[:1]), model(x[:1]).detach())


def test_the_stream_counts_as_far_as_it_is_beyond_chance():
    model = net()
    sar = Sar(copy.deepcopy(model), prior=0.0, memory=0.0, chance=2.0, margin=0.0)
    x, norm = torch.randn(7, 4) + 3, model[1]
    h = model[0](x).detach()
    own = norm.running_var + norm.eps
    distance = ((h.mean(0) - norm.running_mean) ** 2 / own).sum()
    expected_distance = (h.var(0, unbiased=True) / own).sum() / 7  # of the mean of seven samples
    share = float(1 - 2 * expected_distance / distance)
    assert 0.1 < share < 0.99
    mean = share * h.mean(0) + (1 - share) * norm.running_mean
    var = share * h.var(0, unbiased=False) + (1 - share) * norm.running_var
    expected = model[3](torch.relu((h - mean) / (var + norm.eps).sqrt()))
    torch.testing.assert_close(sar(x), expected.detach())


def test_a_stream_without_a_shift_changes_nothing():
    model = net()
    with torch.no_grad():
        x = torch.randn(512, 4)
        h = model[0](x)
        model[1].running_mean.copy_(h.mean(0))
        model[1].running_var.copy_(h.var(0))
    sar = Sar(copy.deepcopy(model), prior=0.0, memory=0.0, chance=2.0, margin=0.0)
    torch.testing.assert_close(sar(x), model(x).detach())


def test_samples_one_at_a_time_gather_statistics_by_their_answers():
    """Three classes, memory 30: in a class the sample before the last weighs 0.9; the network's own weigh 3."""
    model = net()
    sar = Sar(copy.deepcopy(model), prior=3.0, memory=30.0, chance=0.0, margin=0.0)
    x, norm = 6 * torch.randn(6, 4), model[1]
    answers = [int(sar(one[None]).argmax()) for one in x[:5]]
    assert len(set(answers)) > 1 and len(set(answers)) < 5
    later = [answers[i + 1 :].count(kind) for i, kind in enumerate(answers)]
    weights = torch.tensor([0.9**n for n in later] + [1.0])
    h, total = model[0](x).detach(), float(weights.sum())
    mean = (weights[:, None] * h).sum(0) / total
    var = (weights[:, None] * (h - mean) ** 2).sum(0) / total
    mean, var = (
        (v * (total - 1) + o * 3) / (total + 2) for v, o in ((mean, norm.running_mean), (var, norm.running_var))
    )
    expected = model[3](torch.relu((h[5:] - mean) / (var + norm.eps).sqrt()))
    torch.testing.assert_close(sar(x[5:]), expected.detach(), rtol=1e-4, atol=1e-5)
    sar.reset()
    torch.testing.assert_close(sar(x[:1]), model(x[:1]).detach())


def test_a_stream_of_one_class_counts_for_no_more_than_its_share():
    sar = Sar(net(), prior=16.0, memory=30.0, margin=0.0)
    for _ in range(200):
        sar(torch.ones(1, 4))
    ((count, _),) = sar._streams[0]._seen.values()
    assert count == pytest.approx(10, rel=1e-3)


def test_a_batch_is_counted_once_however_often_it_is_passed_through():
    model, x = net(), torch.randn(8, 4)
    learning, still = (Sar(copy.deepcopy(model), margin=m, lr=1e-12, recovery=0.0) for m in (1.0, 0.0))
    for part in x.split(4):
        torch.testing.assert_close(learning(part), still(part))
    assert learning.steps == 2 and still.steps == 0


def test_what_cannot_be_adapted_is_refused():
    with pytest.raises(UserError, match="no normalisation layer"):
        Sar(nn.Linear(2, 2))
    with pytest.raises(UserError, match="at least two classes"):
        Sar(nn.Sequential(nn.Linear(2, 1), nn.BatchNorm1d(1)))(torch.randn(4, 2))
    with pytest.raises(UserError, match="from 1 on, or 0"):
        Sar(net(), memory=0.5)
    with pytest.raises(UserError, match="larger batches"):
        Sar(net(), prior=0.0)(torch.randn(1, 4))
