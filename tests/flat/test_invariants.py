"""Properties that hold for every method of the registry."""

from __future__ import annotations

import copy
import gc
import itertools
import math

import pytest
import torch
from flat_problem import LIVELY, NAMES, NULL, adamw, closure_of, halves, make, problem, same, sgd, train, values
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from flatcompress import flat

ONE_BALL = ["sam", "asam", "fisher_sam", "gsam", "wsam", "looksam", "friendlysam"]


@pytest.mark.parametrize("base", [sgd, adamw])
@pytest.mark.parametrize("name", NULL)
def test_rho_zero_equals_base_optimizer_bit_for_bit(name, base):
    model, optimizer = make(name, base=base, **NULL[name])
    plain = problem.build("mlp_bn")
    reference = base(plain)
    for t in range(4):
        optimizer.step(closure_of(model, *problem.batch(t)))
        reference.zero_grad()
        closure_of(plain, *problem.batch(t))()
        reference.step()
        if name == "msam" and base is adamw:  # it decays after the update, torch before: equal in exact arithmetic only
            continue
        assert same(values(model), values(plain))


def test_gam_at_radius_zero_is_the_base_with_the_gradient_doubled():
    model, optimizer = make("gam", grad_rho=0.0, grad_norm_rho=0.0)
    plain = problem.build("mlp_bn")
    reference = sgd(plain)
    for t in range(3):
        optimizer.step(closure_of(model, *problem.batch(t)))
        reference.zero_grad()
        closure_of(plain, *problem.batch(t), loss=lambda z, y: 2 * problem.loss_fn(z, y))()
        reference.step()
        assert same(values(model), values(plain))


@pytest.mark.parametrize("name", NAMES)
def test_weights_return_bit_identical_when_the_learning_rate_is_zero(name):
    model, optimizer = make(name, base=lambda m: sgd(m, lr=0.0))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    pointers = [p.data_ptr() for p in model.parameters()]
    train(model, optimizer, range(4))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert pointers == [p.data_ptr() for p in model.parameters()]


@pytest.mark.parametrize("name", NAMES)
def test_every_method_moves_the_weights_and_lowers_the_loss(name):
    model, optimizer = make(name, base=lambda m: sgd(m, lr=0.05))
    with torch.no_grad():
        first = float(problem.loss_fn(model(problem.inputs()), problem.labels()))
    train(model, optimizer, list(range(5)) * 6)
    with torch.no_grad():
        assert float(problem.loss_fn(model(problem.inputs()), problem.labels())) < first


@pytest.mark.parametrize("name", [n for n in ONE_BALL if n != "fisher_sam"])  # its geometry is the gradient's
@given(rho=st.floats(1e-4, 2.0))
@settings(max_examples=8, deadline=None)
def test_l2_perturbation_has_length_rho_in_its_geometry(name, rho):
    model, optimizer = make(name, kind="mlp", rho=rho)
    point = {}

    def closure():
        point.update({n: p.detach().clone() for n, p in model.named_parameters()})
        return closure_of(model, *problem.batch(0))()

    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer.step(closure)
    e = {n: point[n] - start[n] for n in point}
    geometry = {n: start[n].abs() + 0.01 if name == "asam" and "weight" in n else torch.ones_like(e[n]) for n in e}
    length = math.sqrt(sum(float(((e[n] / geometry[n]) ** 2).sum()) for n in e))
    assert length == pytest.approx(rho, rel=1e-8)


