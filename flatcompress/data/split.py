"""Splitting by source image: every copy of an image goes to the same side, classes stay in proportion."""

from __future__ import annotations

import torch
from torch import Tensor

from flatcompress.errors import UserError
from flatcompress.randomness import generator


def split_identities(labels: Tensor, fractions: dict[str, float], seed: int) -> dict[str, Tensor]:
    """Disjoint random sets of positions, in ``fractions`` of every class; what is left over goes to "train".

    ``labels`` is int64 [N], one per source image. UserError when the fractions leave nothing to train on.
    """
    check_fractions(fractions)
    parts: dict[str, list[Tensor]] = {name: [] for name in [*fractions, "train"]}
    for label in labels.unique().tolist():
        members = (labels == label).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator(seed, "split", label))]
        start = 0
        for name, fraction in fractions.items():
            # At least one of each class where a share was asked for and there are enough to go round.
            count = max(round(fraction * len(members)), int(fraction > 0 and len(members) > len(fractions)))
            parts[name].append(members[start : start + count])
            start += count
        parts["train"].append(members[start:])
    return {name: torch.cat(chosen).sort().values for name, chosen in parts.items()}


def check_fractions(fractions: dict[str, float]) -> None:
    """UserError unless every share is in [0, 1) and something is left for training."""
    for name, value in fractions.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
            raise UserError(f"data option '{name}_fraction' must be at least 0 and below 1, found {value!r}")
    if sum(fractions.values()) >= 1:
        raise UserError(f"the fractions {fractions} leave no image to train on")
