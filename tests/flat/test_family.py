"""Each method against its equations written out with two hand-made passes, on both problems and both optimizers."""

from __future__ import annotations

import math

import pytest
import torch
from family_rules import (
    STEPS,
    Hand,
    bsam,
    dpsat,
    dpsat_step,
    fisher,
    fixed_noise,
    friendly,
    gam,
    gsam,
    gsam_absolute,
    looksam_all,
    looksam_each,
    lpf,
    masked,
    momentum_adamw,
    momentum_sgd,
    norm,
    part,
    plus,
    rsam,
    samon,
    times,
    wsam_coupled,
    wsam_decoupled,
)
from flat_problem import adamw, closure_of, problem, sgd, values
from torch import nn

from flatcompress import flat
from flatcompress.flat.engine.context import normal


def fixed_masks(model):
    return {n: problem.fixed_mask(n, p) for n, p in model.named_parameters()}


RULES = {
    "gsam": (gsam, "gsam", {}),
    "gsam absolute": (gsam_absolute, "gsam", {"rho": 0.3, "adaptive": True}),
    "gam": (gam, "gam", {}),
    "wsam coupled": (wsam_coupled, "wsam", {"decouple": False}),
    "wsam decoupled": (wsam_decoupled, "wsam", {}),
    "looksam all": (looksam_all, "looksam", {"k": 2}),
    "looksam per tensor": (looksam_each, "looksam", {"k": 2, "scope": "per_tensor"}),
    "friendlysam": (friendly, "friendlysam", {}),
    "fisher_sam": (fisher, "fisher_sam", {}),
    "ssam fixed mask": (masked, "ssam", {"mask": fixed_masks}),
    "dpsat": (dpsat, "dpsat", {}),
    "dpsat step": (dpsat_step, "dpsat", {"direction": "step"}),
    "dpsat momentum": (dpsat_step, "dpsat", {"direction": "momentum"}),
    "lpf_sgd": (lpf, "lpf_sgd", {"std": 0.05, "samples": 2, "noise": fixed_noise}),
    "rsam": (rsam, "rsam", {"noise": fixed_noise}),
    "bsam": (bsam, "bsam", {"num_data": 40, "noise": fixed_noise}),
}  # fmt: skip


def _ours(name, kind, base, hyper):
    model = problem.build(kind)
    hyper = {k: v(model) if v is fixed_masks else v for k, v in hyper.items()}
    optimizer = flat.create(name, model, base(model), **hyper)
    for t in range(STEPS):
        optimizer.step(closure_of(model, *problem.batch(t)))
    return values(model)


def _agree(rule, name, kind, base, hyper):
    theirs = Hand(kind, base).run(rule)
    ours = _ours(name, kind, base, hyper)
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(
            ours[key], value, rtol=1e-9, atol=1e-7 if base is adamw else 1e-11, msg=lambda m, k=key: k + m
        )


@pytest.mark.parametrize("base", [sgd, adamw])
@pytest.mark.parametrize("kind", ["mlp", "mlp_bn"])
@pytest.mark.parametrize("case", RULES)
def test_update_equals_its_equations(case, kind, base):
    rule, name, hyper = RULES[case]
    _agree(rule, name, kind, base, hyper)


def test_samon_perturbs_what_the_module_type_says():
    _agree(samon, "samon", "mlp_bn", sgd, {})


def test_momentum_sam_with_each_base():
    _agree(momentum_sgd, "msam", "mlp_bn", sgd, {"rho": 0.3})
    _agree(momentum_sgd, "msam", "mlp", sgd, {})
    _agree(momentum_adamw, "msam", "mlp", adamw, {})


def test_norm_layers_are_found_by_type_not_by_name():
    class CustomRMSNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(4))

    model = nn.ModuleDict({"ln_1": nn.LayerNorm(4), "normalize_head": nn.Linear(4, 4), "rms": CustomRMSNorm()})
    found = flat.masked.norm_parameters(model)
    assert found == {id(p) for key in ("ln_1", "rms") for p in model[key].parameters()}
    with pytest.warns(UserWarning, match="nothing is perturbed"):
        flat.create("samon", model["normalize_head"], torch.optim.SGD(model["normalize_head"].parameters(), lr=0.1))


def test_esam_keeps_the_sharpest_samples():
    """Strictly above the int(gamma n)-th largest rise: one fewer; on ties at least one remains."""
    rise = torch.tensor([0.1, 0.5, 0.3, 0.2, 0.9, 0.0, 0.4, 0.6])
    assert flat.masked.sharpest(rise, 0.5).tolist() == [1, 4, 7]
    assert flat.masked.sharpest(torch.zeros(4), 0.5).tolist() == [0, 1, 2, 3]


