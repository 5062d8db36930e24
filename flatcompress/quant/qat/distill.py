"""Distillation from the float model, an option for every QAT method."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def distillation_loss(student: torch.Tensor, teacher: torch.Tensor, temperature: float = 4.0) -> torch.Tensor:
    """T^2 * KL(softmax(teacher / T) || softmax(student / T)), mean over the batch (arXiv 1503.02531, section 2).

    ``student``, ``teacher``: logits [B, classes]; no gradient reaches the teacher.

    >>> logits = torch.tensor([[1.0, 2.0]])
    >>> float(distillation_loss(logits, logits))
    0.0
    """
    log_p = F.log_softmax(student / temperature, dim=1)
    log_q = F.log_softmax(teacher.detach() / temperature, dim=1)
    return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True) * temperature**2
