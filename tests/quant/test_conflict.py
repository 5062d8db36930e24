from __future__ import annotations

import copy

import pytest
import torch
from nets import Encoder, Net

from flatcompress import quant
from flatcompress.errors import UserError
from flatcompress.quant import ScaleConflict

torch.set_num_threads(1)


def net(per_channel: bool = False) -> Net:
    torch.manual_seed(0)
    model = Net()
    quant.quantize(model, 3, 3, per_channel=per_channel)
    quant.calibrate(model, [torch.randn(8, 3, 8, 8)])
    return model


class Driver:
    """Feeds chosen gradients to all scales through the compose slot."""

    def __init__(self, model: Net, **options: object) -> None:
        self.model, self.conflict = model, ScaleConflict(model, **options)
        self.params = list(model.parameters())
        self.scales = list(quant.scale_parameters(model).values())
        self.index = {id(p): i for i, p in enumerate(self.params)}

    def step(self, task: float | list[float], smooth: float | list[float]) -> list[float]:
        """One step; returns each scale's combined gradient (0.5 (task + smooth) before composing)."""
        tasks = task if isinstance(task, list) else [task] * len(self.scales)
        smooths = smooth if isinstance(smooth, list) else [smooth] * len(self.scales)
        probes = [[torch.ones_like(p) for p in self.params] for _ in range(2)]
        for scale, a, b in zip(self.scales, tasks, smooths):
            probes[0][self.index[id(scale)]] = torch.full_like(scale, a)
            probes[1][self.index[id(scale)]] = torch.full_like(scale, b)
        combined = [0.5 * (a + b) for a, b in zip(*probes)]
        self.before = [c.clone() for c in combined]
        self.conflict.compose(self.params, probes, combined)
        self.after = combined
        return [float(combined[self.index[id(s)]].mean()) for s in self.scales]

    def sequence(self, tasks: list[float], smooth: float = 1.0) -> dict:
        for task in tasks:
            self.step(task, smooth)
        return self.conflict.timeline()["quantizers.input"]


@pytest.mark.parametrize(
    ("signs", "disorder"),
    [([1, 1, -1, 1, -1], 0.75), ([1, 1, 1, 1], 0.0), ([1, -1, 1, -1], 1.0), ([1, 0, -1, -1], 1 / 3)],
)
def test_disorder_by_hand(signs: list[float], disorder: float) -> None:
    row = Driver(net(), K=len(signs)).sequence(signs)
    assert row["disorder"] == pytest.approx(disorder, abs=1e-6)


def test_conflict_rate_and_ratio() -> None:
    driver = Driver(net(), K=4)
    scale = driver.scales[0]
    with torch.no_grad():
        scale.mul_(1.5)
    driver.sequence([1, -1, -1, 0], smooth=1.0)
    row = driver.conflict.timeline()[next(iter(quant.scale_parameters(driver.model)))]
    assert row["conflict"] == pytest.approx(2 / 3)
    assert row["scale_ratio"] == pytest.approx(1.5, rel=1e-5)
    assert row["disorder_smooth"] == 0.0


def test_equilibrium_is_escaped_by_freezing() -> None:
    """Constant opposite gradients: nothing moves in window 1, then the smooth one alone acts, at half weight."""
    driver = Driver(net(), K=4, tau=0.3)
    assert all(g == 0 for _ in range(4) for g in driver.step(2.0, -2.0))
    for _ in range(9):
        assert set(driver.step(2.0, -2.0)) == {-1.0}
    assert driver.conflict.frozen_share == 1.0


@pytest.mark.parametrize(("target", "expected"), [("task", -0.5), ("smooth", 1.5), ("both", 0.0)])
def test_freeze_target(target: str, expected: float) -> None:
    driver = Driver(net(), K=2, tau=2.0, freeze_target=target)
    for _ in range(2):
        driver.step(3.0, -1.0)
    assert set(driver.step(3.0, -1.0)) == {expected}


def test_tau_zero_never_freezes_and_leaves_gradients_untouched() -> None:
    driver = Driver(net(), K=2, tau=0.0)
    for _ in range(6):
        driver.step(1.0, -1.0)
        assert all(a is b or torch.equal(a, b) for a, b in zip(driver.after, driver.before))
    assert not driver.conflict.frozen.any()


def test_tau_above_one_freezes_everything_after_the_first_window() -> None:
    driver = Driver(net(), K=3, tau=1.1)
    for t in range(3):
        assert set(driver.step((-1.0) ** t, 1.0)) <= {0.0, 1.0}
    assert driver.conflict.frozen.all()