@pytest.mark.parametrize("geometry", ["plain", "elementwise", "layerwise"])
def test_linf_perturbation_has_largest_entry_rho_in_its_geometry(geometry):
    model, optimizer = make("sam", kind="mlp", rho=0.1, p="inf", geometry=geometry, eta=0.01)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    points = []

    def closure():
        points.append({n: p.detach().clone() for n, p in model.named_parameters()})
        return closure_of(model, *problem.batch(0))()

    optimizer.step(closure)
    for n, w in start.items():
        t = torch.ones_like(w)
        if geometry == "elementwise" and "weight" in n:
            t = w.abs() + 0.01
        elif geometry == "layerwise" and "weight" in n:
            t = w.norm() * 1.01 * t
        torch.testing.assert_close(((points[1][n] - w) / t).abs(), torch.full_like(w, 0.1), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", [n for n in ONE_BALL if n != "fisher_sam"])
def test_perturbation_does_not_depend_on_the_scale_of_the_loss(name):
    shifts = []
    for factor in (1.0, 1024.0):
        model, optimizer = make(name, kind="mlp", base=lambda m: sgd(m, lr=0.0))
        seen = []

        def closure(model=model, factor=factor, seen=seen):
            seen.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
            loss = problem.loss_fn(model(problem.batch(0)[0]), problem.batch(0)[1]) * factor
            loss.backward()
            return loss

        optimizer.step(closure)
        shifts.append(seen[1] - seen[0])
    torch.testing.assert_close(shifts[0], shifts[1], rtol=1e-9, atol=1e-12)


def test_asam_perturbation_scales_with_the_weights():
    """w -> c w of one tensor of a scale-invariant net leaves e / w as it was (eta = 0)."""
    shifts = []
    for c in (1.0, 4.0):
        model = problem.build("mlp_bn")
        with torch.no_grad():
            model.fc1.weight.mul_(c)
            model.fc1.bias.mul_(c)
        model.bn1.eps = 1e-30
        optimizer = flat.create("asam", model, sgd(model, lr=0.0), eta=0.0, perturbed=lambda n, p: n == "fc1.weight")
        seen = []

        def closure(model=model, seen=seen):
            seen.append(model.fc1.weight.detach().clone())
            return closure_of(model, *problem.batch(0))()

        optimizer.step(closure)
        shifts.append(seen[1] - seen[0])
    torch.testing.assert_close(shifts[0] * 4.0, shifts[1], rtol=1e-8, atol=1e-12)


def _trajectory(name, steps=5, kind="mlp_bn", base=sgd, micro=False, **hyper):
    model = problem.build(kind)
    optimizer = flat.create(name, model, base(model), **hyper)
    for t in range(steps):
        x, y = problem.batch(t)
        closure = closure_of(model, x, y)
        optimizer.step([closure] if micro else closure)
    return model, optimizer


IDENTITIES = {
    "gsam alpha=0 is sam": (("gsam", {"alpha": 0.0}), ("sam", {})),
    "wsam coupled gamma=.5 is sam": (("wsam", {"gamma": 0.5, "decouple": False}), ("sam", {})),
    "wsam gamma=0 is the base": (("wsam", {"gamma": 0.0}), ("none", {})),
    "looksam k=1 is sam": (("looksam", {"k": 1, "rho": 0.05}), ("sam", {})),
    "friendlysam sigma=0 is sam": (("friendlysam", {"sigma": 0.0, "rho": 0.05}), ("sam", {})),
    "mask of ones is sam": (("ssam", {"sparsity": 0.0, "tiny": 1e-12}), ("sam", {})),
    "esam beta=gamma=1 is sam": (("esam", {"beta": 1.0, "gamma": 1.0, "tiny": 1e-12}), ("sam", {})),
    "fisher eta=0 is sam": (("fisher_sam", {"eta": 0.0}), ("sam", {})),
    "rsam sigma=0 is sam": (("rsam", {"sigma": 0.0}), ("sam", {})),
    "asam plain geometry is sam": (("asam", {"rho": 0.05, "geometry": "plain", "tiny": 1e-12}), ("sam", {})),
    "interval=1 is sam": (("sam", {"interval": 1}), ("sam", {})),
    "bernoulli=1 is sam": (("sam", {"bernoulli": 1.0}), ("sam", {})),
    "bernoulli=0 is the base": (("sam", {"bernoulli": 0.0}), ("none", {})),
    "adaptive flag is the absolute geometry": (("sam", {"adaptive": True}), ("sam", {"geometry": "absolute"})),
}  # fmt: skip


@pytest.mark.parametrize("case", IDENTITIES)
def test_identity_between_methods(case):
    (left, a), (right, b) = IDENTITIES[case]
    one, _ = _trajectory(left, **a)
    two, _ = _trajectory(right, **b)
    for x, y in zip(one.state_dict().values(), two.state_dict().values()):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-13)


def test_sagm_alpha_zero_is_the_mean_of_the_two_gradients():
    model, optimizer = make("sagm", kind="mlp", alpha=0.0)
    optimizer.step(closure_of(model, *problem.batch(0)))
    sam = problem.build("mlp")
    other = flat.create("sam", sam, sgd(sam))
    other.step(closure_of(sam, *problem.batch(0)))
    plain = problem.build("mlp")
    closure_of(plain, *problem.batch(0))()
    for g, g1, g0 in zip(model.parameters(), sam.parameters(), plain.parameters()):
        torch.testing.assert_close(g.grad, (g0.grad + g1.grad) / 2)


@pytest.mark.parametrize("name", NAMES)
def test_one_micro_batch_is_the_whole_batch(name):
    one, _ = _trajectory(name, **LIVELY.get(name, {}))
    two, _ = _trajectory(name, micro=True, **LIVELY.get(name, {}))
    assert same(values(one), values(two))


