"""What the engine owns: buffers, noise, precision, clipping, groups, state, slots, and its errors."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from flat_problem import (
    LIVELY,
    NAMES,
    Stateful,
    closure_of,
    make,
    problem,
    same,
    sgd,
    stateful_batch,
    train,
    values,
)
from torch import nn

from flatcompress import flat
from flatcompress.flat.engine.snapshot import Buffers


def _classify(model, x, y):
    return closure_of(model, x, y, nn.functional.cross_entropy)


@pytest.mark.parametrize("name", NAMES)
def test_buffers_of_every_kind_move_in_the_first_pass_only(name):
    torch.manual_seed(0)
    model = Stateful()
    twin = copy.deepcopy(model)
    optimizer = flat.create(name, model, sgd(model, lr=0.0))
    first_point = {}

    def closure(x, y):
        def run():
            if not first_point:
                first_point.update({n: p.detach().clone() for n, p in model.named_parameters()})
            return _classify(model, x, y)()

        return run

    for t in range(3):
        x, y = stateful_batch(t)
        first_point.clear()
        optimizer.step(closure(x, y))
        with torch.no_grad():
            for n, p in twin.named_parameters():
                p.copy_(first_point[n])
            twin(x)
    for (n, a), b in zip(model.named_buffers(), twin.buffers()):
        assert torch.equal(a, b), n
    assert int(model.calls) == 3


def test_buffers_frozen_nests_and_survives_an_exception():
    model = Stateful()
    x, _ = stateful_batch(0)
    model(x)
    before = values(model)
    buffers = Buffers(model)
    with pytest.raises(RuntimeError, match="inner"), buffers.frozen():
        model(x)
        middle = values(model)
        with buffers.frozen():
            model(x)
        assert same(values(model), middle)
        raise RuntimeError("inner")
    assert same(values(model), before)


def test_buffers_move_in_every_pass_when_asked_to():
    x, y = problem.batch(0)
    model, optimizer = make("sam", freeze_buffers=False)
    optimizer.step(closure_of(model, x, y))
    assert int(model.bn1.num_batches_tracked) == 2


def test_a_deep_copy_goes_on_by_itself():
    model, optimizer = make("friendlysam")
    train(model, optimizer, range(2))
    other = copy.deepcopy(optimizer)
    train(model, optimizer, range(2, 4))
    train(other.model, other, range(2, 4))
    assert other.model is not model and same(values(other.model), values(model))


def test_dropout_noise_is_replayed_and_advances_once():
    model = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5), nn.Linear(64, 3))
    masks = []
    model[1].register_forward_hook(lambda m, i, o: masks.append(o == 0))
    optimizer = flat.create("sam", model, sgd(model))
    x, y = torch.randn(8, 4), torch.randint(0, 3, (8,))
    for _ in range(2):
        optimizer.step(_classify(model, x, y))
    assert torch.equal(masks[0], masks[1]) and torch.equal(masks[2], masks[3])
    assert not torch.equal(masks[0], masks[2])
    torch.manual_seed(7)
    optimizer.step(_classify(model, x, y))
    after = torch.rand(1)
    torch.manual_seed(7)
    model(x)
    assert torch.equal(after, torch.rand(1))


@pytest.mark.parametrize("overflow_in", [0, 1])
def test_overflow_in_either_pass_skips_the_step_and_halves_the_scale(overflow_in):
    model, _ = make("sam")
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    optimizer = flat.create("sam", model, sgd(model), scaler=scaler)
    calls = []

    def closure():
        loss = problem.loss_fn(model(problem.batch(0)[0]), problem.batch(0)[1])
        scaler.scale(loss * (float("inf") if len(calls) == overflow_in else 1.0)).backward()
        calls.append(0)
        return loss

    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer.step(closure)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert optimizer.skipped == 1 and scaler.get_scale() == 512.0
    assert not optimizer.state, "the base optimizer took no step"
    optimizer.step(closure)
    assert optimizer.skipped == 1 and scaler.get_scale() == 512.0
    assert not all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("name", NAMES)
def test_loss_scaling_changes_nothing(name):
    model, plain = make(name, kind="mlp")
    scaled_model, _ = make(name, kind="mlp")
    scaler = torch.amp.GradScaler("cpu", init_scale=4096.0)
    scaled = flat.create(name, scaled_model, sgd(scaled_model), scaler=scaler, **LIVELY.get(name, {}))
    for t in range(3):
        x, y = problem.batch(t)
        plain.step(closure_of(model, x, y))

        def closure(x=x, y=y):
            loss = problem.loss_fn(scaled_model(x), y)
            scaler.scale(loss).backward()
            return loss

        scaled.step(closure)
    for a, b in zip(model.parameters(), scaled_model.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_autocast_around_the_step_sees_the_perturbed_weights():
    """autocast caches cast weights; without clearing, the second pass would use those of w."""
    torch.manual_seed(0)
    model = nn.Linear(8, 3)
    optimizer = flat.create("sam", model, sgd(model), rho=5.0)
    x, y = torch.randn(16, 8), torch.randint(0, 3, (16,))
    outputs = []

    def closure():
        out = model(x)
        outputs.append(out.detach().float())
        loss = nn.functional.cross_entropy(out.float(), y)
        loss.backward()
        return loss

    with torch.autocast("cpu", dtype=torch.bfloat16):
        optimizer.step(closure)
        after = model(x).float()
    assert not torch.allclose(outputs[0], outputs[1], atol=0.5)
    assert not torch.equal(outputs[0], after)


class Branches(nn.Module):
    """A parameter that only some passes use, a shared one, a frozen one, and an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.sometimes = nn.Linear(4, 4)
        self.never = nn.Linear(4, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.tied = nn.Linear(4, 7, bias=False)
        self.tied.weight = self.embed.weight
        self.use = True

    def forward(self, tokens):
        h = self.frozen(self.embed(tokens).mean(1))
        return self.tied(self.sometimes(h) if self.use else h)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("used", [(True, False), (False, True)])
def test_parameters_missing_from_a_pass_are_restored_and_absent_ones_left_alone(name, used):
    torch.manual_seed(0)
    model = Branches()
    optimizer = flat.create(name, model, torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9, weight_decay=0.1))
    tokens, y = torch.randint(0, 7, (5, 3)), torch.randint(0, 7, (5,))
    before = values(model)
    for _ in range(2):
        calls = []

        def closure(calls=calls):
            model.use = used[min(len(calls), 1)]
            calls.append(0)
            loss = nn.functional.cross_entropy(model(tokens), y)
            loss.backward()
            return loss

        optimizer.step(closure)
    assert same(values(model), before)
    assert model.never.weight.grad is None and model.frozen.weight.grad is None
    if name == "sam":
        assert (model.sometimes.weight.grad is not None) == used[1]


