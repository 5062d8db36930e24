"""Learning N:M sparsity from scratch with the sparse-refined straight-through estimator (SR-STE, arXiv 2102.04010)."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

import torch
from torch import Tensor, nn

from flatcompress.errors import UserError
from flatcompress.prune.masks import WeightMasks, nm_mask, parse_pattern


class SparseRefined:
    """Forward and backward on the masked weights, update the dense ones, decay what the mask leaves out.

    Inside ``with`` every weight is N:M sparse, with a mask of its current values. On leaving, the dense weights are
    back and their gradients are g(masked) + strength * (1 - mask) * w. End the training with
    ``masks.sparsify(model, pattern=...)``, which makes the last mask final.

        with refined:
            loss(model(x), y).backward()
        optimizer.step()
    """

    def __init__(
        self, model: nn.Module, pattern: str = "2:4", strength: float = 2e-4, ignore: Sequence[str] = ()
    ) -> None:
        found = parse_pattern(pattern)
        if found is None:
            raise UserError("SR-STE is for N:M patterns such as '2:4'.")
        self._n, self._m = found
        self._layers = WeightMasks(model, pattern, ignore=ignore).layers
        self.strength = strength
        self._dense: dict[str, Tensor] = {}

    @torch.no_grad()
    def __enter__(self) -> SparseRefined:
        for name, module in self._layers.items():
            weight = module.get_parameter("weight")
            self._dense[name] = weight.clone()
            weight.masked_fill_(~nm_mask(weight, self._n, self._m), 0)
        return self

    @torch.no_grad()
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name, module in self._layers.items():
            weight, dense = module.get_parameter("weight"), self._dense.pop(name)
            weight.copy_(dense)
            if kind is None and weight.grad is not None:
                dropped = ~nm_mask(dense, self._n, self._m)
                weight.grad.add_(self.strength * dropped * dense)
