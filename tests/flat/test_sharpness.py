"""Sharpness measures against the recorded values and exact Hessians."""

from __future__ import annotations

import pytest
import torch
from family_rules import fixed_noise
from flat_problem import Stateful, load, problem, same, stateful_batch, values
from torch import nn

from flatcompress.flat.measures import curvature, landscape, sharpness

RECORD = load("sharpness-mlp.json")
LOSS = problem.loss_fn


def _batches(m):
    x, y = problem.inputs(), problem.labels()
    return [(x[i : i + m], y[i : i + m]) for i in range(0, 40, m)]


@pytest.mark.parametrize(
    ("key", "m", "options"),
    [
        ("full_batch_rho0.05", 40, {"rho": 0.05}),
        ("full_batch_adaptive_rho0.5", 40, {"rho": 0.5, "adaptive": True}),
        ("full_batch_rho0.05_logitnorm", 40, {"rho": 0.05, "normalize_logits": True}),
        ("m8_rho0.05", 8, {"rho": 0.05}),
        ("m8_adaptive_rho0.5", 8, {"rho": 0.5, "adaptive": True}),
        ("m1_rho0.05", 1, {"rho": 0.05}),
    ],
)
def test_one_step_equals_the_record(key, m, options):
    found = sharpness.one_step(problem.build("mlp"), _batches(m), LOSS, **options)
    assert found == pytest.approx(RECORD["one_step"][key], rel=1e-9)
    again = sharpness.sharpness(problem.build("mlp"), _batches(m), LOSS, **options)
    assert again == found


@pytest.mark.parametrize("case", RECORD["apgd"]["cases"], ids=lambda c: f"{c['norm']}-{c['adaptive']}")
def test_worst_case_equals_the_published_attack(case):
    found = sharpness.worst_case(
        problem.build("mlp"), _batches(8), LOSS, case["rho"], norm=case["norm"], adaptive=case["adaptive"]
    )
    assert found == pytest.approx(case["sharpness_loss"], rel=case["rtol"])


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_worst_case_stays_in_its_ball_and_restarts_do_not_lower_it(norm, adaptive):
    model = problem.build("mlp")
    seen = []
    weights = [p.detach().clone() for p in model.parameters()]

    def loss(z, y):
        seen.append([p.detach() - w for p, w in zip(model.parameters(), weights)])
        return LOSS(z, y)

    one = sharpness.worst_case(model, _batches(40), loss, 0.05, norm=norm, adaptive=adaptive, steps=10)
    many = sharpness.worst_case(
        model, _batches(40), LOSS, 0.05, norm=norm, adaptive=adaptive, steps=10, restarts=3, random_start=True
    )
    c = [w.abs() if adaptive else torch.ones_like(w) for w in weights]
    for d in seen:
        scaled = torch.cat([(x / k).reshape(-1) for x, k in zip(d, c)])
        assert float(scaled.abs().max() if norm == "linf" else scaled.norm()) <= 0.05 * (1 + 1e-4)
    assert one > 0 and many > 0


def test_average_case_equals_the_record():
    record = RECORD["average_case"]
    for adaptive, key in ((False, "rho0.1"), (True, "adaptive_rho0.1")):
        found = sharpness.average_case(
            problem.build("mlp"), _batches(40), LOSS, 0.1, adaptive=adaptive, draws=4, noise=fixed_noise
        )
        assert found == pytest.approx(record[key], rel=1e-9)
    box = sharpness.average_case(problem.build("mlp"), _batches(40), LOSS, 0.1, norm="linf", draws=200, seed=1)
    again = sharpness.average_case(problem.build("mlp"), _batches(40), LOSS, 0.1, norm="linf", draws=200, seed=1)
    assert box == again and 0 < box < record["rho0.1"] * 3


def test_directional_and_layerwise_equal_the_record():
    record = RECORD["directional"]
    model = problem.build("mlp")
    assert sharpness.directional(model, _batches(8), LOSS) == pytest.approx(record["u_grad"], rel=1e-9)
    assert sharpness.directional(model, _batches(8), LOSS, "sign") == pytest.approx(record["u_sign_unit"], rel=1e-9)
    found = sharpness.layerwise(model, _batches(40), LOSS, 0.05)
    assert found == pytest.approx(record["layer_sharpness"], rel=1e-9)
    by_function = sharpness.layerwise(model, _batches(8), LOSS, 0.5, measure=sharpness.one_step, adaptive=True)
    assert sharpness.layerwise(model, _batches(8), LOSS, 0.5, adaptive=True) == pytest.approx(by_function, rel=1e-12)
    worst = sharpness.layerwise(model, _batches(40), LOSS, 0.01, measure="worst_case", steps=3)
    assert set(worst) == set(found) and min(worst.values()) > 0


def test_hessian_quantities_equal_the_exact_ones():
    record, model = RECORD["hessian"], problem.build("mlp")
    exact = record["eigenvalues_ascending"]
    assert curvature.top_eigenvalues(model, _batches(8), LOSS, 3, tolerance=0) == pytest.approx(exact[:-4:-1], rel=1e-9)
    quick = curvature.top_eigenvalues(model, _batches(8), LOSS)
    assert quick == pytest.approx(exact[:-2:-1], rel=1e-3)
    for name, top in record["block_top"].items():
        found = curvature.top_eigenvalues(
            model, _batches(40), LOSS, tolerance=0, perturbed=lambda n, p, name=name: n == name
        )
        assert found == pytest.approx([top], rel=1e-9)
    # Hutchinson: the standard deviation of one draw is below sqrt(2) ||H||_F = 2.27, so of 400 below 0.12.
    assert curvature.trace(model, _batches(40), LOSS, draws=400) == pytest.approx(record["trace"], abs=0.4)
    assert curvature.frobenius_squared(model, _batches(40), LOSS, draws=400) == pytest.approx(
        record["frobenius_sq"], rel=0.2
    )


