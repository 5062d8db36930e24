"""Depth: whole blocks taken out, where what they give has the size of what they get.

A residual block whose branch says little can go: its input goes on in place of its output. How little it says is its
*influence*, one minus the mean cosine between what goes in and what comes out (block influence, arXiv 2403.03853,
section 3.2): 0 for a block that changes nothing, which then goes exactly.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flatcompress.errors import UserError
from flatcompress.modules import check_patterns, evaluating, matches
from flatcompress.plan import Plan, Step
from flatcompress.prune.inputs import Example, call
from flatcompress.stale import retire


class _Seen:
    """What went into every module and came out of it in one forward, sizes first."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.calls: dict[str, int] = {}
        self.influence: dict[str, float] = {}

    def watch(self, example: Example) -> _Seen:
        handles = [
            module.register_forward_hook(self._hook(name), with_kwargs=True)
            for name, module in self.model.named_modules()
            if name and any(True for _ in module.children()) and any(True for _ in module.parameters())
        ]
        try:
            with evaluating(self.model), torch.no_grad():
                call(self.model, example)
        finally:
            for handle in handles:
                handle.remove()
        return self

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            self.calls[name] = self.calls.get(name, 0) + 1
            given = [*args, *kwargs.values()]
            if len(given) == 1 and isinstance(given[0], Tensor) and isinstance(output, Tensor):
                x = given[0]
                if x.shape == output.shape and x.dtype == output.dtype and x.is_floating_point():
                    a, b = x.flatten(1), output.flatten(1)
                    self.influence[name] = 1 - float(torch.cosine_similarity(a, b, dim=1).mean())

        return hook


def influences(model: nn.Module, batches: Iterable[Example], ignore: Sequence[str] = ()) -> dict[str, float]:
    """How much each block of ``model`` that could go changes what goes through it, the mean over ``batches`` of inputs.

    A block is a module of modules that is called once with one tensor and returns one of the same size; of blocks
    inside one another the inner ones count, and one that holds several is no block. ``ignore``: names or ``re:PATTERN``
    of what stays. UserError: no batch, no block, a pattern without a match.
    """
    total: dict[str, float] = {}
    count = 0
    for batch in batches:
        seen = _Seen(model).watch(batch)
        once = {name: value for name, value in seen.influence.items() if seen.calls[name] == 1}
        for name, value in once.items():
            total[name] = total.get(name, 0.0) + value
        count += 1
    if not count:
        raise UserError("how much a block changes is measured on at least one batch.")
    inner = {name: v / count for name, v in total.items() if not any(o.startswith(f"{name}.") for o in total)}
    if not inner:
        raise UserError(f"{type(model).__name__} has no block that gives back what it gets in size: nothing can go.")
    check_patterns("ignore", ignore, list(inner))
    return {name: value for name, value in inner.items() if not any(matches(p, name) for p in ignore)}


def remove_blocks(
    model: nn.Module, count: int, batches: Iterable[Example], ignore: Sequence[str] = ()
) -> tuple[Plan, dict[str, float]]:
    """Take the ``count`` blocks of the least influence on ``batches`` out of ``model``, in place.

    ``ignore``: see `influences`. Returns the plan that repeats it, and the influence of every block.
    UserError, with the model untouched: fewer than ``count`` blocks could go.

    >>> class Residual(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.linear = nn.Linear(4, 4)
    ...     def forward(self, x):
    ...         return x + self.linear(x)
    >>> net = nn.Sequential(Residual(), Residual(), nn.Linear(4, 2))
    >>> plan, _ = remove_blocks(net, 1, [torch.randn(8, 4)])
    >>> len(plan.of_kind("blocks")[0]["removed"])
    1
    """
    found = influences(model, batches, ignore)
    if not 0 < count <= len(found):
        raise UserError(f"{count} blocks are to go, and {len(found)} could: {', '.join(found) or 'none'}.")
    chosen = sorted(sorted(found, key=found.__getitem__)[:count])
    plan = Plan([Step("blocks", {"removed": chosen})])
    apply(model, plan.steps[0].data)
    return plan, found


def apply(model: nn.Module, data: dict[str, Any], example_input: Any = None) -> nn.Module:
    """Repeat a "blocks" step on ``model``, in place. UserError names the first block that is not there."""
    present = dict(model.named_modules())
    for name in data["removed"]:
        if name not in present or not name:
            raise UserError(f"{name}: the plan takes this block out, which {type(model).__name__} does not have.")
    for name in data["removed"]:
        retire(list(present[name].parameters()), "blocks were taken out")
        model.set_submodule(name, nn.Identity())
    return model
