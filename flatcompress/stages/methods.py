"""What a pruning or QAT method stands for: rows of plain data over the same loop.

A pruning method is an importance, a flat method and, for AdaSAP, the adaptive radius in the engine's ball slot, or a
pull towards zero added to the combined gradient. A QAT method is a flat method and what decides over the scales.
"""

from __future__ import annotations

from dataclasses import dataclass

from flatcompress.registry import Registry


@dataclass(frozen=True)
class PruneMethod:
    """``adaptive``: radius per channel from its importance (AdaSAP step 1 and 2).

    ``pull``: what draws channels to zero before they go (mask | group_norm | growing, or none); such a method removes
    everything at the end of step 2. ``strength``: the pull's default factor.
    """

    flat: str
    importance: str = "group_l2"
    adaptive: bool = False
    pull: str = "none"
    strength: float = 0.0


@dataclass(frozen=True)
class QatMethod:
    """``conflict``: watch and freeze conflicting scale gradients (GAQAT).

    ``point``: latent (perturb the weights that are quantized) or quantized (perturb what comes out, SAQ).
    ``alternate``: weights and scales take turns (SQuAT). ``bloop``: the scales' smoothness gradient acts only where
    it is orthogonal to their task gradient. ``float_share``: share of the epochs before the quantizers come in.
    ``weights_only``: activations stay float.
    """

    flat: str
    conflict: bool = False
    point: str = "latent"
    alternate: bool = False
    bloop: bool = False
    float_share: float = 0.0
    weights_only: bool = False


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
    lambda: PruneMethod("none", pull="mask", strength=5e-4),
    "L1 on BatchNorm's gamma of the channels that are to go, and only those",
    "2201.06776",
)
PRUNE_METHODS.add(
    "group_norm",
    lambda: PruneMethod("none", pull="group_norm", strength=1e-4),
    "DepGraph's sparse training: whole groups shrink, the unimportant ones most",
    "2301.12900",
)
PRUNE_METHODS.add(
    "growing_reg",
    lambda: PruneMethod("none", pull="growing", strength=1e-4),
    "L2 on the channels that are to go, by a growing factor",
    "2012.09243",
)

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
QAT_METHODS.add(
    "saq", lambda: QatMethod("sam", point="quantized"), "SAM with the perturbation after the quantizer", "2111.12273"
)
QAT_METHODS.add(
    "squat", lambda: QatMethod("sam", alternate=True), "SAM on weights and LSQ on scales, by turns", "2210.07171"
)
QAT_METHODS.add(
    "scale_bloop",
    lambda: QatMethod("sagm", bloop=True),
    "LSQ under SAGM, the scales' smoothness gradient acting only across their task gradient",
    "2407.02998",
)
QAT_METHODS.add(
    "qt_dog",
    lambda: QatMethod("none", float_share=0.4, weights_only=True),
    "weights alone quantized, after a float warm-up",
    "2410.06020",
)
