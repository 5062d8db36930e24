"""BatchNorm statistics after QAT: estimated anew, because oscillating weights leave the running ones behind."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from flatcompress.modules import batchnorms, estimate_batchnorm, evaluating
from flatcompress.quant.held import held


def reestimate_batchnorm(model: nn.Module, batches: Iterable[Any]) -> None:
    """Replace every BatchNorm's running statistics by their mean over ``batches`` (arXiv 2203.11086, section 4.3).

    ``batches``: input tensors [B, ...] (or (input, label) pairs). Everything else stays in eval mode, so dropout is
    off; modes and momenta are restored. A model without BatchNorm is left as it is. UserError for no batch and for
    statistics that are not finite, naming the layer; the old statistics are then kept.
    """
    with evaluating(model), held(model, biases=False):
        estimate_batchnorm(model, batches)


@contextmanager
def reestimated(model: nn.Module, batches: Iterable[Any]) -> Iterator[None]:
    """Inside, the model has the statistics of `reestimate_batchnorm`; afterwards its own again, bit for bit."""
    norms = batchnorms(model)
    before = {name: {key: value.clone() for key, value in norm.state_dict().items()} for name, norm in norms.items()}
    try:
        reestimate_batchnorm(model, batches)
        yield
    finally:
        for name, norm in norms.items():
            norm.load_state_dict(before[name])
