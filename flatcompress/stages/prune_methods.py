"""The pruning methods: rows of plain data over the same three steps (see `stages.prune`)."""

from __future__ import annotations

from dataclasses import dataclass

from flatcompress.registry import Registry


@dataclass(frozen=True)
class PruneMethod:
    """An importance and a flat method. ``adaptive``: radius per channel from its importance (AdaSAP step 1 and 2).

    ``regularizer``: what draws channels to zero before they go (mask | group_norm | growing, or none); such a method
    removes everything at the end of step 2. ``strength``: the regularizer's default factor.
    """

    flat: str
    importance: str = "group_l2"
    adaptive: bool = False
    regularizer: str = "none"
    strength: float = 0.0


PRUNE_METHODS = Registry("pruning method")
PRUNE_METHODS.add(
    "adasap",
    lambda: PruneMethod("asam", adaptive=True),
    "adaptive sharpness-aware pruning: unimportant channels get the larger radius",
    "2306.14306",
)
PRUNE_METHODS.add("magnitude", lambda: PruneMethod("none"), "group l2 magnitude, plain optimizer", "2301.12900")
PRUNE_METHODS.add("taylor", lambda: PruneMethod("none", "taylor"), "first-order Taylor, plain optimizer", "1906.10771")
PRUNE_METHODS.add("sam", lambda: PruneMethod("sam"), "group l2 magnitude while training with SAM", "2010.01412")
PRUNE_METHODS.add("asam", lambda: PruneMethod("asam"), "group l2 magnitude while training with ASAM", "2102.11600")
PRUNE_METHODS.add("sagm", lambda: PruneMethod("sagm"), "group l2 magnitude while training with SAGM", "2303.10353")
PRUNE_METHODS.add(
    "masksparsity",
    lambda: PruneMethod("none", regularizer="mask", strength=5e-4),
    "L1 on BatchNorm's gamma of the channels that are to go, and only those",
    "2201.06776",
)
PRUNE_METHODS.add(
    "group_norm",
    lambda: PruneMethod("none", regularizer="group_norm", strength=1e-4),
    "DepGraph's sparse training: whole groups shrink, the unimportant ones most",
    "2301.12900",
)
PRUNE_METHODS.add(
    "growing_reg",
    lambda: PruneMethod("none", regularizer="growing", strength=1e-4),
    "L2 on the channels that are to go, by a growing factor",
    "2012.09243",
)
