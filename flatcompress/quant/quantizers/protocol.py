"""What a tensor quantizer with a learned step offers, whoever wrote it."""

from __future__ import annotations

from typing import Any, Protocol, TypeGuard

import torch

from flatcompress.graph import ActivationSpec


class LearnedStep(Protocol):
    """A module Q(v) = step * integer. `flatcompress.quant.quantizers.lsq.StepQuantizer` is the example.

    ``bits``, ``signed`` and the integers' range ``-qn..qp``; ``per_sample``: of an activation, whose first dimension is
    the batch; ``name``: what messages call it; ``scale``: what is learned; ``initial``: where it started; ``observer``:
    while there is one it sees what comes, and ``quantize`` lets it pass.
    """

    bits: int
    signed: bool
    qn: int
    qp: int
    per_sample: bool
    name: str
    scale: torch.nn.Parameter
    initial: torch.Tensor
    observer: Any

    def quantize(self, v: torch.Tensor) -> torch.Tensor:
        """Q(v), differentiable in v and the scale."""
        ...

    def integers(self, v: torch.Tensor) -> torch.Tensor:
        """The integers of Q(v), of float type."""
        ...

    def step(self) -> torch.Tensor:
        """The step that acts."""
        ...

    def start_from_observer(self, observer: Any) -> None:
        """Set the scale from what the observer saw."""
        ...

    def activation_spec(self) -> ActivationSpec:
        """The grid of an activation as plain numbers."""
        ...


def learns_step(quantizer: Any) -> TypeGuard[LearnedStep]:
    """Whether a tensor quantizer is one of these; Brevitas's stock ones are not. Quick enough for every forward.

    >>> from flatcompress.quant.quantizers.lsq import StepQuantizer
    >>> learns_step(StepQuantizer(4, True)), learns_step(torch.nn.Identity())
    (True, False)
    """
    return hasattr(type(quantizer), "integers")
