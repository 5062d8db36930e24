"""The page docs/flat.md says what the code says, and its examples run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from flat_problem import problem
from torch import nn

from flatcompress import flat

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "flat.md").read_text(encoding="utf-8")
EXAMPLES = {"pytorch": "torch", "accelerate": "accelerate", "lightning": "lightning", "transformers": "transformers"}


def method_table() -> str:
    """The table of the page, from the registry; print it with ``python tests/flat/test_flat_docs.py``."""
    lines = ["| method | defaults | what it does | paper |", "|---|---|---|---|"]
    for registry in (flat.METHODS, flat.COMBINATIONS):
        for entry in registry.values():
            defaults = ", ".join(f"{k}={v!r}" for k, v in entry.defaults.items() if not callable(v))
            lines.append(f"| `{entry.name}` | {defaults} | {entry.summary} | {entry.paper} |")
    return "\n".join(lines)


def test_page_lists_every_method_with_its_defaults():
    assert method_table() in PAGE


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_stands_on_the_page_and_runs(name, tmp_path):
    file = DOCS / "examples" / f"flat_{name}.py"
    assert f"```python\n{file.read_text(encoding='utf-8')}```" in PAGE
    pytest.importorskip(EXAMPLES[name])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(file)], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "loss" in done.stdout.splitlines()[-1]


def test_benchmark_tables_and_verdicts(tmp_path, monkeypatch, capsys):
    """The figures of the benchmark come out of rows; here the rows are given."""
    monkeypatch.syspath_prepend(str(DOCS.parent))
    from benchmarks import _common, flat_step

    monkeypatch.setattr(_common, "RESULTS", tmp_path / "results")
    fast = {"model": "m", "contender": "sam", "vs_hand": 1.01, "vs_plain": 2.0, "vs_peer": 0.99}
    slow = {**fast, "vs_hand": 1.2, "vs_peer": 1.1}
    late = {**fast, "contender": "msam", "vs_plain": 1.3, "vs_peer": None}
    assert flat_step.missed([fast]) == []
    assert len(flat_step.missed([slow, late])) == 3
    options = _common.arguments(None, ["--quick", "--check"])
    assert _common.finish("x", [fast], [], options) == 0
    assert _common.finish("x", [slow], flat_step.missed([slow]), options) == 1
    assert (tmp_path / "results" / "x-quick.json").exists()
    assert "MISSED: sam on m takes 1.200" in capsys.readouterr().out
    times = _common.interleaved({"a": lambda: None, "b": lambda: None}, rounds=3)
    assert len(times["a"]) == 3 and _common.ratio([2.0, 4.0, 9.0], [1.0, 2.0, 3.0]) == 2.0
    with _common.PeakMemory() as memory:
        for _ in range(3):
            held = torch.zeros(1000)
    assert memory.peak == 8000 and held.numel() == 1000  # the old one lives until the new one is bound


def test_private_gradients_of_opacus_are_the_direction_of_the_next_step():
    """DP-SAT climbs along the clipped and noised gradient that the DPOptimizer stepped with."""
    opacus = pytest.importorskip("opacus")
    torch.manual_seed(0)
    model = problem.build("mlp").float()
    wrapped = opacus.GradSampleModule(model)
    private = opacus.optimizers.DPOptimizer(
        torch.optim.SGD(wrapped.parameters(), lr=0.1), noise_multiplier=1.0, max_grad_norm=0.1, expected_batch_size=8
    )
    optimizer = flat.create("dpsat", wrapped, private, rho=0.3)
    points, gradients = [], []
    for t in range(3):
        x, y = problem.batch(t)

        def closure(x=x, y=y):
            points.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
            loss = nn.functional.cross_entropy(wrapped(x.float()), y)
            loss.backward()
            return loss

        start = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
        optimizer.step(closure)
        if gradients:
            torch.testing.assert_close(
                points[-1] - start, 0.3 * gradients[-1] / gradients[-1].norm(), rtol=1e-4, atol=1e-6
            )
        else:
            assert torch.equal(points[-1], start)
        gradients.append(torch.cat([p.grad.reshape(-1) for p in model.parameters()]))
        assert float(gradients[-1].norm()) > 0


if __name__ == "__main__":
    print(method_table())
