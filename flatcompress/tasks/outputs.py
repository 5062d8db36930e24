"""What a model's output must look like: what is wrong with one, in a sentence, or None."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def logits(output: Tensor, y: Tensor, names: Sequence[str]) -> str | None:
    """Logits [B, classes]."""
    wanted, shape = (len(y), len(names)), tuple(output.shape)
    return None if shape == wanted else f"the model gives {shape} for {len(y)} images; wanted {wanted}."


def class_map(output: Tensor, y: Tensor, names: Sequence[str]) -> str | None:
    """Logits with the classes on axis 1 and the targets' positions behind it."""
    wanted, shape = (len(y), len(names), *y.shape[1:]), tuple(output.shape)
    return None if shape == wanted else f"the model gives {shape} for {len(y)} samples; wanted {wanted}."


def same_shape(output: Tensor, y: Tensor, names: Sequence[str]) -> str | None:
    """The targets' shape; [B] is as good as [B, 1]."""
    if output.shape == y.shape or (output.ndim == 1 and tuple(y.shape) == (len(output), 1)):
        return None
    return f"the model gives {tuple(output.shape)} for {len(y)} samples; the targets are {tuple(y.shape)}."