def test_esam_with_a_selective_closure_equals_its_equations():
    def rule(h, t):
        x, y = problem.batch(t)
        losses = lambda: nn.functional.cross_entropy(h.model(x), y, reduction="none").detach()  # noqa: E731
        g0 = h.gradient(t)
        before = losses()
        e = times(0.05 / (norm(g0) + 1e-7), g0)
        with torch.no_grad():
            for p, d in zip(h.params, e):
                p.add_(d)
            rise = losses() - before
            for p, d in zip(h.params, e):
                p.sub_(d)
        h.step(h.gradient(t, e, rows=rise > torch.topk(rise, 4).values[-1]))

    theirs = Hand("mlp", sgd).run(rule)
    model = problem.build("mlp")
    optimizer = flat.create("esam", model, sgd(model), beta=1.0, gamma=0.5)
    forwards = []
    for t in range(STEPS):
        x, y = problem.batch(t)

        def closure(keep=None, x=x, y=y):
            rows = slice(None) if keep is None else keep
            losses = nn.functional.cross_entropy(model(x[rows]), y[rows], reduction="none")
            forwards.append(len(losses))
            if torch.is_grad_enabled():
                losses.mean().backward()
            return losses

        optimizer.step(closure)
    assert forwards == [8, 8, 3] * STEPS and optimizer.passes == 2 * STEPS
    for a, b in zip(model.parameters(), theirs.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_esam_perturbs_each_tensor_with_its_probability():
    model = problem.build("mlp")
    optimizer = flat.create("esam", model, sgd(model, lr=0.0), beta=0.5, gamma=1.0)
    moved = []
    for t in range(40):
        points = []

        def closure(points=points, t=t):
            points.append(values(model))
            return closure_of(model, *problem.batch(t % 5))()

        optimizer.step(closure)
        moved.append([not torch.equal(points[0][n], points[1][n]) for n in points[0]])
    assert all(moved[0])
    share = sum(map(sum, moved[1:])) / sum(map(len, moved[1:]))
    assert 0.35 < share < 0.65


@pytest.mark.parametrize("mask", ["fisher", "dynamic"])
def test_sparse_sam_masks_have_their_share_and_refresh_on_schedule(mask):
    model = problem.build("mlp")
    optimizer = flat.create("ssam", model, sgd(model), sparsity=0.75, mask=mask, every=2, drop=0.5)
    total = sum(p.numel() for p in model.parameters())
    kept = []
    for t in range(4):
        optimizer.step(closure_of(model, *problem.batch(t)))
        kept.append(torch.cat([m.reshape(-1) for m in optimizer.memory.slots["mask"].values()]).clone())
        assert int(kept[-1].sum()) == round(0.25 * total)
    assert torch.equal(kept[0], kept[1]) and torch.equal(kept[2], kept[3]) and not torch.equal(kept[1], kept[2])


def test_fisher_scores_are_sums_of_squared_sample_gradients():
    model = problem.build("mlp")
    x, y = problem.batch(0)
    scores = flat.masked.fisher(model, [(x, y)], problem.loss_fn)(list(model.parameters()))
    expected = [torch.zeros_like(p) for p in model.parameters()]
    for i in range(8):
        grads = torch.autograd.grad(problem.loss_fn(model(x[i : i + 1]), y[i : i + 1]), list(model.parameters()))
        expected = [e + g * g for e, g in zip(expected, grads)]
    for a, b in zip(scores, expected):
        torch.testing.assert_close(a, b)
    optimizer = flat.create("ssam", model, sgd(model), scores=lambda p: scores)
    optimizer.step(closure_of(model, x, y))
    masks = optimizer.memory.slots["mask"]
    assert masks[0].flatten()[scores[0].flatten().argmax()]


def test_tram_radius_is_the_divergence_from_the_previous_model():
    model = problem.build("mlp")
    optimizer = flat.create("tram", model, sgd(model), target="previous", scale=10.0)
    assert optimizer.step(closure_of(model, *problem.batch(0))).isfinite()
    assert optimizer.last_radius == 0.0
    x, y = problem.batch(1)
    with torch.no_grad():
        now = model(x).log_softmax(-1)
        held = {n: optimizer.memory.slots["target"][j] for j, (n, _) in enumerate(model.named_parameters())}
        old = torch.func.functional_call(model, held, (x,)).log_softmax(-1)
        expected = 10.0 * float((old.exp() * (old - now)).sum(-1).mean())
    optimizer.step(closure_of(model, x, y))
    assert optimizer.last_radius == pytest.approx(expected, rel=1e-9)
    fixed = flat.create("tram", model, sgd(model), distance=lambda: 0.3)
    fixed.step(closure_of(model, x, y))
    assert fixed.last_radius == pytest.approx(0.3)


class Lora(nn.Module):
    """A layer with the attribute names of peft."""

    def __init__(self):
        super().__init__()
        self.base_layer = nn.Linear(4, 3).requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(4, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, 3, bias=False)})
        self.scaling = {"default": 2.0}

    def forward(self, x):
        return self.base_layer(x) + self.scaling["default"] * self.lora_B["default"](self.lora_A["default"](x))


