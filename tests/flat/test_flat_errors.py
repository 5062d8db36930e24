"""Bad input is a ValueError that says what was found and what to do."""

from __future__ import annotations

import pytest
import torch
from flat_problem import adamw, closure_of, make, problem, same, sgd, values
from torch import nn

from flatcompress import flat


def test_low_precision_weights_are_refused_or_warned_about():
    model = nn.Linear(2, 2).bfloat16()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"bfloat16.*rounded away.*autocast"):
        flat.create("sam", model, base)
    with pytest.warns(UserWarning, match="rounded away"):
        optimizer = flat.create("sam", model, base, low_precision="warn")

    def closure():
        loss = model(torch.ones(1, 2, dtype=torch.bfloat16)).float().square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert torch.isfinite(model.weight).all()
    flat.create("none", model, base)


BAD = {
    "unknown method": (lambda m: flat.create("sagn", m, sgd(m)), r"unknown flat method 'sagn'.*'sagm'"),
    "unknown option": (lambda m: flat.create("sam", m, sgd(m), rhoo=1), r"unknown option.*'rhoo'.*'rho'"),
    "negative rho": (lambda m: flat.create("sam", m, sgd(m), rho=-0.1), r"rho is -0.1"),
    "nan rho": (lambda m: flat.create("sagm", m, sgd(m), rho=float("nan")), r"rho is nan"),
    "negative grad_rho": (lambda m: flat.create("gam", m, sgd(m), grad_rho=-1.0), r"grad_rho is -1.0"),
    "gamma of wsam": (lambda m: flat.create("wsam", m, sgd(m), gamma=1.0), r"gamma is 1.0"),
    "bad scope": (lambda m: flat.create("sam", m, sgd(m), scope="al"), r"norm scope 'al'"),
    "bad geometry": (lambda m: flat.create("sam", m, sgd(m), geometry="elementwis"), r"elementwise"),
    "bad perturb": (lambda m: flat.create("sam", m, sgd(m), perturb="sync"), r"perturb 'sync'.*synced"),
    "not an optimizer": (lambda m: flat.create("sam", m, torch.optim.SGD), r"give an optimizer instance"),
    "wrapped twice": (lambda m: flat.create("sam", m, flat.create("sam", m, sgd(m))), r"already"),
    "no momentum": (lambda m: flat.create("msam", m, sgd(m, momentum=0.0)), r"momentum"),
    "radius without a ball": (lambda m: flat.create("bsam", m, sgd(m), radius=lambda p: p), r"no single ball"),
    "interval": (lambda m: flat.create("sam", m, sgd(m), interval=0), r"interval is 0"),
    "clip": (lambda m: flat.create("sam", m, sgd(m), max_grad_norm=0.0), r"max_grad_norm is 0.0"),
    "lbfgs": (lambda m: flat.create("sam", m, torch.optim.LBFGS(m.parameters())), r"LBFGS"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_a_value_error_that_says_what_to_do(case):
    build, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        build(problem.build("mlp"))


def test_optimizer_without_parameters_is_refused():
    model = problem.build("mlp")
    base = sgd(model)
    base.param_groups[0]["params"] = []
    with pytest.raises(ValueError, match="no parameters"):
        flat.create("sam", model, base)
    frozen = problem.build("mlp").requires_grad_(False)
    with pytest.raises(ValueError, match="requires a gradient"):
        flat.create("sam", frozen, sgd(frozen)).step(lambda: torch.zeros(()))


def test_bad_closures_are_value_errors_that_say_what_to_do():
    model, optimizer = make("sam")
    loss = lambda: problem.loss_fn(model(problem.batch(0)[0]), problem.batch(0)[1])  # noqa: E731

    def returns_none():
        loss().backward()

    def zeroes_before():
        model.zero_grad()
        value = loss()
        value.backward()
        return value

    def zeroes_through_us():
        optimizer.zero_grad()
        return loss()

    def zeroes_after():
        value = loss()
        value.backward()
        model.zero_grad()
        return value

    before = values(model)
    for closure, message in [
        (returns_none, "returned None.*return loss"),
        (zeroes_before, "zeroed the gradients.*Remove"),
        (zeroes_through_us, "zeroed the gradients.*Remove"),
        (zeroes_after, "zeroed the gradients.*Remove"),
        (loss, "no gradient.*backward"),
        (lambda: "x", "returned a str"),
        (None, "needs a closure"),
        ([], "needs a closure"),
        ([3], "needs a closure"),
    ]:
        with pytest.raises(ValueError, match=message):
            optimizer.step(closure)
        assert same(values(model), before)
    with pytest.raises(ValueError, match="inside a closure"):
        optimizer.step(lambda: optimizer.state_dict())
    with pytest.raises(ValueError, match="scaler was given"):
        scaler = torch.amp.GradScaler("cpu")
        flat.create("sam", model, adamw(model), scaler=scaler).step(closure_of(model, *problem.batch(0)))