def test_gauss_newton_product_equals_the_explicit_matrix():
    model = nn.Linear(3, 4).double()
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0])
    # A linear model has no curvature of its own: its Gauss-Newton matrix is its Hessian.
    ggn = curvature.top_eigenvalues(model, [(x, y)], LOSS, 3, matrix="ggn", tolerance=0)
    assert ggn == pytest.approx(curvature.top_eigenvalues(model, [(x, y)], LOSS, 3, tolerance=0), rel=1e-8)
    whole = curvature.top_eigenvalues(problem.build("mlp"), _batches(8), LOSS, 43, matrix="ggn", tolerance=0)
    assert min(whole) > -1e-9


def test_filter_normalised_direction_and_line_equal_the_record():
    record, model = RECORD["filter_norm"], problem.build("mlp")
    d = landscape.direction(model, noise=fixed_noise)
    for (name, _), found in zip(model.named_parameters(), d):
        torch.testing.assert_close(found, torch.tensor(record["direction"][name], dtype=torch.float64))
    found = landscape.line(model, _batches(8), LOSS, d, alphas=record["alphas"])
    assert found.loss == pytest.approx(record["loss"], rel=1e-9)


def test_landscapes_draw_a_picture(tmp_path):
    model = problem.build("mlp")
    curve = landscape.line(model, _batches(40), LOSS, points=5)
    square = landscape.plane(model, _batches(40), LOSS, points=3)
    assert not curve.plane and square.plane
    assert square.loss[1][1] == pytest.approx(RECORD["loss"]) and curve.loss[2] == pytest.approx(RECORD["loss"])
    for name, found in (("line", curve), ("plane", square)):
        image = landscape.picture(found, name)
        assert len(image.getcolors(1 << 20)) > 2
        assert landscape.save(found, tmp_path / f"{name}.png").stat().st_size > 500
    for kind in ("layer", "weight"):
        sizes = [float(d.norm()) for d in landscape.direction(model, normalization=kind)]
        assert sizes[1] == sizes[3] == 0 < min(sizes[0], sizes[2])


def test_measures_leave_the_model_as_it_was():
    torch.manual_seed(0)
    model = Stateful().train()
    model.bn.eval()
    before, grad = values(model), torch.ones_like(model.head.weight)
    model.head.weight.grad = grad
    sharpness.report(model, [stateful_batch(0)], nn.functional.cross_entropy, steps=2)
    sharpness.logit_space(model, [stateful_batch(0)], nn.functional.cross_entropy)
    assert same(values(model), before) and model.head.weight.grad is grad
    assert model.training and not model.bn.training and model.drop.training


def test_report_is_plain_data_with_every_measure():
    import json

    model = problem.build("mlp")
    found = sharpness.report(model, _batches(8), LOSS)
    json.dumps(found)
    assert found["loss"] == pytest.approx(RECORD["loss"])
    assert found["one_step"] == pytest.approx(RECORD["one_step"]["m8_rho0.05"], rel=1e-9)
    assert found["hessian_top"] == pytest.approx(RECORD["hessian"]["eigenvalues_ascending"][-1], rel=0.02)
    assert set(found["layers"]) == {n for n, _ in model.named_parameters()}
    assert found["worst_case"] > 0 and found["settings"]["samples"] == 40


def test_logit_space_rise_is_that_of_the_corner_for_a_single_logit_pair():
    """Cross entropy of two logits rises most where the margin shrinks most: at the corner of the box."""
    model = nn.Linear(1, 2, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[2.0], [-1.0]]))
    x, y = torch.ones(1, 1, dtype=torch.float64), torch.tensor([0])
    found = sharpness.logit_space(model, [(x, y)], LOSS, epsilon=0.1)
    z, before = torch.tensor([[2.0 - 0.3, -1.0 + 0.2]], dtype=torch.float64), LOSS(model(x), y).item()
    assert found == pytest.approx(100 * (LOSS(z, y).item() - before) / (1 + before), rel=1e-9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: sharpness.one_step(m, [], LOSS), "no batches"),
        (lambda m: sharpness.one_step(m, _batches(8), LOSS, -1.0), "rho is -1.0"),
        (lambda m: sharpness.worst_case(m, _batches(8), LOSS, norm="l1"), "'l1'"),
        (lambda m: sharpness.worst_case(m, _batches(8), LOSS, restarts=2), "random_start"),
        (lambda m: sharpness.sharpness(m, _batches(8), LOSS, measure="worst"), "worst_case"),
        (lambda m: sharpness.directional(m, _batches(8), LOSS, "up"), "'up'"),
        (lambda m: curvature.trace(m, _batches(8), LOSS, matrix="fisher"), "'fisher'"),
        (lambda m: sharpness.one_step(m, _batches(8), LOSS, perturbed=lambda n, p: False), "no parameter"),
        (lambda m: landscape.line(m, _batches(8), LOSS, points=1), "points >= 2"),
    ],
)
def test_bad_input_is_a_value_error(call, message):
    with pytest.raises(ValueError, match=message):
        call(problem.build("mlp"))