def test_freezing_one_quantizer_leaves_everything_else_alone() -> None:
    driver = Driver(net(), K=4, tau=0.3)
    n = len(driver.scales)
    for t in range(5):
        driver.step([1.0] + [(-1.0) ** t] * (n - 1), 0.5)
    assert driver.conflict.frozen.sum() == 1
    first = driver.index[id(driver.scales[0])]
    for i, (a, b) in enumerate(zip(driver.after, driver.before)):
        assert torch.equal(a, b) == (i != first)


def test_thawing_and_sticky() -> None:
    for refreeze in (True, False):
        driver = Driver(net(), K=3, tau=0.3, refreeze=refreeze)
        driver.sequence([1, 1, 1])
        assert driver.conflict.frozen.all()
        driver.sequence([1, -1, 1])
        assert bool(driver.conflict.frozen.any()) == (not refreeze)


def test_gated_mode_never_freezes_agreeing_gradients() -> None:
    driver = Driver(net(), K=3, tau=1.1, mode="gated")
    driver.sequence([1, 1, 1], smooth=1.0)
    assert not driver.conflict.frozen.any()
    driver.sequence([1, 1, 1], smooth=-1.0)
    assert driver.conflict.frozen.all()


def test_window_without_signs_keeps_the_decision() -> None:
    driver = Driver(net(), K=3, tau=0.3)
    driver.sequence([1, 1, 1])
    row = driver.sequence([0, 1, 0])
    assert driver.conflict.frozen.all() and row["disorder"] is None


def test_quantile_freezes_exactly_the_least_disordered_share() -> None:
    driver = Driver(net(), K=5, tau=0.3, tau_kind="quantile")
    n = len(driver.scales)
    for t in range(5):  # quantizer i flips at the first i % 5 steps
        driver.step([(-1.0) ** min(t, i % 5) for i in range(n)], 1.0)
    assert int(driver.conflict.frozen.sum()) == int(0.3 * n)
    disorders = [row["disorder"] for row in driver.conflict.timeline().values()]
    frozen = [row["frozen"] > 0 for row in driver.conflict.timeline().values()]
    assert max(d for d, f in zip(disorders, frozen) if f) <= min(d for d, f in zip(disorders, frozen) if not f)


def test_sigma_counts_deviations_below_chance() -> None:
    # K = 5: one deviation is 0.25, so the threshold of tau = 1 is 0.25
    driver = Driver(net(), K=5, tau=1.0, tau_kind="sigma")
    driver.sequence([1, 1, 1, 1, -1])
    assert not driver.conflict.frozen.any()  # exactly at the threshold
    driver.sequence([1, 1, 1, 1, 1])
    assert driver.conflict.frozen.all()


def test_layer_granularity_joins_a_layers_weights_and_input() -> None:
    driver = Driver(net(), K=3, tau=0.6, granularity="layer")
    names = list(quant.scale_parameters(driver.model))
    ordered = names.index("stem")
    for t in range(3):
        driver.step([1.0 if i == ordered else (-1.0) ** t for i in range(len(names))], 1.0)
    frozen = dict(zip(names, (row["frozen"] for row in driver.conflict.timeline().values())))
    assert frozen["stem"] == frozen["quantizers.input"] == 1.0  # mean disorder 0.5 of the two
    assert sum(v > 0 for v in frozen.values()) == 2


def test_channels_are_averaged_or_decided_alone() -> None:
    for granularity, expected in (("quantizer", 0), ("channel", 3)):
        driver = Driver(net(per_channel=True), K=3, tau=0.3, granularity=granularity)
        index = driver.index[id(driver.scales[0])]
        for t in range(3):
            probes = [
                [torch.full_like(p, (-1.0) ** t) for p in driver.params],
                [torch.ones_like(p) for p in driver.params],
            ]
            probes[0][index].flatten()[:3] = 1.0  # three of six channels are orderly: disorder 0.5 on average
            combined = [0.5 * (a + b) for a, b in zip(*probes)]
            driver.conflict.compose(driver.params, probes, combined)
        assert int(driver.conflict.frozen.sum()) == expected


def test_resume_in_the_middle_of_a_window() -> None:
    torch.manual_seed(3)
    signs = [float(s) for s in torch.randint(0, 2, (10,)) * 2 - 1]
    whole = Driver(net(), K=5, tau=0.55)
    whole.sequence(signs)
    first, second = Driver(net(), K=5, tau=0.55), Driver(net(), K=5, tau=0.55)
    first.sequence(signs[:7])
    second.conflict.load_state_dict(copy.deepcopy(first.conflict.state_dict()))
    second.sequence(signs[7:])
    assert torch.equal(whole.conflict.frozen, second.conflict.frozen)
    assert whole.conflict.timeline() == second.conflict.timeline()
    with pytest.raises(UserError, match="other quantizers"):
        other = Encoder()
        quant.quantize(other)
        ScaleConflict(other).load_state_dict(first.conflict.state_dict())