def test_sparse_gradients_are_combined_as_dense_ones():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 4, sparse=True), nn.Flatten(), nn.Linear(8, 3))
    twin = copy.deepcopy(model)
    twin[0].sparse = False
    tokens, y = torch.randint(0, 7, (5, 2)), torch.randint(0, 3, (5,))
    for m in (model, twin):
        flat.create("sam", m, sgd(m)).step(_classify(m, tokens, y))
    torch.testing.assert_close(model[0].weight, twin[0].weight)


def test_freezing_and_unfreezing_between_steps_needs_no_notice():
    model, optimizer = make("friendlysam")
    train(model, optimizer, range(2))
    model.fc1.requires_grad_(False)
    frozen = model.fc1.weight.detach().clone()
    train(model, optimizer, range(2, 4))
    assert torch.equal(model.fc1.weight, frozen)
    model.fc1.requires_grad_(True)
    train(model, optimizer, range(4, 5))
    assert not torch.equal(model.fc1.weight, frozen)


def test_parameters_of_another_optimizer_keep_the_first_pass_gradient():
    model = problem.build("mlp")
    optimizer = flat.create("sam", model, torch.optim.SGD(model.fc2.parameters(), lr=0.1))
    optimizer.step(closure_of(model, *problem.batch(0)))
    plain = problem.build("mlp")
    closure_of(plain, *problem.batch(0))()
    torch.testing.assert_close(model.fc1.weight.grad, plain.fc1.weight.grad)


def test_clipping_acts_on_the_combined_gradient():
    one, _ = make("sam", kind="mlp")
    optimizer = flat.create("sam", one, sgd(one), max_grad_norm=0.1)
    optimizer.step(closure_of(one, *problem.batch(0)))
    two, free = make("sam", kind="mlp")
    free.step(closure_of(two, *problem.batch(0)))
    torch.nn.utils.clip_grad_norm_(two.parameters(), 0.1)
    for a, b in zip(one.parameters(), two.parameters()):
        torch.testing.assert_close(a.grad, b.grad)


def test_schedulers_and_groups_reach_the_base_also_after_loading():
    model, optimizer = make("sam")
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, range(1))
        scheduler.step()
    assert optimizer.base.param_groups[0]["lr"] == pytest.approx(0.05)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert optimizer.param_groups is optimizer.base.param_groups
    scheduler.step()
    assert optimizer.base.param_groups[0]["lr"] == pytest.approx(0.025)
    extra = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer.add_param_group({"params": [extra], "lr": 1.0})
    assert len(optimizer.base.param_groups) == 2


def test_step_hooks_run():
    model, optimizer = make("sam")
    seen = []
    optimizer.register_step_pre_hook(lambda *a: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *a: seen.append("post"))
    train(model, optimizer, range(1))
    assert seen == ["pre", "post"]


