"""A transform of somebody else, named in a recipe as ``package.module:factory``: torchvision v2, kornia and so on."""

from __future__ import annotations

import importlib
import os
import random
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flatcompress.errors import UserError
from flatcompress.randomness import derive


class Named:
    """One image at a time through what ``package.module:factory`` made, seeded by (seed, epoch, index).

    It gets a float tensor [C, H, W] in 0..1; one of albumentations gets ``image=`` as uint8 [H, W, C]. UserError where
    the name cannot be imported, and where an image comes back in another shape, with another range, or not at all.
    Naming it runs that code, as naming a model does: only run recipes that you trust.
    """

    def __init__(self, name: str, options: Mapping[str, Any], seed: int) -> None:
        self.name, self.seed = name, seed
        self.change = _made(name, dict(options))
        self.of_arrays = type(self.change).__module__.split(".")[0] == "albumentations"

    def __call__(self, images: Tensor, indices: Tensor, epoch: int) -> Tensor:
        """Float images [B, C, H, W] in 0..1 -> the same shape."""
        before = random.getstate(), np.random.get_state()
        try:
            with torch.random.fork_rng(devices=[]):
                return torch.stack([self._one(x, int(i), epoch) for x, i in zip(images, indices)])
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])

    def _one(self, image: Tensor, index: int, epoch: int) -> Tensor:
        drawn = derive(self.seed, "transform", epoch, index)
        random.seed(drawn)
        np.random.seed(drawn % 2**32)
        torch.manual_seed(drawn % 2**63)
        try:
            found = self._arrays(image, drawn) if self.of_arrays else self.change(image)
        except Exception as error:  # somebody else's code: whatever it raises
            reason = str(error).splitlines()[0][:200] if str(error) else ""
            raise UserError(f"transform {self.name!r} failed on an image: {type(error).__name__}: {reason}") from None
        if isinstance(found, Tensor) and found.ndim == image.ndim + 1 and len(found) == 1:
            found = found[0]  # kornia gives batches
        if not isinstance(found, Tensor) or found.shape != image.shape:
            given = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise UserError(f"transform {self.name!r} gave {given} for an image {tuple(image.shape)}; wanted the same.")
        found = found.detach().float()
        if not bool(found.isfinite().all()) or float(found.min()) < -0.01 or float(found.max()) > 1.01:
            raise UserError(
                f"transform {self.name!r} gave values from {float(found.min()):.3g} to {float(found.max()):.3g}; "
                "images are 0..1 here. Normalisation is the data's own (mean, std): leave it out."
            )
        return found.clamp(0, 1)

    def _arrays(self, image: Tensor, drawn: int) -> Tensor:
        if hasattr(self.change, "set_random_seed"):
            self.change.set_random_seed(drawn % 2**32)
        pixels = (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        found = np.asarray(self.change(image=np.ascontiguousarray(pixels))["image"])
        return (
            torch.from_numpy(np.ascontiguousarray(found.reshape(*found.shape[:2], -1))).permute(2, 0, 1).float() / 255
        )


def _made(name: str, options: dict[str, Any]) -> Any:
    module, colon, attribute = name.partition(":")
    if not colon or not module or not attribute:
        raise UserError(f"augment: a transform is named package.module:factory, found {name!r}.")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())  # last, so that no file lying here can hide an installed module
    try:
        make = getattr(importlib.import_module(module), attribute)
        made = make(**options)
    except Exception as error:  # an import runs somebody else's code
        reason = str(error).splitlines()[0][:200] if str(error) else ""
        raise UserError(f"augment: transform {name!r} cannot be made: {type(error).__name__}: {reason}") from None
    if not callable(made):
        raise UserError(f"augment: {name!r} gave {type(made).__name__}, which cannot be called with an image.")
    return made
