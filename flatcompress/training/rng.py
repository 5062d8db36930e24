"""All random states that a run draws from, taken and put back."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from flatcompress.errors import UserError


def capture_rng() -> dict[str, Any]:
    """The states of Python's, numpy's and torch's global generators (CPU and every CUDA device)."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_rng(state: dict[str, Any]) -> None:
    """Put `capture_rng`'s states back; CUDA states are used as far as there are devices. UserError when damaged."""
    try:
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])
        torch.set_rng_state(state["torch"])
        if torch.cuda.is_available():
            for device, cuda in zip(range(torch.cuda.device_count()), state["cuda"]):
                torch.cuda.set_rng_state(cuda, device)
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, RuntimeError, OverflowError) as error:
        raise UserError(f"the checkpoint's random state is damaged ({str(error)[:200]}).") from None
