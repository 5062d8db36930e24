"""The stages: each is one file with its keys, its phases, its dry run and the order it may stand in.

This is the only place where flat, quant and prune meet: GAQAT's conflict and AdaSAP's radius go into the flat engine's
slots here. No stage knows which stage came before it; what it must know is in the run's plan. A new kind is one file
and one line below, or an entry point of another package (docs/extending.md).
"""

from flatcompress.stages import elastic, export, prune, quantize, shorten, sparsify, train
from flatcompress.stages.context import RunContext
from flatcompress.stages.keys import StageKeys, TrainingKeys
from flatcompress.stages.stage import STAGES, Phase, Stage, order_problem, run_stage, stage_of

STAGES.add("train", lambda: train.STAGE, "train into a flat minimum")
STAGES.add("prune", lambda: prune.STAGE, "remove channels while training", "2306.14306")
STAGES.add("shorten", lambda: shorten.STAGE, "take out the residual blocks that change least, train on", "2403.03853")
STAGES.add("sparsify", lambda: sparsify.STAGE, "mask single weights while training", "1710.01878")
STAGES.add("elastic", lambda: elastic.STAGE, "train nested widths at once, each one to be exported", "2310.07707")
STAGES.add("quantize", lambda: quantize.STAGE, "quantization-aware training with learned step sizes", "2412.05551")
STAGES.add("export", lambda: export.STAGE, "the ONNX file and its certificate")

__all__ = [
    "STAGES", "Phase", "RunContext", "Stage", "StageKeys", "TrainingKeys", "order_problem", "run_stage", "stage_of",
]  # fmt: skip
