"""GAQAT as it is used: the conflict rule in the compose slot of the two-pass engine."""

from __future__ import annotations

import copy

import pytest
import torch
from nets import Net, trained
from torch import nn

from flatcompress import flat, quant

torch.set_num_threads(1)
GENERATOR = torch.Generator().manual_seed(7)
X = torch.randn(6, 16, 3, 8, 8, generator=GENERATOR)
Y = torch.randint(0, 4, (6, 16), generator=GENERATOR)


def net() -> Net:
    torch.manual_seed(0)
    model = Net()
    model.dropout = nn.Identity()
    trained(model, 3)
    quant.quantize(model, 3, 3, per_channel=False)
    quant.calibrate(model, X[:1])
    return model.train()


class Run:
    """A model, its SAGM (or plain) optimizer and its conflict rule."""

    def __init__(
        self, method: str = "sagm", conflict: dict | None = None, perturb_scales: bool = False, **hyper
    ) -> None:
        self.model = net()
        self.base = torch.optim.SGD(self.model.parameters(), lr=1e-2, momentum=0.9)
        scales = {id(p) for p in quant.scale_parameters(self.model).values()}
        self.conflict = quant.ScaleConflict(self.model, **conflict) if conflict is not None else None
        self.optimizer = flat.create(
            method,
            self.model,
            self.base,
            compose=self.conflict.compose if self.conflict else None,
            perturbed=lambda name, p: id(p) not in scales,
            **hyper,
        )

    def steps(self, first: int = 0, last: int = 6) -> dict[str, torch.Tensor]:
        for x, y in zip(X[first:last], Y[first:last]):

            def closure(x: torch.Tensor = x, y: torch.Tensor = y) -> torch.Tensor:
                loss = nn.functional.cross_entropy(self.model(x), y)
                loss.backward()
                return loss

            self.optimizer.zero_grad()
            self.optimizer.step(closure)
        return {k: v.clone() for k, v in self.model.state_dict().items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[k], b[k]) for k in a)


def test_no_perturbation_is_plain_lsq_bit_for_bit() -> None:
    plain = Run("none").steps()
    assert equal(Run("sagm", {"K": 2, "tau": 0.0}, rho=0.0, alpha=0.0).steps(), plain)


def test_tau_zero_is_lsq_with_sagm_bit_for_bit() -> None:
    naive = Run("sagm", rho=0.05, alpha=1e-3).steps()
    assert equal(Run("sagm", {"K": 2, "tau": 0.0}, rho=0.05, alpha=1e-3).steps(), naive)
    frozen = Run("sagm", {"K": 2, "tau": 1.1}, rho=0.05, alpha=1e-3)
    found = frozen.steps()
    assert frozen.conflict.frozen_share == 1.0 and not equal(found, naive)


def test_weights_of_an_unperturbed_scale_step_differ_only_through_the_scales() -> None:
    """One step after everything froze: only scales get another gradient."""
    naive, frozen = Run("sagm", rho=0.05), Run("sagm", {"K": 2, "tau": 1.1}, rho=0.05)
    naive.steps(0, 2), frozen.steps(0, 2)
    a, b = naive.steps(2, 3), frozen.steps(2, 3)
    scales = quant.scale_names(naive.model)
    changed = {k for k in a if not torch.equal(a[k], b[k])}
    assert changed and changed <= scales


def test_scales_stay_where_they_are_in_the_second_pass() -> None:
    run = Run("sagm", {"K": 2}, rho=0.5)
    seen: list[list[torch.Tensor]] = []
    scale = quant.scale_parameters(run.model)["stem"]
    run.model.register_forward_pre_hook(
        lambda m, i: seen.append([scale.detach().clone(), m.stem.weight.detach().clone()])
    )
    run.steps(0, 1)
    assert torch.equal(seen[0][0], seen[1][0]) and not torch.equal(seen[0][1], seen[1][1])


def test_a_resumed_run_ends_in_the_same_bits() -> None:
    whole = Run("sagm", {"K": 4, "tau": 0.6}, rho=0.05)
    expected = whole.steps()
    first = Run("sagm", {"K": 4, "tau": 0.6}, rho=0.05)
    first.steps(0, 3)
    second = Run("sagm", {"K": 4, "tau": 0.6}, rho=0.05)
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    second.conflict.load_state_dict(copy.deepcopy(first.conflict.state_dict()))
    assert equal(second.steps(3, 6), expected)
    assert torch.equal(second.conflict.frozen, whole.conflict.frozen)


@pytest.mark.parametrize("method", ["sam", "asam", "gsam"])
def test_any_two_probe_method_takes_the_rule(method: str) -> None:
    run = Run(method, {"K": 2, "tau": 1.1, "mix": (0.0, 1.0)})
    state = run.steps()
    assert run.conflict.windows == 3 and all(torch.isfinite(v.float()).all() for v in state.values())