@pytest.mark.parametrize(("interval", "expected"), [(1, 12), (2, 9), (3, 8)])
def test_interval_k_makes_one_step_in_k_a_double_one(interval, expected):
    calls = itertools.count()
    model, optimizer = make("sam", interval=interval)
    for t in range(6):
        inner = closure_of(model, *problem.batch(t))
        optimizer.step(lambda inner=inner: (next(calls), inner())[1])
    assert optimizer.passes == next(calls) == expected


def test_interval_does_its_extra_work_at_the_end_of_each_interval():
    model, optimizer = make("sam", interval=3)
    counts = []
    for t in range(6):
        before = optimizer.passes
        optimizer.step(closure_of(model, *problem.batch(t)))
        counts.append(optimizer.passes - before)
    assert counts == [1, 1, 2, 1, 1, 2]


@pytest.mark.parametrize(
    ("name", "passes"),
    [("none", 1), ("sam", 2), ("gam", 4), ("msam", 1), ("dpsat", 1), ("ggpo", 1), ("rsam", 2), ("bsam", 2)],
)
def test_passes_per_step(name, passes):
    model, optimizer = make(name)
    train(model, optimizer, range(3))
    assert optimizer.passes == 3 * passes


@pytest.mark.parametrize("name", NAMES)
def test_a_step_leaves_nothing_to_the_garbage_collector(name):
    """Else its batch and its gradients stay in memory until that comes by, among what the next steps allocate."""
    model, optimizer = make(name)
    train(model, optimizer, range(3))
    gc.collect()
    gc.disable()
    try:
        train(model, optimizer, range(3, 6))
        assert gc.collect() == 0
    finally:
        gc.enable()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("base", [sgd, adamw])
def test_resume_at_any_step_equals_the_undisturbed_run(name, base):
    straight, optimizer = make(name, base=base)
    saved = []
    for t in range(5):
        saved.append((values(straight), copy.deepcopy(optimizer.state_dict())))
        optimizer.step(closure_of(straight, *problem.batch(t)))
    for start, (weights, state) in enumerate(saved):
        model, resumed = make(name, base=base)
        model.load_state_dict(weights)
        resumed.load_state_dict(state)
        train(model, resumed, range(start, 5))
        assert same(values(model), values(straight)), f"differs after a resume at step {start}"
        assert resumed.passes == optimizer.passes


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_gives_the_same_bits_and_state_survives_the_disk(name, tmp_path):
    runs = []
    for _ in range(2):
        model, optimizer = make(name, seed=3)
        train(model, optimizer, range(3))
        torch.save(optimizer.state_dict(), tmp_path / "state.pt")
        runs.append(values(model))
        optimizer.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert same(*runs)


@pytest.mark.parametrize("name", NAMES)
def test_exception_in_any_later_pass_leaves_model_and_buffers_untouched(name):
    model, optimizer = make(name)
    train(model, optimizer, range(2))
    before, state = values(model), copy.deepcopy(optimizer.state_dict())
    inner, calls = closure_of(model, *problem.batch(2)), itertools.count()

    def failing():
        if next(calls) == 1:
            model(problem.inputs())  # moves running statistics before it fails
            raise RuntimeError("out of memory")
        return inner()

    try:
        optimizer.step(failing)
    except RuntimeError:
        assert same(values(model), before)
        again, other = make(name)
        again.load_state_dict(before)
        other.load_state_dict(state)
        for m, o in ((model, optimizer), (again, other)):
            train(m, o, range(2, 5))
        assert same(values(model), values(again))
    else:
        assert next(calls) == 1, "the second call failed but step() did not"


def test_zero_gradient_gives_zero_perturbation_and_no_nan():
    for name in NAMES:
        model = nn.Linear(2, 2)
        optimizer = flat.create(name, model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))

        def closure(model=model):
            loss = (model(torch.ones(1, 2)) * 0.0).sum()
            loss.backward()
            return loss

        for _ in range(3):
            optimizer.step(closure)
        assert all(torch.isfinite(p).all() for p in model.parameters()), name


def test_joint_chunks_equal_the_whole_batch():
    """One perturbation from all micro-batches is SAM on the batch (a net without batch statistics)."""
    one, whole = make("sam", kind="mlp")
    two, joint = make("sam", kind="mlp", chunks="joint")
    for t in range(4):
        whole.step(closure_of(one, *problem.batch(t)))
        joint.step(halves(two, t))
    for x, y in zip(one.parameters(), two.parameters()):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-14)
    assert joint.passes == whole.passes == 8
