"""The input again, learned from normal samples: its squared error is the anomaly score of a sample.

A batch's target is [B, 1 + D]: whether the sample is an anomaly (0, 1, or -1 where nobody said), then the input,
flattened. Training takes normal samples; where a test part says which of its samples are anomalies, AUROC is measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from flatcompress.errors import UserError, unknown
from flatcompress.tasks.metrics import Metric, auroc
from flatcompress.tasks.targets import normal_or_not
from flatcompress.tasks.task import Task


def reconstruction(loss: str = "mse") -> Task:
    """``loss``: mse or l1, of the reconstruction; the anomaly score is the mean squared error."""
    losses = {"mse": torch.square, "l1": torch.abs}
    if loss not in losses:
        raise unknown("loss of task reconstruction", loss, losses)
    return Task(
        lambda output, y: losses[loss](_error(output, y)).mean(),
        {"mse": Metric(_scores, _normal_error, False), "auroc": Metric(_scores, _separated, share=True)},
        "reconstruction",
        normal_or_not,
        names=lambda targets: (),
        output=_like_the_input,
        target=lambda x, y: torch.cat([y.reshape(len(x), 1).to(x), x.reshape(len(x), -1)], 1),
        fitted=_normal_alone,
        decode={"score": "mean squared error"},
        options={"loss": loss} if loss != "mse" else {},
    )


def _error(output: Tensor, y: Tensor) -> Tensor:
    return output.reshape(len(y), -1) - y[:, 1:]


def _scores(output: Tensor, y: Tensor) -> Tensor:
    """Anomaly score and kind of each sample."""
    return torch.stack([_error(output, y).double().square().mean(1), y[:, 0].double()], 1)


def _normal_error(rows: Tensor) -> float:
    """Mean score of the samples that are not known as anomalies."""
    normal = rows[rows[:, 1] != 1, 0]
    return float(normal.sum()) / len(normal) if len(normal) else math.nan


def _separated(rows: Tensor) -> float:
    known = rows[rows[:, 1] >= 0]
    return auroc(known[:, 0], known[:, 1] == 1)


def _like_the_input(output: Tensor, y: Tensor, names: Sequence[str]) -> str | None:
    if output.ndim and len(output) == len(y) and output[0].numel() == y.shape[1] - 1:
        return None
    return f"the model gives {tuple(output.shape)} for {len(y)} samples of {y.shape[1] - 1} values; wanted the input."


def _normal_alone(task: Task, targets: Tensor, names: Sequence[str]) -> Task:
    anomalies = int((targets == 1).sum())
    if anomalies:
        raise UserError(
            f"task reconstruction learns what is normal, and {anomalies} of {len(targets)} training samples are marked "
            "as anomalies: leave them to the test part."
        )
    return task
