"""The rows of `cheap`, `combined` and `multitask` against numbers worked out by hand and updates written out."""

from __future__ import annotations

import math

import pytest
import torch
from family_rules import STEPS, Hand, ball, norm, part, plus, times
from flat_problem import NULL, closure_of, problem, same, sgd, values
from torch import nn

from flatcompress import flat
from flatcompress.flat.methods import cheap, combined, multitask


class Bowl(nn.Module):
    """L = (w1^2 + 4 w2^2) / 2 at w = (3, 1): g0 = (3, 4), ||g0|| = 5."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([3.0, 1.0], dtype=torch.float64))

    def forward(self):
        return (self.w**2 * torch.tensor([0.5, 2.0])).sum()


def bowl_gradient(name, **hyper):
    """What the method hands to the base optimizer in one step on the bowl."""
    model = Bowl()
    optimizer = flat.create(name, model, torch.optim.SGD(model.parameters(), lr=0.0), **hyper)

    def closure():
        loss = model()
        loss.backward()
        return loss

    optimizer.step(closure)
    return model.w.grad, optimizer


def test_gradient_norm_penalty_by_hand():
    """e = (0.3, 0.4), g1 = (3.3, 5.6); alpha = 0.5: (3.15, 4.8)."""
    found, _ = bowl_gradient("gnp", rho=0.5, alpha=0.5)
    torch.testing.assert_close(found, torch.tensor([3.15, 4.8], dtype=torch.float64))


def test_stable_sam_by_hand():
    """g1 = (3.3, 5.6) of length 6.5 at length 5."""
    found, _ = bowl_gradient("stablesam", rho=0.5)
    torch.testing.assert_close(found, torch.tensor([3.3, 5.6], dtype=torch.float64) * 5 / 6.5)


def test_xsam_by_hand():
    """v0 = (0.6, 0.8), v1 = (33, 56) / 65, cos psi = 64.6 / 65. Near w the loss is largest at v(1) of three, further
    away it grows towards the steep axis."""
    v0, v1 = torch.tensor([0.6, 0.8]).double(), torch.tensor([33.0, 56.0]).double() / 65
    psi = math.acos(64.6 / 65)
    for a in (0.0, 0.5, 1.0, 2.0):
        expected = (math.sin((1 - a) * psi) * v0 + math.sin(a * psi) * v1) / math.sin(psi)
        torch.testing.assert_close(combined.on_arc([v0], [v1], a)[0], expected)
        assert float(expected.norm()) == pytest.approx(1.0)
    found, optimizer = bowl_gradient("xsam", rho=0.5, rho_m=0.5, points=3)
    assert optimizer.memory.values["alpha"] == 1.0
    torch.testing.assert_close(found, 6.5 * v1)
    found, optimizer = bowl_gradient("xsam", rho=0.5, rho_m=2.0, points=3)
    edge = (math.sin(-psi) * v0 + math.sin(2 * psi) * v1) / math.sin(psi)
    assert optimizer.memory.values["alpha"] == 2.0 and optimizer.passes == 5  # two and the three of the search
    torch.testing.assert_close(found, 6.5 * edge)


def test_interpolation_of_parallel_directions_is_their_mean():
    v = [torch.tensor([0.6, 0.8])]
    torch.testing.assert_close(combined.on_arc(v, v, 0.3)[0], v[0])


IDENTITIES = {
    "gnp alpha=1 is sam": (("gnp", {"alpha": 1.0}), ("sam", {})),
    "gnp is coupled wsam": (("gnp", {"alpha": 0.25}), ("wsam", {"gamma": 0.2, "decouple": False})),
    "xsam at alpha 1 is sam": (("xsam", {"alpha": 1.0}), ("sam", {})),
    "vsam that always samples is sam": (("vsam", {"warmup": 99}), ("sam", {})),
    "fmtl of one task is sam": (("fmtl", {}), ("sam", {})),
    "ksam of all samples is sam": (("ksam", {"top": 1.0}), ("sam", {})),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:ksam chooses")
@pytest.mark.parametrize("case", IDENTITIES)
def test_identity_between_methods(case):
    models = []
    for name, hyper in IDENTITIES[case]:
        model = problem.build("mlp_bn")
        optimizer = flat.create(name, model, sgd(model), **hyper)
        for t in range(STEPS):
            optimizer.step(closure_of(model, *problem.batch(t)))
        models.append(model)
    for a, b in zip(models[0].state_dict().values(), models[1].state_dict().values()):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def selective(model, x, y, seen):
    def closure(keep=None):
        rows = slice(None) if keep is None else keep
        losses = nn.functional.cross_entropy(model(x[rows]), y[rows], reduction="none")
        seen.append((len(losses), torch.is_grad_enabled()))
        if torch.is_grad_enabled():
            losses.mean().backward()
        return losses

    return closure


def test_ksam_equals_sam_on_the_hardest_samples():
    def rule(h, t):
        x, y = problem.batch(t)
        losses = nn.functional.cross_entropy(h.model(x), y, reduction="none").detach()
        rows = torch.sort(losses, descending=True).indices[:4]
        g0 = h.gradient(t, rows=rows)
        h.step(h.gradient(t, ball(g0), rows=rows))

    theirs = Hand("mlp", sgd).run(rule)
    model = problem.build("mlp")
    optimizer = flat.create("ksam", model, sgd(model), top=0.5)
    seen = []
    for t in range(STEPS):
        optimizer.step(selective(model, *problem.batch(t), seen))
        assert optimizer.last_gap > 0  # of the same samples at both points
    assert seen == [(8, False), (4, True), (4, True)] * STEPS and optimizer.passes == 2 * STEPS
    for a, b in zip(model.parameters(), theirs.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_ksam_without_losses_per_sample_says_that_it_is_sam():
    model = problem.build("mlp")
    with pytest.warns(UserWarning, match="no parameter `keep`"):
        flat.create("ksam", model, sgd(model)).step(closure_of(model, *problem.batch(0)))
    with pytest.raises(ValueError, match="returned one number"):
        flat.create("ksam", model, sgd(model)).step(lambda keep=None: torch.zeros(()))


def test_vsam_rate_by_hand():
    """Ratios 1, 1.5, 1.2 change by 0.5 and -0.2, on average 0.15; variances 2, 1 by -0.5."""
    sampling = cheap.Sampling(window=10, blocks=2, max_share=0.5, alpha_norm=0.02, alpha_var=0.1)
    assert sampling.next(4.0, [1.0, 1.5, 1.2], [2.0, 1.0]) == pytest.approx(4 * (1 + 0.003 - 0.05))
    assert sampling.next(4.9, [1.0, 100.0], [1.0, 100.0]) == 5.0  # half of the window at most
    assert sampling.next(1.0, [1.0, 0.0], [1.0, 0.0]) == 1.0  # and one at least
    assert sampling.variance([4.0, 1.0, 2.0, 8.0]) == pytest.approx((0.5 + 8.0) / 2)  # (1, 2) and (4, 8)
    assert sampling.variance([4.0, 1.0]) == 0.0


def test_vsam_reuses_its_part_and_lets_it_fade():
    """warmup 1, one sampled step in a window of 4, reuse 2: what each step hands on, written out."""
    model = problem.build("mlp")
    optimizer = flat.create("vsam", model, sgd(model), warmup=1, window=4, reuse=2, beta=0.5)
    hand, psf, age, sampled = Hand("mlp", sgd), None, 0, []
    hand.seen = False
    for t in range(9):
        before = optimizer.passes
        optimizer.step(closure_of(model, *problem.batch(t)))
        sampled.append(optimizer.passes - before == 2)
        g = g0 = hand.gradient(t)
        if sampled[-1]:
            g = hand.gradient(t, ball(g0))
            psf, age = plus(g, g0, -1.0), 0
        else:
            age += 1
            g = plus(g0, times(0.5**age, psf)) if age <= 2 else g0
        hand.step(g)
        for a, b in zip(model.parameters(), hand.model.parameters()):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    assert sampled[0] and sum(sampled[1:5]) == 1 and sum(sampled[5:9]) == 1


def two_tasks(t):
    x, y = problem.batch(t)
    return (x[:4], y[:4]), (x[4:], y[4:])


@pytest.mark.parametrize("aggregate", ["mean", "pcgrad"])
def test_fmtl_equals_its_two_aggregations(aggregate):
    def rule(h, t):
        rows = (slice(0, 4), slice(4, 8))
        g = [h.gradient(t, rows=r) for r in rows]
        rises = [plus(h.gradient(t, ball(gi), rows=r), gi, -1.0) for gi, r in zip(g, rows)]
        h.step(plus(together(*g), together(*rises)))

    def together(a, b):
        against = sum((x * y).sum() for x, y in zip(a, b))
        if aggregate == "pcgrad" and against < 0:
            a, b = part(a, b), part(b, a)
        return times(0.5, plus(a, b))

    theirs = Hand("mlp", sgd).run(rule)
    model = problem.build("mlp")
    optimizer = flat.create("fmtl", model, sgd(model), aggregate=aggregate)
    for t in range(STEPS):
        closures = [closure_of(model, x, y) for x, y in two_tasks(t)]
        loss = optimizer.step(closures)
        assert loss.isfinite()
    assert optimizer.passes == 2 * STEPS
    for a, b in zip(model.parameters(), theirs.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_fmtl_heads_move_by_their_own_task_alone():
    torch.manual_seed(0)
    model = nn.ModuleDict({"trunk": nn.Linear(3, 3), "a": nn.Linear(3, 1), "b": nn.Linear(3, 1)}).double()
    optimizer = flat.create("fmtl", model, torch.optim.SGD(model.parameters(), lr=0.0), rho=0.1)
    x = torch.randn(6, 3).double()

    def task(head, sign):
        def closure():
            loss = (sign * model[head](model["trunk"](x))).exp().mean()
            loss.backward()
            return loss

        return closure

    loss = optimizer.step([task("a", 1.0), task("b", -1.0)])
    with torch.no_grad():
        both = [float((s * model[h](model["trunk"](x))).exp().mean()) for h, s in (("a", 1.0), ("b", -1.0))]
    assert float(loss) == pytest.approx(sum(both) / 2)
    alone = {}
    for head, sign in (("a", 1.0), ("b", -1.0)):
        sam = flat.create("sam", model, torch.optim.SGD(model.parameters(), lr=0.0), rho=0.1)
        model_grads = {n: p.grad for n, p in model.named_parameters()}
        sam.step(task(head, sign))
        alone[head] = model[head].weight.grad
        for n, p in model.named_parameters():
            p.grad = model_grads[n]
    for head in "ab":
        torch.testing.assert_close(model[head].weight.grad, alone[head] / 2)


def test_pcgrad_by_hand():
    """a = (1, 0), b = (-1, 1): a - proj_b a = (0.5, 0.5), b - proj_a b = (0, 1); their mean."""
    a, b = [torch.tensor([1.0, 0.0])], [torch.tensor([-1.0, 1.0])]
    torch.testing.assert_close(multitask.pcgrad([a, b])[0], torch.tensor([0.25, 0.75]))
    torch.testing.assert_close(multitask.pcgrad([a, a])[0], a[0])


def mean_output(model, x):
    def closure():
        out = model(x).mean()
        out.backward()
        return out

    return closure


def test_ignite_constrains_the_gradient_norm_of_the_output():
    model = problem.build("mlp")
    optimizer = flat.create("ignite", model, sgd(model), rho=0.2, r=0.1, epsilon=0.01, eta_lambda=0.5, lam=0.3)
    hand, lam = Hand("mlp", sgd), 0.3
    hand.seen = False
    for t in range(STEPS):
        x, y = problem.batch(t)
        optimizer.step(closure_of(model, x, y), mean_output(model, x))
        g, params = hand.gradient(t), hand.params
        a0 = torch.autograd.grad(hand.model(x).mean(), params)
        e = times(0.1 / norm(a0), a0)
        there = {n: p.detach() + d for (n, p), d in zip(hand.model.named_parameters(), e)}
        leaves = {n: p.requires_grad_() for n, p in there.items()}
        a1 = torch.autograd.grad(torch.func.functional_call(hand.model, leaves, (x,)).mean(), list(leaves.values()))
        hand.step(plus(g, plus(a1, a0, -1.0), lam * 0.2 / 0.1))
        lam = max(0.0, lam + 0.5 * (0.2 * float(norm(a0)) - 0.01))
        assert optimizer.memory.values["lam"] == pytest.approx(lam)
    for a, b in zip(model.parameters(), hand.model.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_ignite_with_a_bound_that_holds_is_the_base_bit_for_bit():
    model, plain = problem.build("mlp_bn"), problem.build("mlp_bn")
    optimizer = flat.create("ignite", model, sgd(model), epsilon=1e6)
    base = sgd(plain)
    for t in range(3):
        x, y = problem.batch(t)
        optimizer.step(closure_of(model, x, y), mean_output(model, x))
        base.zero_grad()
        closure_of(plain, x, y)()
        base.step()
    assert same(values(model), values(plain))


def test_unlearning_perturbs_the_forgotten_loss_alone_by_hand():
    """Forgotten: the bowl, whose SAM gradient is (3.3, 5.6) at rho 0.5; retained: w1 + 2 w2, weighed by 2."""
    model = Bowl()
    optimizer = flat.create("unlearn", model, torch.optim.SGD(model.parameters(), lr=0.0), rho=0.5, lam=2.0)

    def closure_for(loss):
        def run():
            value = loss()
            value.backward()
            return value

        return run

    optimizer.step(closure_for(model), closure_for(lambda: model.w[0] + 2 * model.w[1]))
    torch.testing.assert_close(model.w.grad, torch.tensor([5.3, 9.6], dtype=torch.float64))
    assert optimizer.passes == 3


def test_unlearning_without_a_radius_is_the_base_bit_for_bit():
    model, plain = problem.build("mlp"), problem.build("mlp")
    optimizer, base = flat.create("unlearn", model, sgd(model), rho=0.0), sgd(plain)
    for t in range(3):
        (x, y), (other, label) = problem.batch(t), problem.batch(t + 10)
        optimizer.step(closure_of(model, x, y), closure_of(model, other, label))
        base.zero_grad()
        closure_of(plain, x, y)()
        closure_of(plain, other, label)()
        base.step()
    assert same(values(model), values(plain))


def test_npo_by_hand():
    # beta 1, losses 1 and 0 against references 0 and 0: log sigmoid(1) = -0.313262, log sigmoid(0) = -0.693147
    found = flat.terms.npo(torch.tensor([1.0, 0.0]), torch.zeros(2), beta=1.0)
    torch.testing.assert_close(found, torch.tensor(0.313262 + 0.693147), rtol=1e-5, atol=0.0)
    assert flat.terms.npo(torch.tensor([9.0]), torch.zeros(1)) < flat.terms.npo(torch.tensor([1.0]), torch.zeros(1))
    with pytest.raises(ValueError, match="beta"):
        flat.terms.npo(torch.ones(1), torch.ones(1), beta=0.0)


BAD = {
    "ksam": {"top": 0.0}, "vsam": {"window": 0}, "xsam": {"points": 1}, "fmtl": {"aggregate": "pcgrd"},
    "ignite": {"r": 0.0},
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_values_that_cannot_work_are_refused(name):
    model = problem.build("mlp")
    with pytest.raises(ValueError, match=next(iter(BAD[name]))):
        flat.create(name, model, sgd(model), **BAD[name])


def test_every_row_here_has_a_neutral_setting_that_is_tested():
    assert {"gnp", "stablesam", "xsam", "ksam", "vsam", "fmtl"} <= set(NULL)