def test_state_of_the_base_alone_starts_the_method_afresh_and_another_method_is_refused():
    model, optimizer = make("friendlysam")
    train(model, optimizer, range(2))
    state = optimizer.state_dict()
    _, other = make("looksam")
    with pytest.raises(ValueError, match=r"saved by 'friendlysam'"):
        other.load_state_dict(state)
    other.load_state_dict(optimizer.base.state_dict())
    assert other.t == 0 and len(other.state) == len(optimizer.state)


def test_compose_sees_both_probes_and_changes_the_combined_gradient():
    model, _ = make("sam", kind="mlp")
    seen = {}

    def compose(params, probes, combined):
        seen["probes"] = [[g.clone() for g in probe] for probe in probes]
        combined[0] = torch.zeros_like(combined[0])
        combined[1] = None

    optimizer = flat.create("sagm", model, sgd(model, momentum=0.0, weight_decay=0.0), compose=compose)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step(closure_of(model, *problem.batch(0)))
    params = list(model.parameters())
    assert len(seen["probes"]) == 2
    assert torch.equal(params[0], before[0]) and params[1].grad is None
    torch.testing.assert_close(params[2].grad, (seen["probes"][0][2] + seen["probes"][1][2]) / 2)
    optimizer = flat.create("none", model, sgd(model), compose=compose)
    optimizer.step(closure_of(model, *problem.batch(0)))
    assert len(seen["probes"]) == 1


def test_radius_slot_gives_every_row_its_own_radius():
    model, _ = make("sam", kind="mlp")
    radii = {n: torch.linspace(0.1, 0.5, p.shape[0], dtype=p.dtype) for n, p in model.named_parameters()}
    names = [n for n, _ in model.named_parameters()]
    optimizer = flat.create(
        "sam", model, sgd(model), radius=lambda params: [radii[n] for n in names], scope="per_row",
        perturbed=lambda n, p: p.dim() > 1,
    )  # fmt: skip
    start, points = values(model), []

    def closure():
        points.append(values(model))
        return closure_of(model, *problem.batch(0))()

    optimizer.step(closure)
    for n in names:
        e = points[1][n] - start[n]
        if e.dim() > 1:
            torch.testing.assert_close(e.norm(dim=1), radii[n], rtol=1e-8, atol=0)
        else:
            assert not e.any()


@pytest.mark.parametrize("scope", ["all", "selected", "per_group", "per_tensor", "per_row"])
def test_norm_scopes(scope):
    """The scope alone decides over what the norm is taken; fc2 is not perturbed."""
    model = problem.build("mlp")
    base = torch.optim.SGD(
        [{"params": [model.fc1.weight]}, {"params": [model.fc1.bias, *model.fc2.parameters()]}], lr=0.1
    )
    optimizer = flat.create("sam", model, base, rho=1.0, scope=scope, perturbed=lambda n, p: n.startswith("fc1"))
    start, points = values(model), []

    def closure():
        points.append(values(model))
        return closure_of(model, *problem.batch(0))()

    optimizer.step(closure)
    plain = problem.build("mlp")
    closure_of(plain, *problem.batch(0))()
    g = {n: p.grad for n, p in plain.named_parameters()}
    inside = torch.cat([g["fc1.weight"].reshape(-1), g["fc1.bias"]]).norm()
    whole = torch.cat([x.reshape(-1) for x in g.values()]).norm()
    expected = {
        "all": (whole, whole),
        "selected": (inside, inside),
        "per_group": (g["fc1.weight"].norm(), g["fc1.bias"].norm()),
        "per_tensor": (g["fc1.weight"].norm(), g["fc1.bias"].norm()),
        "per_row": (g["fc1.weight"].norm(dim=1, keepdim=True), g["fc1.bias"].abs()),
    }[scope]
    for n, size in zip(("fc1.weight", "fc1.bias"), expected):
        torch.testing.assert_close(points[1][n] - start[n], g[n] / size)
    assert torch.equal(points[1]["fc2.weight"], start["fc2.weight"])


def test_the_last_gap_and_radius_are_those_of_the_step():
    model, optimizer = make("sam", rho=0.07)
    assert optimizer.last_gap is None and optimizer.last_radius is None
    losses = []

    def run():
        value = closure_of(model, *problem.batch(0))()
        losses.append(float(value.detach()))
        return value

    first = optimizer.step(run)
    assert float(first) == losses[0]
    assert optimizer.last_gap == pytest.approx(losses[1] - losses[0])
    assert optimizer.last_radius == pytest.approx(0.07)
    _, plain = make("none")
    train(plain.model, plain, range(1))
    assert plain.last_gap is None and plain.last_radius is None