def test_ggpo_moves_the_frozen_weight_by_the_norms_of_its_card():
    torch.manual_seed(0)
    model = Lora()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = flat.create("ggpo", model, torch.optim.SGD(trainable, lr=0.1), sigma=0.3, beta=1.0)
    x, y = torch.randn(6, 4), torch.randint(0, 3, (6,))
    base = model.base_layer.weight
    rest, seen_rows = base.clone(), torch.zeros(3)
    a, b = model.lora_A["default"].weight, model.lora_B["default"].weight
    for t in range(2):
        seen = {}

        def closure(seen=seen):
            seen["at"] = base.clone()
            return closure_of(model, x, y, nn.functional.cross_entropy)()

        rows = seen_rows
        size = torch.sqrt(rest.norm(dim=1).mean() ** 2 + (2.0 * b @ a).detach().norm(dim=1) ** 2)
        s = (0.3 * size + 1.0 * rows**2) / math.sqrt(3)
        before = (a.detach().clone(), b.detach().clone())
        optimizer.step(closure)
        ratio = (seen["at"] - rest) / s[:, None]
        torch.testing.assert_close(ratio, normal([rest], 7919 * (t + 1))[0], rtol=1e-4, atol=1e-4)
        assert torch.equal(base, rest)
        seen_rows = (2.0 * (before[1] @ a.grad + b.grad @ before[0])).norm(dim=1)


def test_bloop_lets_the_second_loss_act_orthogonally_only():
    model = problem.build("mlp")
    optimizer = flat.create("bloop", model, sgd(model, momentum=0.0, weight_decay=0.0), lam=0.5)
    x, y = problem.batch(0)
    aux = closure_of(model, x, y, lambda z, y: z.square().mean())
    main = closure_of(model, x, y)
    plain = problem.build("mlp")
    main_gradient = torch.autograd.grad(problem.loss_fn(plain(x), y), list(plain.parameters()))
    aux_gradient = torch.autograd.grad(plain(x).square().mean(), list(plain.parameters()))
    optimizer.step(main, aux)
    expected = plus(main_gradient, part(aux_gradient, main_gradient), 0.5)
    for p, g in zip(model.parameters(), expected):
        torch.testing.assert_close(p.grad, g)
    with pytest.raises(ValueError, match="combines two losses"):
        optimizer.step(main)


def test_radius_policies():
    model = problem.build("mlp")
    base = sgd(model, lr=0.1)
    optimizer = flat.create("gsam", model, base, rho=flat.radius.tied_to_lr(0.6, 0.1, 0.1))
    for lr, rho in ((0.1, 0.6), (0.05, 0.35), (0.0, 0.1)):
        base.param_groups[0]["lr"] = lr
        optimizer.step(closure_of(model, *problem.batch(0)))
        assert optimizer.last_radius == pytest.approx(rho)
    optimizer = flat.create("sam", model, base, rho=flat.radius.cosine(0.2, 0.0, 4))
    seen = []
    for t in range(5):
        optimizer.step(closure_of(model, *problem.batch(t)))
        seen.append(optimizer.last_radius)
    assert seen == pytest.approx([0.1 * (1 + math.cos(math.pi * t / 4)) for t in range(5)], abs=1e-9)
    optimizer = flat.create("sam", model, base, rho=flat.radius.warmup(0.2, 2))
    for t in range(3):
        optimizer.step(closure_of(model, *problem.batch(t)))
        assert optimizer.last_radius == pytest.approx(0.1 * min(t, 2))


def test_policies_choose_their_steps():
    counts = {}
    for name, options in {"window": {"when": flat.when.window(1, 3)}, "luck": {"bernoulli": 0.5, "seed": 5}}.items():
        model = problem.build("mlp")
        optimizer = flat.create("sam", model, sgd(model), **options)
        extra = []
        for t in range(60):
            before = optimizer.passes
            optimizer.step(closure_of(model, *problem.batch(t % 5)))
            extra.append(optimizer.passes - before - 1)
        counts[name] = extra
    assert counts["window"] == [0, 1, 1] + [0] * 57
    assert 15 < sum(counts["luck"]) < 45
