"""The QAT methods: rows of plain data over the same training (see `stages.quantize`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flatcompress import flat
from flatcompress.errors import UserError
from flatcompress.registry import Registry
from flatcompress.stages.keys import KeyProblem


@dataclass(frozen=True)
class QatMethod:
    """A flat method and what decides over the scales.

    ``conflict``: watch and freeze conflicting scale gradients (GAQAT).
    ``point``: latent (perturb the weights that are quantized) or quantized (perturb what comes out, SAQ).
    ``alternate``: weights and scales take turns (SQuAT). ``bloop``: the scales' smoothness gradient acts only where
    it is orthogonal to their task gradient. ``cage``: strength of the pull of weights towards their grid (CAGE).
    ``float_share``: share of the epochs before the quantizers come in. ``weights_only``: activations stay float.
    """

    flat: str
    conflict: bool = False
    point: str = "latent"
    alternate: bool = False
    bloop: bool = False
    cage: float = 0.0
    float_share: float = 0.0
    weights_only: bool = False


def float_epochs(config: Any) -> int:
    """Epochs before the quantizers come in; at least one is left after them."""
    share = config.row.float_share if config.quant_start is None else config.quant_start
    return max(0, min(round(share * config.epochs), config.epochs - 1))


def conflict_mix(config: Any) -> tuple[float, float]:
    """What each of a scale's two gradients counts in the flat method's. KeyProblem where it is not made of the two."""
    try:
        return flat.mix_of(config.flat_method(), config.hyper)
    except UserError as error:
        raise KeyProblem("flat", str(error)) from None


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
    "2402.02998",
)
QAT_METHODS.add(
    "cage",
    lambda: QatMethod("none", cage=10.0),
    "LSQ with a pull of the weights towards their grid, beside the optimizer",
    "2510.18784",
)
QAT_METHODS.add(
    "qt_dog",
    lambda: QatMethod("none", float_share=0.4, weights_only=True),
    "weights alone quantized, after a float warm-up",
    "2410.06020",
)
