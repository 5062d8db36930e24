"""Agreement with recorded trajectories of published implementations."""

from __future__ import annotations

import pytest
import torch
from flat_problem import closure_of, compare, halves, load, problem

from flatcompress import flat

CASES = {
    "davda54-sam-plain-sgd-mlp.json": ("sam", {"rho": 0.05}),
    "davda54-sam-plain-adamw-mlp_bn.json": ("sam", {"rho": 0.05}),
    "samsung-asam-eta0p01-sgd-mlp.json": ("asam", {"rho": 0.5, "eta": 0.01}),
    "gsam-plain-sgd-mlp.json": ("gsam", {"rho": 0.05, "alpha": 0.4}),
    "sagm-alpha0p001-sgd-mlp_bn.json": ("sagm", {"rho": 0.05, "alpha": 0.001}),
    "msam-microbatch2-sgd-mlp.json": ("sam", {"rho": 0.05}),
    "davda54-sam-groups-sgd-mlp.json": ("sam", {}),
}


def _base(record: dict, model: torch.nn.Module) -> torch.optim.Optimizer:
    options = dict(record["base_optimizer"])
    kind = getattr(torch.optim, options.pop("name"))
    params = model.parameters()
    if "groups" in record["hyper"]:
        layers = dict(model.named_children())
        params = [
            {"params": layers[g["params"].split(".")[0]].parameters(), "rho": g["rho"], "adaptive": g["adaptive"]}
            for g in record["hyper"]["groups"]
        ]
    return kind(params, **{k: tuple(v) if isinstance(v, list) else v for k, v in options.items()})


@pytest.mark.parametrize("file", CASES)
def test_trajectory_equals_the_published_implementation(file):
    record = load(file)
    name, hyper = CASES[file]
    model = problem.build(record["problem"])
    optimizer = flat.create(name, model, _base(record, model), **hyper)
    atol = 1e-7 if "1e-7" in record.get("note", "") else 1e-9
    for step in record["steps"]:
        t = step["batch"]
        many = "micro_batches" in record["hyper"]
        loss = optimizer.step(halves(model, t) if many else closure_of(model, *problem.batch(t)))
        compare(model, step["after"], record["rtol"], atol)
        if "passes" in step:
            assert float(loss) == pytest.approx(step["passes"][0]["loss"], rel=1e-9)
            assert optimizer.last_gap == pytest.approx(step["passes"][1]["loss"] - step["passes"][0]["loss"], rel=1e-5)


def test_perturbation_equals_the_published_one():
    """The point of the second pass is compared apart from the update."""
    record = load("samsung-asam-eta0p01-sgd-mlp.json")
    model = problem.build("mlp")
    optimizer = flat.create("asam", model, _base(record, model), rho=0.5, eta=0.01)
    seen = []

    def closure():
        seen.append({n: p.detach().clone() for n, p in model.named_parameters()})
        return closure_of(model, *problem.batch(0))()

    optimizer.step(closure)
    for name, value in record["steps"][0]["passes"][1]["at"].items():
        torch.testing.assert_close(seen[1][name], torch.tensor(value, dtype=torch.float64), rtol=1e-9, atol=1e-12)
