"""Choosing the device, the threads and the seeds of a run."""

from __future__ import annotations

import os
import random

import numpy as np
import torch

from flatcompress.errors import UserError


def select(device: str) -> str:
    """Check that ``device`` exists here and make it the current one; returns 'cpu' or the accelerator's name.

    ``auto`` takes an accelerator when there is one. UserError says what this machine has.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        return "cpu"
    kind, _, index = device.partition(":")
    if kind == "mps":
        if not torch.backends.mps.is_available():
            raise UserError("device 'mps': this machine has no Metal device. Use device: cpu or auto.")
        return "mps"
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(index or 0) >= count:
        raise UserError(f"device {device!r}: this machine has {count} CUDA devices. Use device: cpu or auto.")
    if index:
        torch.cuda.set_device(int(index))
        os.environ["ACCELERATE_TORCH_DEVICE"] = device
    return device


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch (every device)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
