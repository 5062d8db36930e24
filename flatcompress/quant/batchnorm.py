"""BatchNorm statistics after QAT: estimated anew, because oscillating weights leave the running ones behind."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from flatcompress.errors import UserError

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@torch.no_grad()
def reestimate_batchnorm(model: nn.Module, batches: Iterable[torch.Tensor]) -> None:
    """Replace every BatchNorm's running statistics by their mean over ``batches`` (arXiv 2203.11086, section 4.3).

    ``batches``: input tensors [B, ...] (or (input, label) pairs). Everything else stays in eval mode, so dropout is
    off; modes and momenta are restored. A model without BatchNorm is left as it is. UserError for no batch and for
    statistics that are not finite, naming the layer; the old statistics are then kept.
    """
    norms = {n: m for n, m in model.named_modules() if isinstance(m, _NORMS) and m.track_running_stats}
    if not norms:
        return
    before = {n: {k: v.clone() for k, v in m.state_dict().items()} for n, m in norms.items()}
    modes, momenta = {m: m.training for m in model.modules()}, {n: m.momentum for n, m in norms.items()}
    count = 0
    try:
        model.eval()
        for norm in norms.values():
            norm.reset_running_stats()
            norm.train()
            norm.momentum = None  # the cumulative average
        for batch in batches:
            model(batch[0] if isinstance(batch, tuple | list) else batch)
            count += 1
        _check(norms, count)
    except BaseException:
        for name, norm in norms.items():
            norm.load_state_dict(before[name])
        raise
    finally:
        for module, mode in modes.items():
            module.training = mode
        for name, norm in norms.items():
            norm.momentum = momenta[name]


def _check(norms: dict[str, Any], count: int) -> None:
    if not count:
        raise UserError("BatchNorm re-estimation needs at least one batch.")
    for name, norm in norms.items():
        if not all(bool(torch.isfinite(b).all()) for b in (norm.running_mean, norm.running_var)):
            raise UserError(f"BatchNorm re-estimation: the data gives NaN or infinity at {name!r}.")
