"""Which flat method, importance and plug a pruning or QAT method stands for: rows of plain data.

A pruning method is an importance, a flat method and, for AdaSAP, the adaptive radius in the engine's ball slot.
A QAT method is a flat method and, for GAQAT, the scale-gradient conflict in the engine's compose slot.
"""

from __future__ import annotations

from dataclasses import dataclass

from flatcompress.registry import Registry


@dataclass(frozen=True)
class PruneMethod:
    """``adaptive``: radius per channel from its importance (AdaSAP step 1 and 2). ``penalty``: sparsity pull."""

    flat: str
    importance: str = "group_l2"
    adaptive: bool = False


@dataclass(frozen=True)
class QatMethod:
    """``conflict``: watch and freeze conflicting scale gradients."""

    flat: str
    conflict: bool = False


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

QAT_METHODS = Registry("QAT method")
QAT_METHODS.add(
    "gaqat",
    lambda: QatMethod("sagm", conflict=True),
    "LSQ under SAGM with conflicting scale gradients frozen",
    "2412.05551",
)
QAT_METHODS.add("lsq", lambda: QatMethod("none"), "learned step sizes, plain optimizer", "1902.08153")
QAT_METHODS.add("lsq_sam", lambda: QatMethod("sam"), "learned step sizes under SAM", "2010.01412")
QAT_METHODS.add("lsq_asam", lambda: QatMethod("asam"), "learned step sizes under ASAM", "2102.11600")
QAT_METHODS.add("lsq_sagm", lambda: QatMethod("sagm"), "learned step sizes under SAGM", "2303.10353")
