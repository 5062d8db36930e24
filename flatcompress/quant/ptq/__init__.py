"""Post-training quantization: a trained network onto integers without training, step by step.

Every step is a file and a row of a registry: where an activation's range ends (`CALIBRATORS`), how a weight's scale is
found (`WEIGHT_SCALES`), what is moved between layers beforehand (`SCALINGS`), how weights are rounded (`ROUNDINGS`)
and what is put right in biases afterwards (`CORRECTIONS`). `post_training` runs them in order and says per layer what
was done. It knows nothing of training, recipes or files.
"""

from __future__ import annotations

from flatcompress.quant.ptq.calibrators import CALIBRATORS
from flatcompress.quant.ptq.corrections import CORRECTIONS
from flatcompress.quant.ptq.diagnosis import diagnose
from flatcompress.quant.ptq.give_back import within_drop
from flatcompress.quant.ptq.post_training import PostTraining, post_training
from flatcompress.quant.ptq.rounding import ROUNDINGS
from flatcompress.quant.ptq.scaling import SCALINGS
from flatcompress.quant.ptq.weight_scales import WEIGHT_SCALES

__all__ = [
    "CALIBRATORS",
    "CORRECTIONS",
    "ROUNDINGS",
    "SCALINGS",
    "WEIGHT_SCALES",
    "PostTraining",
    "diagnose",
    "post_training",
    "within_drop",
]
