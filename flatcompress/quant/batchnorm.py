"""BatchNorm statistics after QAT: estimated anew, because oscillating weights leave the running ones behind."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from flatcompress.modules import estimate_batchnorm, evaluating


def reestimate_batchnorm(model: nn.Module, batches: Iterable[Any]) -> None:
    """Replace every BatchNorm's running statistics by their mean over ``batches`` (arXiv 2203.11086, section 4.3).

    ``batches``: input tensors [B, ...] (or (input, label) pairs). Everything else stays in eval mode, so dropout is
    off; modes and momenta are restored. A model without BatchNorm is left as it is. UserError for no batch and for
    statistics that are not finite, naming the layer; the old statistics are then kept.
    """
    with evaluating(model):
        estimate_batchnorm(model, batches)
