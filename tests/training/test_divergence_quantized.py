"""A quantized network whose numbers stop being finite: what is named, and what each policy makes of it."""

from __future__ import annotations

import copy
import functools
import math
from dataclasses import replace

import pytest
import torch
from test_divergence import Kept, Seen
from test_divergence import job as points
from tiny_net import build
from torch import nn

from flatcompress import flat, quant
from flatcompress.errors import RunError
from flatcompress.training.loop import fit

BITS = 2


class Images(torch.utils.data.Dataset):
    """48 images [1, 8, 8] of two classes."""

    def __init__(self):
        self.x = torch.randn(48, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        self.y = (self.x.mean((1, 2, 3)) > 0).long()

    def __len__(self):
        return 48

    def __getitem__(self, i):
        return self.x[i], self.y[i]


class Copies(Kept):
    """Every state of the job, apart from the job that goes on."""

    def save(self, step, state):
        self.states.append(copy.deepcopy(state))


@functools.cache
def quantized():
    model = build(2)
    x = Images().x
    quant.quantize(model, BITS, BITS, example_input=x[:2], first_last_bits=BITS, residual_bits=BITS)
    quant.calibrate(model, [x])
    return model


def job(policy, spoil=None, epochs=2):
    """A job that ``spoil(model)``, a dict of its fields, makes diverge."""
    model, data = copy.deepcopy(quantized()), Images()
    base = torch.optim.SGD(model.parameters(), lr=0.01)
    scales = {id(p) for p in quant.scale_parameters(model).values()}
    optimizer = flat.create("sam", model, base, perturbed=lambda name, p: id(p) not in scales)
    options = {} if spoil is None else spoil(model)
    return replace(points(Copies(policy), epochs=epochs), model=model, optimizer=optimizer, train=data, **options)


def once(action):
    """``action`` the first time it is asked for after step 2, and never again."""
    left = [action]

    def at(step):
        if step == 2 and left:
            left.pop()()

    return at


def spoil_scale(model, which):
    scale = next(p for n, p in quant.scale_parameters(model).items() if which(n))

    def spoil():
        with torch.no_grad():
            scale.fill_(math.nan)

    return {"callbacks": [Seen(once(spoil))]}


def spoil_activation(model):
    """Weights that are finite, and so large that the layer's output is not."""
    batch_norm = model.get_submodule("bn1")

    def spoil():
        with torch.no_grad():
            batch_norm.weight.fill_(3e38)
            batch_norm.running_var.fill_(1e-30)
            batch_norm.bias.fill_(3e38)

    return {"callbacks": [Seen(once(spoil))]}


def spoil_gradient(model):
    passes = [0]
    weight = model.get_parameter("conv2.weight")

    def after_backward():
        passes[0] += 1
        if passes[0] == 5:  # two passes a step: the first of step 3
            weight.grad.fill_(math.inf)

    return {"callbacks": [Seen(after_backward=after_backward)]}


def spoil_loss(model):
    passes, loss = [0], nn.functional.cross_entropy

    def spoilt(logits, y):
        passes[0] += 1
        return loss(logits, y) * (math.inf if passes[0] == 5 else 1.0)

    return {"loss": spoilt}


# how it is spoilt, what is named, its bits, and whether the weights stay sound
SPOIL = {
    "weight scale": (lambda t: spoil_scale(t, lambda n: "conv2" in n), "the scale of '.*conv2.*'", BITS, False),
    "activation scale": (
        lambda t: spoil_scale(t, lambda n: "quantizers.pool" in n),
        "the scale of 'quantizers.pool",
        BITS,
        False,
    ),
    "activation": (spoil_activation, "the activation of 'bn1'", None, False),
    "gradient": (spoil_gradient, "the loss is finite; .* the gradient of 'conv2.weight'", BITS, True),
    "loss": (spoil_loss, "the loss became inf; the first value that is not finite is the loss", None, True),
}


@pytest.mark.parametrize("what", SPOIL)
def test_what_diverged_is_named_with_layer_step_and_bits(what):
    spoil, named, bits, _ = SPOIL[what]
    trained = job("stop", spoil)
    said = rf"step 3: .*{named}" + (rf".* \({bits} bit\)" if bits else "")
    with pytest.raises(RunError, match=said):
        fit(trained)


@pytest.mark.parametrize("what", SPOIL)
def test_skip_leaves_one_step_out_or_says_that_it_cannot_help(what):
    spoil, named, _, passing = SPOIL[what]
    trained = job("skip", spoil, epochs=2 if passing else 9)
    if passing:
        fit(trained)
        assert [(f["step"], f["action"]) for f in trained.progress.incidents] == [(3, "skip")]
        assert all(torch.isfinite(p).all() for p in trained.model.parameters())
    else:
        with pytest.raises(RunError, match=rf"{named}.*does not help"):
            fit(trained)


@pytest.mark.parametrize("what", [name for name in SPOIL if name != "activation"])
def test_rollback_goes_back_to_sound_numbers_at_half_the_rate(what):
    spoil, _, bits, passing = SPOIL[what]
    trained = job("rollback", spoil)
    fit(trained)
    (incident,) = trained.progress.incidents
    assert (incident["step"], incident["action"], incident["lr_factor"]) == (3, "rollback", 0.5)
    assert incident["to_step"] == (2 if passing else 1)  # weights that are not finite are never saved
    assert incident["bits"] == bits
    assert all(torch.isfinite(p).all() for p in trained.model.parameters())


def test_rollback_ends_where_every_saved_state_overflows_again():
    trained = job("rollback", spoil_activation)
    trained.progress.every = 1
    with pytest.raises(RunError, match=r"the activation of 'bn1'.*3 times in vain"):
        fit(trained)