def test_one_probe_steps_and_missing_gradients_are_fine() -> None:
    driver = Driver(net(), K=2)
    driver.conflict.compose(driver.params, [[None] * len(driver.params)], [None] * len(driver.params))
    assert driver.conflict.t == 0
    nothing: list = [None] * len(driver.params)
    driver.conflict.compose(driver.params, [list(nothing), list(nothing)], list(nothing))
    assert driver.conflict.t == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [({"K": 1}, "K"), ({"tau": -1}, "tau"), ({"tau": 2, "tau_kind": "quantile"}, "tau"), ({"mode": "gate"}, "gated"),
     ({"freeze_target": "tusk"}, "task"), ({"remedy": "slo"}, "slow"),
     ({"granularity": "x"}, "layer"), ({"tau_kind": "rel"}, "absolute")],
)  # fmt: skip
def test_bad_switches(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ScaleConflict(net(), **options)


def test_hand_made_scale_conflict_of_the_card() -> None:
    """One weight, b = 3, s = 0.5, L = (Q - 1)^2 / 2: the residual flips sign although Q does not change."""
    from flatcompress.quant.quantizers.lsq import StepQuantizer

    def slope(w: float) -> float:
        quantizer = StepQuantizer(3, True).double()
        quantizer.set_scale(torch.tensor(0.5))
        v = torch.tensor([w], dtype=torch.float64, requires_grad=True)
        (0.5 * (quantizer.quantize(v) - 1).square()).sum().backward()
        return float(quantizer.scale.grad) * 3**0.5  # without the gradient scale

    assert slope(0.55) == pytest.approx(0.05)
    assert slope(0.45) == pytest.approx(-0.05)  # rho = 0.10 downhill
    assert slope(0.53) == pytest.approx(0.03)  # rho = 0.02
    assert slope(0.70) == pytest.approx(0.20) and slope(0.65) == pytest.approx(0.15)


def test_opposed_mode_reads_the_conflict_rate_in_the_place_of_disorder() -> None:
    driver = Driver(net(), K=4, tau=0.5, mode="opposed")
    n = len(driver.scales)
    for t in range(4):  # the task gradients are in perfect order; the first scale's is opposed three times of four
        driver.step(1.0, [-1.0 if t else 1.0] + [1.0] * (n - 1))
    assert driver.conflict.frozen.nonzero().flatten().tolist() == [0]


def test_slow_remedy_moves_a_frozen_scale_a_tenth_of_its_step() -> None:
    driver = Driver(net(), K=2, tau=1.1, remedy="slow")
    for _ in range(2):
        driver.step(1.0, -1.0)
    assert driver.conflict.frozen.all()
    assert set(driver.step(3.0, -1.0)) == {1.0}  # both gradients stay
    starts = [s.detach().clone() for s in driver.scales]
    with torch.no_grad():
        for scale in driver.scales:
            scale.add_(1.0)
    driver.conflict.after_step()
    assert all(torch.allclose(s, start + 0.1, atol=1e-6) for s, start in zip(driver.scales, starts))
    driver.conflict.after_step()  # once a step
    assert all(torch.allclose(s, start + 0.1, atol=1e-6) for s, start in zip(driver.scales, starts))


def test_project_takes_the_opposing_part_out_of_the_smaller_gradient() -> None:
    driver = Driver(net(), K=2, remedy="project")
    for _ in range(5):  # numbers of their own: the smaller one goes, agreeing gradients stay
        assert set(driver.step(3.0, -1.0)) == {1.5} and set(driver.step(1.0, -3.0)) == {-1.5}
        assert set(driver.step(3.0, 1.0)) == {2.0}
        assert driver.step(1e-23, -1e-22) == pytest.approx([-0.5e-22] * len(driver.scales), rel=1e-5, abs=0)
        assert set(driver.step(0.0, -1.0)) == {-0.5}
    assert not driver.conflict.frozen.any() and driver.conflict.timeline()


def test_project_leaves_what_is_orthogonal() -> None:
    driver = Driver(net(per_channel=True), K=2, remedy="project")
    index = driver.index[id(driver.scales[0])]
    shape = driver.scales[0].shape
    probes = [[torch.zeros_like(p) for p in driver.params] for _ in range(2)]
    probes[0][index] = torch.tensor([4.0, 0, 0, 0, 0, 0]).view(shape)
    probes[1][index] = torch.tensor([-1.0, 2.0, 0, 0, 0, 0]).view(shape)
    combined = [0.5 * (a + b) for a, b in zip(*probes)]
    driver.conflict.compose(driver.params, probes, combined)
    assert combined[index].flatten().tolist() == [2.0, 1.0, 0, 0, 0, 0]


# -- the baselines ---------------------------------------------------------------------------------------------------


def test_alternation_never_mixes_the_two_losses() -> None:
    driver = Driver(net())
    squat = quant.Alternation(driver.model)
    ids = {id(s) for s in driver.scales}
    for turn in range(2):
        probes = [[torch.full_like(p, k) for p in driver.params] for k in (1.0, 3.0)]
        combined: list = [0.5 * (a + b) for a, b in zip(*probes)]
        squat.compose(driver.params, probes, combined)
        for parameter, gradient in zip(driver.params, combined):
            if (id(parameter) in ids) != (turn == 1):
                assert gradient is None
            else:
                assert (gradient == (1.0 if turn else 2.0)).all()
    other = quant.Alternation(driver.model)
    other.load_state_dict(squat.state_dict())
    assert other.t == 2


def test_bloop_lets_the_smooth_gradient_act_only_across_the_task() -> None:
    driver = Driver(net())
    bloop = quant.ScaleBloop(driver.model, beta=0.0)
    torch.manual_seed(0)
    probes = [[torch.randn_like(p) for p in driver.params] for _ in range(2)]
    combined: list = [0.5 * (a + b) for a, b in zip(*probes)]
    before = [c.clone() for c in combined]
    bloop.compose(driver.params, probes, combined)
    where = [driver.index[id(s)] for s in driver.scales]
    flat = lambda rows: torch.cat([rows[i].flatten() for i in where])  # noqa: E731
    extra = flat(combined) - flat(probes[0])
    assert abs(float(extra @ flat(probes[0]))) < 1e-4 and float(extra.norm()) > 0.1
    assert all(torch.equal(combined[i], before[i]) for i in range(len(before)) if i not in where)


def test_a_random_share_is_frozen_anew_in_every_window_and_repeatably() -> None:
    """The control for GAQAT's rule: as many scales as the quantile takes, whatever their gradients do."""
    found = []
    for seed in (0, 0, 1):
        driver = Driver(net(), K=2, tau=0.3, tau_kind="quantile", mode="random", seed=seed)
        windows = []
        for _ in range(3):
            driver.step(1.0, 1.0)
            driver.step(1.0, 1.0)
            windows.append(tuple(row["frozen"] for row in driver.conflict.timeline().values()))
        assert all(sum(w) == int(0.3 * len(driver.scales)) for w in windows) and len(set(windows)) > 1
        found.append(windows)
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize(("moves", "frozen"), [([0.01] * 7, 0.0), ([0.01, -0.01] * 4, 1.0), ([0.0] * 7, 1.0)])
def test_a_scale_that_still_travels_is_not_taken_for_one_that_is_held(moves: list[float], frozen: float) -> None:
    """All gradients are in perfect order; only where the scales go differs."""
    driver = Driver(net(), K=4, tau=0.3, mode="standing")
    for move in [*moves[:7], 0.0]:
        driver.step(2.0, -2.0)
        with torch.no_grad():
            for scale in driver.scales:
                scale.mul_(1 + move)
    rows = driver.conflict.timeline().values()
    assert {row["frozen"] for row in rows} == {frozen}
    travelled = [row["travel"] for row in rows]
    assert all(t is None if not any(moves) else (t > 0.99 if frozen == 0 else t < 0.5) for t in travelled)


def test_the_path_of_scales_goes_on_after_an_interruption() -> None:
    def drive(driver: Driver, first: int, last: int) -> None:
        for i in range(first, last):
            driver.step(1.0, -1.0)
            with torch.no_grad():
                for scale in driver.scales:
                    scale.mul_(1.01 if i % 3 else 0.97)

    whole, first = (Driver(net(), K=4, mode="standing") for _ in range(2))
    drive(whole, 0, 8)
    drive(first, 0, 6)
    second = Driver(net(), K=4, mode="standing")
    second.model.load_state_dict(first.model.state_dict())
    second.conflict.load_state_dict(first.conflict.state_dict())
    drive(second, 6, 8)
    assert second.conflict.timeline() == whole.conflict.timeline()
